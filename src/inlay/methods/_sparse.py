"""Shared by sparse methods: checks, which parameters they consider, and the largest entries over all of these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from inlay.authoring import Kind, Method, ModelView, Pattern, Places, SelectionError, frozen, layer_of, select
from inlay.methods._steps import length_of_run
from inlay.methods.full import parameter_names

KINDS: tuple[Kind, ...] = ("linear", "embedding", "conv", "norm")
BLOCKS = "every parameter of the numbered layers"  # `default_where` of these methods


class Sparse(Protocol):
    """The fields that these functions read."""

    @property
    def share(self) -> float: ...
    @property
    def chosen(self) -> Mapping[str, int] | Pattern[int]: ...


def settle(method: Sparse, *checks: tuple[bool, str]) -> None:
    """Turn a frozen method's `chosen` into a tuple and check its share and more; for `__post_init__`."""
    object.__setattr__(method, "chosen", frozen(method.chosen))
    assert isinstance(method, Method)
    method.require((0 < method.share <= 1, f"share is {method.share}, expected above 0 and at most 1"), *checks)


def candidates(view: ModelView, places: Places, *, norms: bool = True) -> list[str]:
    """Names of the parameters of which a sparse method chooses entries.

    By default all parameters of the numbered layers; else those of the layers that the user names, or the parameters
    that the user names in full.

    Args:
        norms: whether to include those of norms.

    Raises:
        SelectionError: there are none.
    """
    names = parameter_names(view)
    if isinstance(places.where, tuple) and set(map(str, places.where)) <= set(names):
        return [n for n in names if n in places.where]
    if places.where is None:
        layers = {n: layer_of(n) for n in names}
        found = [n for n, at in layers.items() if at and (places.layers is None or at[1] in places.layers)]
    else:
        sites = select(view, places, (), KINDS)
        parts = [s.key for s in sites if s.part is not None]
        if parts:
            raise SelectionError(
                f"where: {', '.join(parts[:4])} is a part of a fused matrix, and entries are chosen from whole "
                "parameters; name the layer instead"
            )
        paths = {s.path for s in sites}
        found = [n for n in names if n.rpartition(".")[0] in paths]
    left = [n for n in found if norms or not _of_norm(view, n)]
    if not left:
        raise SelectionError(
            "no parameters to choose entries from: this model has no numbered layers, or they have none, or the ones "
            "named are tied to others; name layers in `where` (inlay's `layers` counts from 0)"
        )
    return left


def _of_norm(view: ModelView, name: str) -> bool:
    site = view.layers.get(name.rpartition(".")[0])
    return site is not None and site.kind == "norm"


def how_many(share: float, parameters: Mapping[str, Tensor]) -> int:
    """The number of entries in a `share` of all, at least one."""
    return max(1, int(share * sum(t.numel() for t in parameters.values())))


def largest(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Name → flat indices, ascending, of the `count` largest scores over all tensors.

    First takes each tensor's own largest, so that no tensor as long as all of them together is formed.
    """
    best = {name: score.flatten().topk(min(count, score.numel())) for name, score in scores.items()}
    together = torch.cat([b.values.cpu() for b in best.values()])
    chosen = torch.zeros(len(together), dtype=torch.bool)
    chosen[together.topk(count).indices] = True
    parts = chosen.split([len(b.values) for b in best.values()])
    return {name: b.indices[part.to(b.indices.device)].sort().values
            for (name, b), part in zip(best.items(), parts, strict=True)}  # fmt: skip


def end_of_first_phase(name: str, share: float, total_steps: int | None) -> int:
    """The step after which the mask is chosen; at least one step comes before and one after it."""
    total = length_of_run(name, total_steps, 2)
    return min(max(1, round(share * total)), total - 1)


def counts(indices: Mapping[str, Tensor]) -> Pattern[int]:
    """Parameter → number of its chosen entries, without parameters that have none."""
    return frozen({name: len(at) for name, at in indices.items() if len(at)})


def chosen_in(view: ModelView, chosen: Pattern[int]) -> list[str]:
    """The names of the parameters of which a finished method has entries, in the order of the model."""
    return [name for name in parameter_names(view) if name in dict(chosen)] if chosen else []
