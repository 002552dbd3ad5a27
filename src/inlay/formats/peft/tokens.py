"""Trainable tokens in PEFT's files.

    <embedding>.trainable_tokens_delta (tokens, dim)    the rows' new values, in spite of the name

A tied output head uses the same rows in PEFT, as here.
"""

from __future__ import annotations

from collections.abc import Iterator

from inlay.core.contracts.adapter import Adapter
from inlay.core.errors import UnsupportedError
from inlay.core.model.select import Places
from inlay.core.model.view import ModelView
from inlay.formats.archive import Archive
from inlay.formats.configuration import Config
from inlay.formats.exchange import Entry, Reading, Writing
from inlay.formats.peft import targets
from inlay.formats.peft.common import PREFIX, header
from inlay.formats.peft.copies import read_copies, same_values, write_copies

SUFFIX = ".trainable_tokens_delta"


def read(config: Config, view: ModelView, archive: Archive) -> Reading:
    from inlay.methods.trainable_tokens import TrainableTokens

    copies = read_copies(config, view, archive.shapes, PREFIX)
    stored = {n.removeprefix(PREFIX).removesuffix(SUFFIX) for n in archive.shapes if n.endswith(SUFFIX)}
    paths = targets.sites(config, view, stored) or sorted(stored)
    config.ignore("init_weights")
    table = _table(view)
    tied = _tied(view, table)
    elsewhere = [p for p in paths if p != table and p not in tied]
    if elsewhere:
        config.wrong.append(f"target_modules: {', '.join(elsewhere)} is not the embedding of this model's tokens")
    tokens = tuple(config.get("token_indices", []))
    extra = [p for p in stored if p != table and p in tied]

    def entries(adapter: Adapter) -> Iterator[Entry]:
        for name, value in adapter.tensors().items():
            if not name.startswith("copy/"):
                yield Entry(name, {f"{PREFIX}{table}{SUFFIX}": tuple(value.shape)})
        yield from copies.entries(adapter)

    checks = copies.checks | {
        f"{PREFIX}{p}{SUFFIX}": same_values(f"{PREFIX}{p}{SUFFIX}", f"{PREFIX}{table}{SUFFIX}") for p in extra
    }
    return Reading(TrainableTokens(tokens=tokens), Places(), entries, copies.paths, checks)


def write(adapter: Adapter, view: ModelView) -> Writing:
    tensors = {n: t.detach() for n, t in adapter.tensors().items() if not n.startswith("copy/")}
    if set(tensors) != {"shared/tokens/values"}:
        raise UnsupportedError("PEFT trains rows of the embedding and of a head tied to it, but not of an untied head")
    table = _table(view)
    method = adapter.method
    saved, copied = write_copies(adapter, view, PREFIX)
    config = header(view, "TRAINABLE_TOKENS", saved) | {
        "token_indices": list(getattr(method, "tokens")),  # noqa: B009 - a field of this method alone
        "target_modules": [table.rpartition(".")[2]],
        "init_weights": True,
    }
    return Writing(config, {f"{PREFIX}{table}{SUFFIX}": tensors["shared/tokens/values"]} | copied)


def _table(view: ModelView) -> str:
    """Path of the token embedding."""
    found = next((p for p, m in view.modules.items() if m is view.input_embedding), None)
    if found is None:
        raise UnsupportedError(f"{type(view.model).__name__} has no token embeddings")
    return found


def _tied(view: ModelView, table: str) -> list[str]:
    weight = view.modules[table]._parameters.get("weight")
    return [p for p, m in view.modules.items() if p != table and m._parameters.get("weight") is weight]
