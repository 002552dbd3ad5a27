"""Combining several adapters of a model into a new one that computes their weighted sum, exactly or approximately.

                 factors (LoRA)                  linear parameters ((IA)³, BitFit)        the rest (DoRA)
    concatenate  exact, ranks add up             exact                                    refused
    svd          to a rank, through QR           to a rank, dense                         to a rank, dense
    magnitude, dare, ties, dare-ties
                 on the change, then to a rank   on the parameters                        as for factors

The new adapter is a LoRA whose rank may differ from site to site, or has the combined adapters' own method; differences
to the base's parameters that have different structures become one sparse difference. A single adapter with weight −1 is
negated: task arithmetic, Ilharco et al. 2022, arXiv:2212.04089.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from inlay.arithmetic import numbers
from inlay.arithmetic.differences import as_sparse, only_differences, parameters_of
from inlay.arithmetic.effects import base_value, change, check_has_weights, factors_of
from inlay.arithmetic.low_rank import Factors, compress, concatenate, factorise
from inlay.arithmetic.report import CombineReport, SiteError, relative
from inlay.arithmetic.sparse import SPARSE, Sparse, Sparsifier
from inlay.core.build import build, check_free, initialise
from inlay.core.contracts.adapter import Adapter, check_finite
from inlay.core.contracts.pieces import DeltaPiece, Piece
from inlay.core.contracts.site_pattern import pinned
from inlay.core.errors import ConfigError, UnsupportedError, nearest, problems
from inlay.core.forward.active_adapters import roster_of
from inlay.core.install import install
from inlay.core.model.select import Places
from inlay.methods.lora import LoRA

How = Literal["concatenate", "svd"] | Sparse
HOWS: tuple[str, ...] = ("concatenate", "svd", *SPARSE)
LINEAR = 1e-3  # relative; the precision that float32 leaves of (IA)³'s distance from one


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """The adapters, their weights, and how to combine them."""

    model: nn.Module
    adapters: Sequence[Adapter]
    weights: Sequence[float]
    name: str
    how: str
    rank: int | None
    density: float
    seed: int


def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    *,
    name: str,
    how: How = "concatenate",
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> CombineReport:
    """Attach a new adapter that is the weighted sum of others. It becomes active, and is frozen like a loaded one.

    Args:
        weights: adapter → weight, of either sign. Copies of whole modules (heads) are summed as differences to the
            base.
        name: name of the new adapter.
        how: ``concatenate`` is exact; ``svd`` is the best approximation of a given rank; ``magnitude``, ``dare``,
            ``ties`` and ``dare-ties`` drop entries before summing (`sparse.py`).
        rank: rank of the result's factors at each site; None is the largest of the combined adapters' there.
        density: share of the entries that the sparse ways keep.
        seed: seed of DARE's draw.

    Returns:
        The relative error at each site against the exact weighted sum.

    Raises:
        AdapterNameError: an adapter does not exist, or the name is taken.
        UnsupportedError: an adapter has no weight view or values that are not finite, or no adapter can represent the
            sum.
        ConfigError: an option is out of range. Whatever is raised, the model is unchanged.
    """
    roster = roster_of(model)
    _check(weights, how, rank)
    check_free(model, name)  # before anything expensive
    adapters = [roster.require(n) for n in weights]
    check_has_weights(adapters)
    check_finite(adapters)
    asked = _Asked(
        model=model, adapters=adapters, weights=list(weights.values()), name=name, how=how, rank=rank,
        density=density, seed=seed,
    )  # fmt: skip
    with torch.no_grad():
        adapter, sites = _made(asked)
        _copies(asked, adapter)
    install(model, adapter, trainable=False)
    return CombineReport(name=name, method=adapter.method.name, how=how, sites=sites)


def _check(weights: Mapping[str, float], how: str, rank: int | None) -> None:
    wrong = [f"the weight of {n!r} is {w}, expected a number" for n, w in weights.items() if not abs(w) < float("inf")]
    if not weights:
        wrong.append("no adapter was given")
    if how not in HOWS:
        wrong.append(f"how={how!r} is unknown{nearest(how, HOWS)}")
    if rank is not None and rank < 1:
        wrong.append(f"rank is {rank}, expected at least 1")
    if rank is not None and how == "concatenate":
        wrong.append("concatenation keeps every rank; leave rank out, or choose how='svd'")
    if wrong:
        raise ConfigError(problems("combine", wrong))


def _made(asked: _Asked) -> tuple[Adapter, dict[str, SiteError]]:
    if _all_factored(asked):
        return _in_factors(asked)
    found = _in_numbers(asked)
    if found is None and asked.how != "svd" and only_differences(asked.adapters):
        found = _in_entries(asked)
    return found or _in_factors(asked)


def _all_factored(asked: _Asked) -> bool:
    return all(isinstance(p, DeltaPiece) and factors_of(p.delta) for a in asked.adapters for p in a.pieces)


def _in_numbers(asked: _Asked) -> tuple[Adapter, dict[str, SiteError]] | None:
    """The sum as an adapter of the same method; None if its effect would not be the sum of theirs."""
    if asked.how == "svd" or not numbers.alike(asked.adapters):
        return None
    first = asked.adapters[0]
    saved = {path: None for a in asked.adapters for path in a.modules_to_save}
    target = build(asked.model, first.method, name=asked.name, places=first.places, modules_to_save=list(saved))
    if [p.key for p in target.pieces] != [p.key for p in first.pieces]:
        return None
    with torch.random.fork_rng():
        initialise(asked.model, target)
    start = {n: t.double() for n, t in numbers.numbers(target).items()}
    moves = [{n: t.double() - start[n] for n, t in numbers.numbers(a).items()} for a in asked.adapters]
    frozen = numbers.buffers(first)
    exact = {n: t + sum(w * m[n] for w, m in zip(asked.weights, moves, strict=True)) for n, t in start.items()}
    numbers.fill(target, exact, frozen)
    sites = _errors(asked, target)
    if max((e.frobenius for e in sites.values()), default=0.0) > LINEAR:
        return None
    if asked.how == "concatenate":
        return target, sites
    sparse = _sparsifier(asked, [m.__getitem__ for m in moves], list(start))
    numbers.fill(target, {n: t + sparse(n) for n, t in start.items()}, frozen)
    return target, _errors(asked, target)


def _in_entries(asked: _Asked) -> tuple[Adapter, dict[str, SiteError]]:
    """The sum as a sparse difference to the base's parameters."""
    by_key = [{p.key: p for p in a.pieces} for a in asked.adapters]
    names = parameters_of(asked.model, asked.adapters)

    def read(places: Mapping[str, Piece], key: str) -> Tensor:
        return change(places[key], asked.model)[0] if key in places else torch.zeros_like(base_value(asked.model, key))

    exact = {n: torch.stack([w * read(p, n) for w, p in zip(asked.weights, by_key, strict=True)]).sum(0) for n in names}
    made = exact
    if asked.how in SPARSE:
        sparse = _sparsifier(asked, [partial(read, places) for places in by_key], names)
        made = {n: sparse(n) for n in names}
    saved = {path: None for a in asked.adapters for path in a.modules_to_save}
    target = as_sparse(asked.model, made, asked.name, list(saved))
    return target, {n: SiteError(frobenius=relative(made[n].float().double() - exact[n], exact[n])) for n in names}


def _in_factors(asked: _Asked) -> tuple[Adapter, dict[str, SiteError]]:
    """The sum as a LoRA adapter, whose rank may differ from site to site."""
    by_key = [{p.key: p for p in a.pieces} for a in asked.adapters]
    pieces = {key: piece for places in by_key for key, piece in places.items()}
    _check_factored(asked, by_key)
    order = list(pieces)
    sparse = None
    if asked.how in SPARSE:
        order = _model_order(asked, pieces)
        reads = [lambda key, p=places: _dense(asked, p.get(key), pieces[key]) for places in by_key]
        sparse = _sparsifier(asked, reads, order)
    found: dict[str, Factors] = {}
    sites: dict[str, SiteError] = {}
    for key in order:
        there = [(w, places[key]) for w, places in zip(asked.weights, by_key, strict=True) if key in places]
        found[key], sites[key] = _at_site(asked, key, there, sparse)
    target = _lora(asked, found, pieces)
    return target, sites


def _at_site(
    asked: _Asked, key: str, there: Sequence[tuple[float, Piece]], sparse: Sparsifier | None
) -> tuple[Factors, SiteError]:
    weights = [w for w, _ in there]
    parts = [factors_of(p.delta) for _, p in there if isinstance(p, DeltaPiece)]
    factored = [p for p in parts if p is not None]
    if len(factored) == len(there) and sparse is None:
        exact = concatenate(factored, weights)
        if asked.how == "concatenate":
            return exact, SiteError(frobenius=0.0, spectral=0.0, rank=exact.rank)
        return compress(exact, asked.rank or max(f.rank for f in factored))
    total = torch.stack([w * _flat(change(p, asked.model)[0]) for w, p in there]).sum(0)
    rank = asked.rank or max((f.rank for f in factored), default=0)
    made = factorise(total if sparse is None else sparse(key), rank)
    return made, SiteError(frobenius=relative(made.dense() - total, total), rank=made.rank)


def _check_factored(asked: _Asked, by_key: Sequence[Mapping[str, Piece]]) -> None:
    """Raise one error that lists everything a LoRA adapter cannot represent."""
    wrong: dict[str, None] = {}
    for adapter, places in zip(asked.adapters, by_key, strict=True):
        who = f"{adapter.name!r} ({adapter.method.name})"
        for piece in places.values():
            if not isinstance(piece, DeltaPiece) or piece.site.kind not in LoRA.kinds:
                wrong[f"{who} changes {piece.key}, which low-rank factors cannot represent"] = None
                continue
            if factors_of(piece.delta) is not None:
                continue
            if asked.how == "concatenate":
                wrong[f"{who} has no factors to concatenate; give how='svd' and a rank"] = None
            elif asked.rank is None:
                wrong[f"{who} has no rank of its own; give one"] = None
            bias = change(piece, asked.model)[1]
            if bias is not None and bool((bias != 0).any()):
                wrong[f"{who} changes the bias of {piece.key}, which low-rank factors cannot represent"] = None
    if wrong:
        raise UnsupportedError(problems("these adapters cannot become one LoRA adapter", list(wrong)[:8]))


def _lora(asked: _Asked, found: Mapping[str, Factors], pieces: Mapping[str, Piece]) -> Adapter:
    """A LoRA adapter with these factors, at scale 1."""
    ranks = {key: factors.rank for key, factors in found.items()}
    most = max(ranks.values())
    varied = pinned(ranks, most)
    method = LoRA(
        rank=most, alpha=float(most), rank_pattern=varied, alpha_pattern={k: float(r) for k, r in varied.items()}
    )
    saved = {path: None for a in asked.adapters for path in a.modules_to_save}
    target = build(
        asked.model, method, name=asked.name, places=Places.of(list(found), None), modules_to_save=list(saved)
    )
    if {p.key for p in target.pieces} != set(found):
        raise UnsupportedError("one module's name is also the end of another's, so the adapter's places are ambiguous")
    for piece, module in zip(target.pieces, target.modules(), strict=True):
        values = dict(module.named_parameters())
        left, right = found[piece.key]
        values["a"].copy_(right.reshape(values["a"].shape))
        values["b"].copy_(left)
    return target


def _copies(asked: _Asked, target: Adapter) -> None:
    """Fill copies of whole modules: the base's values plus the weighted sum of the adapters' differences to them."""
    for full, value in target.copies.items():
        base = base_value(asked.model, full)
        total = base
        for weight, adapter in zip(asked.weights, asked.adapters, strict=True):
            if full in adapter.copies:
                total = total + weight * (adapter.copies[full].double() - base)
        value.copy_(total)


def _errors(asked: _Asked, target: Adapter) -> dict[str, SiteError]:
    """The error of an adapter's effect against the weighted sum of effects, weight and bias together."""
    found = {}
    for place, piece in enumerate(target.pieces):
        mine = _whole(change(piece, asked.model))
        theirs = [_whole(change(a.pieces[place], asked.model)) for a in asked.adapters]
        exact = torch.stack([w * t for w, t in zip(asked.weights, theirs, strict=True)]).sum(0)
        found[piece.key] = SiteError(frobenius=relative(mine - exact, exact))
    return found


def _sparsifier(asked: _Asked, reads: Sequence[object], keys: Sequence[str]) -> Sparsifier:
    how: Sparse = asked.how  # type: ignore[assignment]
    return Sparsifier(how, reads, asked.weights, keys, asked.density, asked.seed)  # type: ignore[arg-type]


def _dense(asked: _Asked, piece: Piece | None, like: Piece) -> Tensor:
    """An adapter's change at a site; zero if it has none."""
    if piece is None:
        return torch.zeros_like(_flat(change(like, asked.model)[0]))
    return _flat(change(piece, asked.model)[0])


def _flat(weight: Tensor) -> Tensor:
    return weight.flatten(1)


def _whole(both: tuple[Tensor, Tensor | None]) -> Tensor:
    weight, bias = both
    return weight.reshape(-1) if bias is None else torch.cat([weight.reshape(-1), bias])


def _model_order(asked: _Asked, pieces: Mapping[str, Piece]) -> list[str]:
    """Keys in the order of the model, so that a draw does not depend on the order of the adapters."""
    places = {path: i for i, (path, _) in enumerate(asked.model.named_modules())}
    return sorted(pieces, key=lambda key: (places[key.partition(":")[0]], key))
