"""Whole modules in PEFT's files: `modules_to_save`, and embeddings that were resized or adapted.

    <prefix><module>.weight              a trained copy; or an embedding whose vocabulary was resized
    <prefix><module>.base_layer.weight   the frozen embedding under an adapter, stored beside it

PEFT copies a module and leaves a module tied to it alone; inlay's copy replaces both. So a tied module is read only if
both were saved with the same values, and both are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inlay.core.contracts.adapter import Adapter
from inlay.core.model.layer import read_weight
from inlay.core.model.view import ModelView
from inlay.formats.configuration import Config
from inlay.formats.exchange import Entry
from inlay.formats.peft.targets import saved_modules

Check = Callable[[Mapping[str, Tensor]], "str | None"]


@dataclass
class Copies:
    """Modules of which an adapter holds whole copies.

    Attributes:
        prefix: prefix of every name in the file.
        paths: paths of the modules, each tied group once.
        checks: stored tensors that must agree with something.
    """

    prefix: str
    paths: list[str] = field(default_factory=list)
    checks: dict[str, Check] = field(default_factory=dict)

    def entries(self, adapter: Adapter) -> Iterator[Entry]:
        for name, value in adapter.copies.items():
            yield Entry(f"copy/{name}", {self.prefix + name: tuple(value.shape)})


def read_copies(config: Config, view: ModelView, stored: Mapping[str, tuple[int, ...]], prefix: str) -> Copies:
    """The copies of whole modules in a file."""
    found = Copies(prefix)
    named = saved_modules(config, view)
    tie = bool(config.get("ensure_weight_tying", False))
    resized = [p for p in _embeddings(view) if p not in named and f"{prefix}{p}.weight" in stored]
    for path in [*named, *resized]:
        partner = next((p for p in found.paths if _tied(view, p, path)), None)
        if partner is not None:
            for name, _ in view.modules[path].named_parameters():
                found.checks[f"{prefix}{path}.{name}"] = same_values(
                    f"{prefix}{path}.{name}", f"{prefix}{partner}.{name}"
                )
            continue
        found.paths.append(path)
        apart = [p for p in view.modules if p and p != path and _tied(view, path, p) and p not in [*named, *resized]]
        if apart and path in named and not tie:
            config.wrong.append(
                f"modules_to_save: {path} is tied to {', '.join(apart)}; PEFT trains a copy of one and leaves the "
                "other alone, which has no counterpart here"
            )
    for path in resized:
        rows, expected = stored[f"{prefix}{path}.weight"][:1], view.modules[path]._parameters["weight"]
        if expected is not None and rows != expected.shape[:1]:
            config.wrong.append(
                f"{path} was resized to {rows[0]} entries; call model.resize_token_embeddings({rows[0]}) before loading"
            )
    for path in view.layers:
        frozen = f"{prefix}{path}.base_layer.weight"
        if frozen in stored:
            found.checks[frozen] = _frozen(view, path, frozen)
    return found


def write_copies(adapter: Adapter, view: ModelView, prefix: str) -> tuple[list[str], dict[str, Tensor]]:
    """Paths for `modules_to_save`, and the tensors; tied modules included."""
    paths = list(adapter.modules_to_save)
    tensors: dict[str, Tensor] = {prefix + name: value for name, value in adapter.copies.items()}
    for saved in adapter.modules_to_save:
        for path in [p for p in view.modules if p and p not in paths and _tied(view, saved, p)]:
            paths.append(path)
            tensors |= {
                f"{prefix}{path}.{n}": adapter.copies[f"{saved}.{n}"]
                for n, _ in view.modules[path].named_parameters()
                if f"{saved}.{n}" in adapter.copies
            }
    return paths, tensors


def _embeddings(view: ModelView) -> list[str]:
    ends = [m for m in (view.input_embedding, view.output_head) if m is not None]
    return [p for p, m in view.modules.items() if any(m is e for e in ends)]


def _tied(view: ModelView, one: str, other: str) -> bool:
    """Whether two modules directly hold the same parameter."""
    mine = {id(p) for p in view.modules[one]._parameters.values() if p is not None}
    return any(id(p) in mine for p in view.modules[other]._parameters.values() if p is not None)


def same_values(name: str, other: str) -> Check:
    """A check that two tensors of the file are equal, because their modules share one here."""

    def check(values: Mapping[str, Tensor]) -> str | None:
        if other in values and torch.equal(values[name], values[other]):
            return None
        return f"{name} differs from {other}, but the two are tied in this model"

    return check


def _frozen(view: ModelView, path: str, name: str) -> Check:
    def check(values: Mapping[str, Tensor]) -> str | None:
        weight, _ = read_weight(view.modules[path])
        base = weight.t() if view.layers[path].kind == "embedding" else weight
        value = values[name].to(base.device, base.dtype)
        if value.shape == base.shape and torch.equal(value, base):
            return None
        return f"{name}: the adapter was trained over other values of {path} than this base has; load its own base"

    return check
