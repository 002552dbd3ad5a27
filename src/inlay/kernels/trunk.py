"""Blocks below the lowest trained piece are passed over where what leaves them is known already.

    embeddings → block 0 → … → block d−1 ─┬─▶ block d (trained) → … → head → loss
                                          └─ hidden states: the same in every epoch, as nothing below learns

The stack is cut by class exchange: the blocks below the cut are hosts with the feature ``trunk``. Outside of the
contexts here they are as they were. Inside of `recording` the states behind the last of them are noted; inside of
`replaying` all of them hand over given states instead of computing. The model itself is called as ever, so
masks, positions, heads and losses stay its own. Where states are kept, for which rows, and that a model does give
the same on this way (`agrees`), is the caller's matter.
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

from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.pieces import PromptPiece
from inlay.core.errors import UnsupportedError
from inlay.core.forward.call import cache_among
from inlay.core.forward.host import Host
from inlay.core.hosts import hosts_of
from inlay.core.model.view import ModelView

FEATURE = "trunk-cache"
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Cut:
    """Where a model's stack is cut.

    Attributes:
        blocks: paths of the blocks below.
        total: blocks of the whole stack.
    """

    blocks: tuple[str, ...]
    total: int

    @property
    def depth(self) -> int:
        return len(self.blocks)


@dataclass
class Asked:
    """What the blocks below the cut are to do.

    Attributes:
        cut: says which blocks.
        states: what they hand over, (rows, tokens, hidden); None is to compute.
        enough: whether the forward ends behind the last of them.
        seen: the states that left the last one.
    """

    cut: Cut
    states: Tensor | None = None
    enough: bool = False
    seen: list[Tensor] = field(default_factory=list)


class _Enough(Exception):
    """Ends a forward whose upper part nobody needs."""


_ASKED: ContextVar[Asked | None] = ContextVar("inlay_trunk", default=None)
# Model → how many cuts a block listens for.
_LISTEN: weakref.WeakKeyDictionary[nn.Module, Counter[str]] = weakref.WeakKeyDictionary()
# How many things a block was seen to return beside hidden states; what they were (attention weights) is left out.
_BESIDE: weakref.WeakKeyDictionary[nn.Module, int | None] = weakref.WeakKeyDictionary()


def find_cut(model: nn.Module, adapter: Adapter, batch: dict[str, Any]) -> Cut:
    """The blocks that run before the first trained piece, found by running the model once.

    Args:
        batch: any inputs of the model.

    Raises:
        UnsupportedError: a model or an adapter that cannot be cut; it says why.
    """
    if any(isinstance(piece, PromptPiece) for piece in adapter.pieces):
        raise UnsupportedError(f"{adapter.method.name} puts a prompt in front of every layer, the lowest included")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedError(f"{type(model).__name__} has two stacks; a trunk is cut in models that have one")
    blocks = ModelView(model).stack().blocks
    trained = {host.path for host in hosts_of(model) if _acts(host, adapter.name)}
    started, first = _order(model, batch, blocks, trained)
    if tuple(started) != blocks:
        raise UnsupportedError(f"{type(model).__name__} does not run its blocks once each, one after another")
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
    """The blocks as they start, and the first trained module with the number of blocks started before it."""
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
        with quietly(model):  # without labels, which a model may be called twice for (`labelled_head`)
            model(**{name: value for name, value in batch.items() if name != "labels"})
    finally:
        for handle in handles:
            handle.remove()
    return started, first[0] if first else None


@contextmanager
def quietly(model: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Run a model, in evaluation unless told otherwise, without a graph and without a trace in the random state."""
    before = model.training
    with torch.no_grad(), torch.random.fork_rng():
        model.train(training)
        try:
            yield
        finally:
            model.train(before)


def random_parts(model: nn.Module, cut: Cut) -> list[str]:
    """What draws random numbers below the cut while training: dropouts and skipped layers, by path."""
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
    """Make the blocks below the cut listen to the contexts here."""
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
    """Note the states that leave the last block below the cut."""
    asked = Asked(cut)
    with _asking(asked):
        yield asked


@contextmanager
def replaying(cut: Cut, states: Tensor) -> Iterator[None]:
    """Let the blocks below the cut hand over `states`, (rows, tokens, hidden), in the place of their own."""
    with _asking(Asked(cut, states=states)):
        yield


def states_of(model: nn.Module, cut: Cut, batch: dict[str, Tensor], *, training: bool = False) -> Tensor:
    """The states behind the cut, (rows, tokens, hidden), without running what lies above it."""
    asked = Asked(cut, enough=True)
    texts = {name: value for name, value in batch.items() if name != "labels"}  # no loss, and no trial of its paths
    with quietly(model, training=training), _asking(asked):
        try:
            model(**texts)
        except _Enough:
            return asked.seen[-1]
    raise UnsupportedError(f"{type(model).__name__} never reached {cut.blocks[-1]}")


def agrees(model: nn.Module, cut: Cut, batch: dict[str, Tensor]) -> bool:
    """Whether a model's outputs come out bit for bit the same where its blocks below the cut are passed over."""
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
    if asked is None or host.path not in asked.cut.blocks:  # another run on the same base has another cut
        return inner(*args, **kwargs)
    entering = args[0] if args else next(iter(kwargs.values()))
    # Who only tries something may call the model with a part of the batch; that part is computed.
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
