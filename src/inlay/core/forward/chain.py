"""Several deltas of one adapter at one module: one around the other, or in parallel.

    chain   each delta wraps the layer as the deltas before it left it, so the last one's `pre` runs first
    fork    branches that all start from the same layer; what each adds is weighted and summed

The two views agree: L ← wrap(L) in activations is W ← weight(W) in weights, and the differences of a fork add up the
same way in both. There is one exception: if one branch changes the layer's input, no other branch may read its output
(`check_fork`), because it would see the effect of the changed input.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

from torch import Tensor

from inlay.core.contracts.delta import Delta, says_itself
from inlay.core.contracts.pieces import DeltaPiece
from inlay.core.errors import UnsupportedError
from inlay.core.forward import wrappers
from inlay.core.model.site import Site

Placed: TypeAlias = tuple[Site, Delta]
Chain: TypeAlias = "tuple[Placed | Fork, ...]"


@dataclass(frozen=True, eq=False)
class Fork:
    """Weights and chains of branches that start from the same layer."""

    branches: tuple[tuple[float, Chain], ...]

    @property
    def changes_input(self) -> bool:
        return any(changes_input(chain) for _, chain in self.branches)


def arranged(pieces: Sequence[DeltaPiece], depth: int = 0) -> Chain:
    """The chain of an adapter's pieces at one module, built from the branches that they name."""
    chain: list[Placed | Fork] = []
    for fork, group in groupby(pieces, lambda p: p.branches[depth].fork if len(p.branches) > depth else None):
        members = list(group)
        if fork is None:
            chain += [(p.site, p.delta) for p in members]
            continue
        branches = []
        for branch, inside in groupby(members, lambda p: p.branches[depth]):
            branches.append((branch.weight, arranged(list(inside), depth + 1)))
        if len(branches) == 1 and branches[0][0] == 1:  # there is no other branch
            chain += branches[0][1]
        else:
            chain.append(Fork(tuple(branches)))
    return tuple(chain)


def leaves(chain: Chain) -> Iterator[Placed]:
    """Every delta of a chain with its site, in order."""
    for node in chain:
        if isinstance(node, Fork):
            for _, branch in node.branches:
                yield from leaves(branch)
        else:
            yield node


def changes_input(chain: Chain) -> bool:
    """Whether some delta of the chain changes what enters the module."""
    return any(_reaches_input(site) and type(delta).pre is not Delta.pre for site, delta in leaves(chain))


def enter(chain: Chain, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The module's changed input, and the input of each node of the chain on the way there."""
    seen: list[Tensor] = []
    for node in reversed(chain):
        if isinstance(node, Fork):
            seen.append(x)
            if node.changes_input:
                x = x + sum(weight * (enter(branch, x)[0] - x) for weight, branch in node.branches)
        else:
            site, delta = node
            x = delta.pre(x) if _reaches_input(site) else x
            seen.append(x)
    return x, seen[::-1]


def with_layer(chain: Chain, x: Tensor) -> Tensor | None:
    """The output of a plain linear layer and the chain in one computation, if the chain is one delta that can do so."""
    if len(chain) != 1 or isinstance(chain[0], Fork):
        return None
    site, delta = chain[0]
    kind: Any = type(delta)
    if site.part is not None or site.fed_by or not _computes_layer(kind):
        return None
    return delta.with_layer(x, site)


@functools.cache
def _computes_layer(kind: Any) -> bool:
    return says_itself(kind, "with_layer", "pre", "post", "post_into")


def leave(
    chain: Chain, seen: Sequence[Tensor], captured: Mapping[str, Tensor], y: Tensor, *, owned: bool = False
) -> Tensor:
    """The module's changed output.

    Args:
        seen: the inputs that `enter` returned.
        captured: path → input of the modules that feed this one, for the sites that read them.
        owned: whether nothing else uses y, so that it may be overwritten.
    """
    for node, x in zip(chain, seen, strict=True):
        before = y
        if isinstance(node, Fork):
            if not node.changes_input:
                base = y
                for weight, branch in node.branches:
                    beside = leave(branch, [x] * len(branch), captured, base)
                    y = y + (beside - base if weight == 1 else weight * (beside - base))
            owned = owned or y is not before
            continue
        site, delta = node
        entering = site.entering(x, captured)
        if site.part is None:
            post = delta.post_into if owned and wrappers.enabled("fused-update") else delta.post
            y = post(entering, y, site).to(y.dtype)
        else:
            y = site.part.put(y, delta.post(entering, site.part.take(y), site).to(y.dtype))
        owned = owned or y is not before
    return y


def weights(chain: Chain, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The module's new weight and bias, in canonical layout."""
    for node in chain:
        if isinstance(node, Fork):
            made = [(share, weights(branch, weight, bias)) for share, branch in node.branches]
            new = weight + sum(share * (w - weight) for share, (w, _) in made)
            bias = _summed(bias, [(share, b) for share, (_, b) in made])
            weight = new
        else:
            weight, bias = _weight_of(*node, weight, bias)
    return weight, bias


def check_fork(path: str, chain: Chain) -> None:
    """Raise if parallel branches would compute something other than their weights.

    Raises:
        UnsupportedError: one branch changes the module's input and another its output.
    """
    for node in chain:
        if not isinstance(node, Fork):
            continue
        for _, branch in node.branches:
            check_fork(path, branch)
        placed = list(leaves((node,)))
        entering = [d for s, d in placed if _reaches_input(s) and type(d).pre is not Delta.pre]
        leaving = [d for _, d in placed if type(d).post is not Delta.post]
        linear = all(s.kind in ("linear", "conv", "embedding") for s, _ in placed)
        if entering and (leaving or not linear):
            names = ", ".join(dict.fromkeys(type(d).__name__ for d in (*entering, *leaving)))
            raise UnsupportedError(
                f"{path}: {names} cannot be combined in parallel, because one changes the layer's input and the other "
                "would see the change; put one after the other with Stack, or give them different places"
            )


def _reaches_input(site: Site) -> bool:
    return site.part is None and not site.fed_by


def _summed(bias: Tensor | None, made: Sequence[tuple[float, Tensor | None]]) -> Tensor | None:
    total = bias
    for share, new in made:
        if new is not None:
            change = share * (new if bias is None else new - bias)
            total = change if total is None else total + change
    return total


def _weight_of(site: Site, delta: Delta, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A delta's weight view, applied to its part of the layer if the site is a part of a fused layer."""
    if site.part is None:
        return delta.weight(weight, bias)
    part_bias = None if bias is None else site.part.take(bias, 0)
    new, new_bias = delta.weight(site.part.take(weight, 0), part_bias)
    if bias is not None and new_bias is not None:
        bias = site.part.put(bias, new_bias, 0)
    return site.part.put(weight, new, 0), bias
