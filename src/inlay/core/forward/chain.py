"""Several deltas of one adapter at one module: one around the other, or beside one another.

    chain   each delta wraps the layer that the former ones made of the base's; so the last one's `pre` comes first
    fork    branches that all start from the same layer; what each adds to it is weighted and summed

Both views follow: L ← wrap(L) in activations is W ← weight(W) in weights, and the sum of a fork's differences
is the same sum in both. Only where a branch changes what enters the layer, another must not read what leaves it
(`check_fork`), because then the sum of the inputs would be seen by a branch that stands beside it.
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
    """The chain that an adapter's pieces at one module form, from the branches that they name."""
    chain: list[Placed | Fork] = []
    for fork, group in groupby(pieces, lambda p: p.branches[depth].fork if len(p.branches) > depth else None):
        members = list(group)
        if fork is None:
            chain += [(p.site, p.delta) for p in members]
            continue
        branches = []
        for branch, inside in groupby(members, lambda p: p.branches[depth]):
            branches.append((branch.weight, arranged(list(inside), depth + 1)))
        if len(branches) == 1 and branches[0][0] == 1:  # nothing stands beside it
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
    """What enters the module, and what enters each node of the chain on the way there."""
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
    """What leaves a plain linear layer for what enters it, where the chain is one delta that computes both at once."""
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
    """What leaves the module.

    Args:
        seen: from `enter`.
        captured: what entered the modules that feed this one, by path, for the sites that read that.
        owned: whether nobody else holds y, so that it may be written.
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
    """Raise where branches beside one another would not compute what their weights say.

    Raises:
        UnsupportedError: one branch changes what enters the module and another what leaves it.
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
                f"{path}: {names} cannot stand beside one another, because one changes what enters the layer and its "
                "neighbour would see that; let them act one after another with Stack, or give them different places"
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
    """A delta's weight view, on its part of a fused layer where the site is one."""
    if site.part is None:
        return delta.weight(weight, bias)
    part_bias = None if bias is None else site.part.take(bias, 0)
    new, new_bias = delta.weight(site.part.take(weight, 0), part_bias)
    if bias is not None and new_bias is not None:
        bias = site.part.put(bias, new_bias, 0)
    return site.part.put(weight, new, 0), bias
