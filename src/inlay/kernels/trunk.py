"""Skipping the blocks below the lowest trained piece when their output is known already.

    embeddings → block 0 → … → block d−1 ─┬─▶ block d (trained) → … → head → loss
                                          └─ hidden states: the same in every epoch, as nothing below learns

The stack is cut by class exchange: the blocks below the cut are hosts with the feature ``trunk``. Outside of the
contexts in this file they run as before. Within `recording`, the hidden states after the last of them are recorded;
within `replaying`, all of them return given states instead of computing. The model itself is called as usual, so masks,
positions, heads and losses stay its own. The caller decides where states are cached and for which rows, and checks that
the model gives the same this way (`agrees`).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.adapted_modules import hosts_of
from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.pieces import PromptPiece
from inlay.core.errors import UnsupportedError
from inlay.core.forward.call import cache_among
from inlay.core.forward.host import Host
from inlay.core.model.view import ModelView
from inlay.kernels.dropout import DROPOUTS

FEATURE = "trunk-cache"


@dataclass(frozen=True)
class Cut:
    """Where a model's stack is cut.

    Attributes:
        blocks: paths of the blocks below the cut.
        total: number of blocks in the whole stack.
    """

    blocks: tuple[str, ...]
    total: int

    @property
    def depth(self) -> int:
        return len(self.blocks)


@dataclass
class Asked:
    """What the blocks below the cut should do.

    Attributes:
        cut: the blocks.
        states: the states to return, (rows, tokens, hidden); None means to compute.
        enough: whether the forward ends after the last of them.
        seen: the states after the last of them.
    """

    cut: Cut
    states: Tensor | None = None
    enough: bool = False
    seen: list[Tensor] = field(default_factory=list)


class _Enough(Exception):
    """Ends a forward whose upper part is not needed."""


_ASKED: ContextVar[Asked | None] = ContextVar("inlay_trunk", default=None)
# Model → number of open cuts.
_LISTEN: weakref.WeakKeyDictionary[nn.Module, Counter[str]] = weakref.WeakKeyDictionary()
# Block → how many values it returns besides hidden states (attention weights), which are left out.
_BESIDE: weakref.WeakKeyDictionary[nn.Module, int | None] = weakref.WeakKeyDictionary()


def find_cut(model: nn.Module, adapter: Adapter, batch: dict[str, Any]) -> Cut:
    """The blocks that run before the first trained piece, found by running the model once.

    Args:
        batch: any inputs of the model.

    Raises:
        UnsupportedError: the model or the adapter cannot be cut; the message says why.
    """
    if any(isinstance(piece, PromptPiece) for piece in adapter.pieces):
        raise UnsupportedError(f"{adapter.method.name} has a prompt at every layer, even the lowest")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedError(f"{type(model).__name__} has two stacks of layers; only models with one can be cut")
    blocks = ModelView(model).stack().blocks
    trained = {host.path for host in hosts_of(model) if _acts(host, adapter.name)}
    started, first = _order(model, batch, blocks, trained)
    if tuple(started) != blocks:
        raise UnsupportedError(f"{type(model).__name__} does not run each of its blocks once, one after another")
    inside = next((i for i, b in enumerate(blocks) if first is not None and f"{first[0]}.".startswith(f"{b}.")), None)
    depth = len(blocks) if first is None else first[1] if inside is None else min(inside, first[1])
    if depth == 0:
        raise UnsupportedError(f"{adapter.method.name} trains pieces in the lowest layer or below it")
    return Cut(blocks[:depth], len(blocks))


def _acts(host: Host, name: str) -> bool:
    return any(name in owner for owner in (host.deltas, host.differences, host.copies)) or any(
        name in fed.deltas for fed in host.feeds
    )


def _order(
    model: nn.Module, batch: dict[str, Any], blocks: tuple[str, ...], trained: set[str]
) -> tuple[list[str], tuple[str, int] | None]:
    """The blocks in the order they start, and the first trained module with the number of blocks before it."""
    started: list[str] = []
    first: list[tuple[str, int]] = []
    modules = ModelView(model).modules

    def hook(path: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            if path in trained and not first:
                first.append((path, len(started)))
            if path in blocks:
                started.append(path)

        return note

    handles = [modules[path].register_forward_pre_hook(hook(path)) for path in {*trained, *blocks}]
    try:
        with quietly(model):  # without labels, for which a model may be called twice (`labelled_loss`)
            model(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        for handle in handles:
            handle.remove()
    return started, first[0] if first else None


@contextmanager
def quietly(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """For a block: the model in eval mode (or `training`), no graph, and the random state restored afterwards."""
    before = model.training
    with torch.no_grad(), torch.random.fork_rng():
        model.train(training)
        try:
            yield
        finally:
            model.train(before)


def random_parts(model: nn.Module, cut: Cut) -> list[str]:
    """Paths of what draws random numbers below the cut in training: dropouts and randomly skipped layers."""
    above = ModelView(model).stack().blocks[cut.depth :]
    beside = {n for n, child in model.named_children() if child is not getattr(model, "base_model", model)}
    found = []
    for path, module in ModelView(model).modules.items():
        if any(f"{path}.".startswith(f"{b}.") for b in above) or path.partition(".")[0] in beside:
            continue
        values = {n: v for n, v in vars(module).items() if "drop" in n and isinstance(v, float) and v > 0}
        if values or (isinstance(module, DROPOUTS) and module.p > 0):
            found.append(path or type(module).__name__)
    return found


def open_cut(model: nn.Module, cut: Cut) -> None:
    """Make the blocks below the cut obey `recording` and `replaying`."""
    for path in cut.blocks:
        _LISTEN.setdefault(model, Counter())[path] += 1
        hosts_of(model).grant(path, FEATURE)


def close_cut(model: nn.Module, cut: Cut) -> None:
    """The inverse of `open_cut`."""
    for path in cut.blocks:
        _LISTEN[model][path] -= 1
        if not _LISTEN[model][path]:
            hosts_of(model).revoke(path, FEATURE)


@contextmanager
def recording(cut: Cut) -> Iterator[Asked]:
    """Record the states after the last block below the cut."""
    asked = Asked(cut)
    with _asking(asked):
        yield asked


@contextmanager
def replaying(cut: Cut, states: Tensor) -> Iterator[None]:
    """Let the blocks below the cut return `states`, (rows, tokens, hidden), instead of computing them."""
    with _asking(Asked(cut, states=states)):
        yield


def states_of(model: nn.Module, cut: Cut, batch: dict[str, Tensor], *, training: bool = False) -> Tensor:
    """The states at the cut, (rows, tokens, hidden), without running what lies above it."""
    asked = Asked(cut, enough=True)
    texts = {name: value for name, value in batch.items() if name != "labels"}  # no loss, and no trial of a fast path
    with quietly(model, training=training), _asking(asked):
        try:
            model(**texts)
        except _Enough:
            return asked.seen[-1]
    raise UnsupportedError(f"{type(model).__name__} never reached {cut.blocks[-1]}")


def agrees(model: nn.Module, cut: Cut, batch: dict[str, Tensor]) -> bool:
    """Whether the model's outputs are the same to the bit if the blocks below the cut are skipped."""
    try:
        with quietly(model):
            with recording(cut) as asked:
                expected = model(**batch)
            with replaying(cut, asked.seen[-1]):
                ours = model(**batch)
    except (RuntimeError, AttributeError, TypeError, IndexError, ValueError):
        return False
    return all(torch.equal(ours[name] + 0, expected[name] + 0) for name in ("loss", "logits") if name in expected)


@contextmanager
def _asking(asked: Asked) -> Iterator[None]:
    token = _ASKED.set(asked)
    try:
        yield
    finally:
        _ASKED.reset(token)


def trunk(host: Host, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The forward of a block below the cut."""
    asked = None if torch.compiler.is_compiling() else _ASKED.get()
    if asked is None or host.path not in asked.cut.blocks:  # it belongs to another run on the same base
        return inner(*args, **kwargs)
    entering = args[0] if args else next(iter(kwargs.values()))
    # A trial may call the model with a part of the batch; that part is computed.
    whole = asked.states is not None and asked.states.shape[:2] == entering.shape[:2]
    if whole and cache_among((*args, *kwargs.values())) is None:
        beside = _BESIDE.get(host.module)
        return asked.states if beside is None else (asked.states, *[None] * beside)
    out = inner(*args, **kwargs)
    _BESIDE[host.module] = len(out) - 1 if isinstance(out, tuple) else None
    if host.path == asked.cut.blocks[-1]:
        asked.seen.append((out[0] if isinstance(out, tuple) else out).detach())
        if asked.enough:
            raise _Enough
    return out
