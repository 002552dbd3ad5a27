"""The trunk cache: the output of the layers below the lowest trained one, computed once and kept.

    rows ── before the first step ──▶ hidden states at the cut, (tokens, hidden) each ──▶ memory or a file
    steps, evaluations ─────────────▶ the states of a batch's rows are put together; only the layers above run

Rows are computed in batches of equal length, without padding and in an order that depends only on the rows, so that a
resumed run has exactly the numbers of the run that was stopped. A row is identified by its tokens. In a file, the
states belong to a digest of everything they depend on: every weight below the cut, configuration, dtype, versions.

Whether this is exact for a model is tried on rows of the run: outputs must be the same to the bit if the lower layers
are skipped, the same in training as in evaluation, and the kept states must equal those of a padded batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from inlay.core.errors import ConfigError, UnsupportedError
from inlay.core.forward.wrappers import enabled, switched_off
from inlay.core.model.view import ModelView
from inlay.kernels import packed, trunk
from inlay.kernels.trunk import Cut
from inlay.sizes import bytes_of, told_bytes
from inlay.train.folder import disk_errors, write_beside, write_text

if TYPE_CHECKING:
    from inlay.train.prepare import Prepared

TOKENS_AT_ONCE = 4096
FEWEST_PASSES = 1.5  # over the rows; with one there is nothing to reuse
CLOSENESS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # relative, for a row's states in a batch
# Model → its open caches: runs that share a base share the states of the same rows.
_LIVE: weakref.WeakKeyDictionary[nn.Module, weakref.WeakSet[TrunkCache]] = weakref.WeakKeyDictionary()


class TrunkCache:
    """The hidden states of rows at the cut.

    Args:
        model: the model with the adapter attached.
        cut: from `find_cut`; the blocks below it can be skipped until `close` is called.
    """

    def __init__(self, model: nn.Module, cut: Cut) -> None:
        self.model, self.cut = model, cut
        self.states: dict[bytes, Tensor] = {}
        below = [p for path, m in _below(model, cut) for p in m._parameters.values() if p is not None]
        self._weights, self._versions = below, [p._version for p in below]
        trunk.open_cut(model, cut)
        _LIVE.setdefault(model, weakref.WeakSet()).add(self)

    def close(self) -> None:
        """Undo the cut, and free the memory."""
        trunk.close_cut(self.model, self.cut)
        self.states.clear()

    @contextmanager
    def serving(self, batch: dict[str, Tensor]) -> Iterator[None]:
        """Skip the lower layers while a batch is run, if the states of all its rows are known."""
        spans = list(spans_of(batch))
        keys = [_key(batch, row, at) for row, at in spans]
        if any(key not in self.states for key in keys):
            yield
            return
        if [p._version for p in self._weights] != self._versions:
            raise UnsupportedError(
                "the base's weights have changed since the trunk cache was filled; use --trunk-cache off"
            )
        with trunk.replaying(self.cut, _together(batch, spans, [self.states[key] for key in keys])):
            yield

    def fill(self, rows: Mapping[bytes, dict[str, list[int]]], into: Tensor) -> None:
        """Compute the states of rows, (tokens, hidden) each, one after another in `into`."""
        device = next(self.model.parameters()).device
        done = 0
        for group in _groups(rows):
            batch = {name: torch.tensor([rows[key][name] for key in group], device=device) for name in rows[group[0]]}
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            for key, row in zip(group, trunk.states_of(self.model, self.cut, batch), strict=True):
                self.states[key] = into[done : done + len(row)]
                self.states[key].copy_(row)
                done += len(row)


def open_trunk(prepared: Prepared, say: Callable[[str], None]) -> TrunkCache | None:
    """The filled cache of a run; None if it has none.

    Raises:
        ConfigError, UnsupportedError: a cache was asked for by a path, but is not possible.
    """
    config = prepared.config
    if config.trunk_cache == "off":
        return None
    if not enabled("trunk-cache"):
        switched_off("trunk-cache", asked=config.trunk_cache != "auto")
        return None
    folder = None if config.trunk_cache == "auto" else Path(config.trunk_cache).expanduser()
    passes = prepared.total_steps * config.batch_size * config.accumulate / max(len(prepared.train), 1)
    if folder is None and passes < FEWEST_PASSES:
        return None
    model = prepared.base.model
    before, model.config.use_cache = getattr(model.config, "use_cache", None), False
    cache = None
    try:
        cache = TrunkCache(model, _tried(prepared))
        rows = _rows(prepared)
        sample = next(iter(rows.values()))
        like = trunk.states_of(model, cache.cut, _alone(sample, model))
        size = sum(len(row["input_ids"]) for row in rows.values()) * like.shape[-1] * like.element_size()
        _check_room(size, config.trunk_cache_limit, folder)
        say(
            f"trunk cache: {cache.cut.depth} of {cache.cut.total} layers are computed once, {told_bytes(size)} are "
            f"kept in {folder or 'memory'} (limit {config.trunk_cache_limit})"
        )
        _fill(cache, rows, like, folder)
        _check(cache, prepared)
        return cache
    except UnsupportedError as error:
        if cache is not None:
            cache.close()
        if folder is None:
            return None
        raise UnsupportedError(f"--trunk-cache {folder} cannot serve this run: {error}") from error
    except ConfigError as error:
        if cache is not None:
            cache.close()
        if folder is None:
            say(f"no trunk cache: {error}")
            return None
        raise
    finally:
        if before is not None:
            model.config.use_cache = before


def _tried(prepared: Prepared) -> Cut:
    """Find the cut, and check that the layers below it are deterministic."""
    model = prepared.base.model
    shortest = min(prepared.train["input_ids"], key=len)
    row = next(r for r in prepared.train if len(r["input_ids"]) == len(shortest))
    cut = trunk.find_cut(model, prepared.adapter, _alone(_tokens(row), model))
    random = trunk.random_parts(model, cut)
    if random:
        raise UnsupportedError(
            f"{random[0]} draws random numbers below the lowest trained layer ({len(random)} such places), so the "
            "states differ in each step"
        )
    return cut


def _rows(prepared: Prepared) -> dict[bytes, dict[str, list[int]]]:
    """Every row of the run once, the longest first."""
    found: dict[bytes, dict[str, list[int]]] = {}
    for table in (prepared.train, prepared.held_out):
        for row in table if table is not None else ():
            tokens = _tokens(row)
            found.setdefault(_digest(*tokens.values()), tokens)
    return dict(sorted(found.items(), key=lambda entry: -len(entry[1]["input_ids"])))


def _tokens(row: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: list(row[name]) for name in ("input_ids", "token_type_ids") if name in row}


def _alone(row: dict[str, list[int]], model: nn.Module) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: torch.tensor([values], device=device) for name, values in row.items()}


def _groups(rows: Mapping[bytes, dict[str, list[int]]]) -> Iterator[list[bytes]]:
    """Rows of equal length, as many as fill a batch."""
    group: list[bytes] = []
    for key, row in rows.items():
        length = len(row["input_ids"])
        if group and (len(rows[group[0]]["input_ids"]) != length or (len(group) + 1) * length > TOKENS_AT_ONCE):
            yield group
            group = []
        group.append(key)
    if group:
        yield group


def spans_of(batch: dict[str, Tensor]) -> Iterator[tuple[int, slice]]:
    """Where each row of a padded or packed batch is: the row of the tensors, and its tokens there."""
    mask, positions = batch["attention_mask"].cpu(), batch.get("position_ids")
    if positions is not None:  # packed: every row begins at position zero
        for run in packed.runs_of(positions):
            for start in range(run.start, run.start + run.count * run.length, run.length):
                yield 0, slice(start, start + run.length)
        return
    for row, kept in enumerate(mask.bool()):
        first = int(kept.int().argmax())
        yield row, slice(first, first + int(kept.sum()))


def _key(batch: dict[str, Tensor], row: int, at: slice) -> bytes:
    return _digest(*(batch[name][row, at].tolist() for name in ("input_ids", "token_type_ids") if name in batch))


def _digest(*lists: list[int]) -> bytes:
    return hashlib.blake2b(repr(lists).encode(), digest_size=16).digest()


def _together(batch: dict[str, Tensor], spans: list[tuple[int, slice]], held: list[Tensor]) -> Tensor:
    """The states of a batch, (rows, tokens, hidden); zero at padding, which nothing attends to."""
    ids = batch["input_ids"]
    whole = held[0].new_zeros((*ids.shape, held[0].shape[-1]))
    for (row, at), states in zip(spans, held, strict=True):
        whole[row, at] = states
    return whole.to(ids.device)


# -- room -------------------------------------------------------------------------------------------


def _check_room(size: int, limit: str, folder: Path | None) -> None:
    if size > bytes_of(limit):
        raise ConfigError(
            f"the states of these rows take {told_bytes(size)}, more than --trunk-cache-limit {limit}. "
            f"Give --trunk-cache-limit {told_bytes(size * 1.01).replace(' ', '')}, or --trunk-cache off"
        )
    if folder is None:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size > there / 2:
            raise ConfigError(
                f"the states of these rows take {told_bytes(size)}, more than half of this machine's memory "
                f"({told_bytes(there)}). Give a folder to keep them in: --trunk-cache PATH"
            )
        return
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if size > (free := shutil.disk_usage(folder).free):
        raise ConfigError(f"the states of these rows take {told_bytes(size)}, but {folder} has {told_bytes(free)}")


def _fill(cache: TrunkCache, rows: dict[bytes, dict[str, list[int]]], like: Tensor, folder: Path | None) -> None:
    hidden = like.shape[-1]
    for other in _LIVE[cache.model]:  # all or none: the last bits of a row depend on those beside it
        if other.cut == cache.cut and other.states.keys() == rows.keys():
            cache.states.update(other.states)
            return
    if folder is None:
        numbers = sum(len(row["input_ids"]) for row in rows.values()) * hidden
        cache.fill(rows, torch.empty(numbers, dtype=like.dtype).view(-1, hidden))
        return
    index = folder / f"{_belongs_to(cache, like)}.json"
    known = {key: states for key, states in _read(index, like).items() if key in rows}
    missing = {key: row for key, row in rows.items() if key not in known}
    if missing:
        _write(cache, index, known, missing, like)
    else:
        cache.states.update(known)


def _read(index: Path, like: Tensor) -> dict[bytes, Tensor]:
    """The states in a file, memory-mapped; empty if index and file do not fit each other."""
    try:
        said = json.loads(index.read_text(encoding="utf-8"))
        path, hidden = index.with_name(said["file"]), like.shape[-1]
        if path.stat().st_size != said["tokens"] * hidden * like.element_size():
            return {}
    except (OSError, ValueError, KeyError):
        return {}
    whole = torch.from_file(str(path), shared=False, size=said["tokens"] * hidden, dtype=like.dtype).view(-1, hidden)
    return {bytes.fromhex(key): whole[start : start + length] for key, (start, length) in said["rows"].items()}


def _write(cache: TrunkCache, index: Path, known: dict[bytes, Tensor], missing: dict[bytes, Any], like: Tensor) -> None:
    """Write a new file of known and missing rows, completely or not at all; older files of this trunk are removed."""
    hidden = like.shape[-1]
    path = index.with_name(f"{index.stem}.{secrets.token_hex(4)}.states")
    place, rows = 0, {}
    lengths = {key: len(states) for key, states in known.items()} | {k: len(r["input_ids"]) for k, r in missing.items()}
    for key, length in lengths.items():
        rows[key.hex()] = (place, length)
        place += length

    def write(part: Path) -> None:
        with part.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, place * hidden * like.element_size())  # to notice a full disk now
        whole = torch.from_file(str(part), shared=True, size=place * hidden, dtype=like.dtype).view(-1, hidden)
        for states, (start, length) in zip(known.values(), rows.values(), strict=False):
            whole[start : start + length] = states
        cache.fill(missing, whole[sum(len(states) for states in known.values()) :])

    write_beside(path, write)
    write_text(index, json.dumps({"file": path.name, "tokens": place, "rows": rows}))
    for old in index.parent.glob(f"{index.stem}.*.states"):
        if old != path:
            old.unlink(missing_ok=True)
    cache.states.update(_read(index, like))


# -- trust ------------------------------------------------------------------------------------------


def _below(model: nn.Module, cut: Cut) -> list[tuple[str, nn.Module]]:
    """Every module of the base that may run below the cut: all but the layers above and the heads."""
    above = ModelView(model).stack().blocks[cut.depth :]
    beside = {n for n, child in model.named_children() if child is not getattr(model, "base_model", model)}
    return [
        (path, module)
        for path, module in ModelView(model).modules.items()
        if path.partition(".")[0] not in beside and not any(f"{path}.".startswith(f"{b}.") for b in above)
    ]


def _belongs_to(cache: TrunkCache, like: Tensor) -> str:
    """A digest of everything on which the states depend."""
    import transformers

    config = {k: v for k, v in cache.model.config.to_dict().items() if not k.startswith("_")}  # type: ignore[operator, union-attr]
    for name in ("use_cache", "transformers_version", "id2label", "label2id", "problem_type", "architectures"):
        config.pop(name, None)
    threads = torch.get_num_threads()
    said = (cache.cut.blocks, str(like.dtype), torch.__version__, transformers.__version__, threads)
    sha = hashlib.sha256(json.dumps([said, config], sort_keys=True, default=str).encode())
    for path, module in _below(cache.model, cache.cut):
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None:
                sha.update(f"{path}.{name} {value.dtype} {tuple(value.shape)}\n".encode())
                sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()[:32]


def _check(cache: TrunkCache, prepared: Prepared) -> None:
    """Try the cache on a ragged batch of the run.

    Raises:
        UnsupportedError: outputs or states differ from those of the whole model.
    """
    model, train = prepared.base.model, prepared.train
    lengths = [len(ids) for ids in train["input_ids"]]
    picked = {lengths.index(max(lengths)), lengths.index(min(lengths))}
    batch = {k: v.to(next(model.parameters()).device) for k, v in prepared.collator([train[i] for i in picked]).items()}
    with packed.serving(batch) as given:
        whole = trunk.states_of(model, cache.cut, given)
        if not torch.equal(whole, trunk.states_of(model, cache.cut, given, training=True)):
            raise UnsupportedError("the layers below the lowest trained one compute something else in training")
        if not trunk.agrees(model, cache.cut, given):
            raise UnsupportedError(f"{type(model).__name__} has other outputs if its lower layers are skipped")
    for row, at in spans_of(batch):
        expected = whole[row, at].float()
        apart = (cache.states[_key(batch, row, at)].to(expected.device).float() - expected).norm(dim=-1)
        if not bool((apart <= CLOSENESS.get(whole.dtype, 1e-4) * expected.norm(dim=-1).clamp(min=1e-6)).all()):
            raise UnsupportedError("kept states differ from those that the model computes in a padded batch")
