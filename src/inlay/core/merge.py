"""Merging an adapter into the base's weights, and undoing it bit for bit."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.adapted_modules import Hosts, hosts_of
from inlay.core.contracts.adapter import Adapter, check_finite
from inlay.core.contracts.pieces import DeltaPiece, PromptPiece
from inlay.core.errors import UnsupportedError, problems
from inlay.core.forward.active_adapters import Merged, Roster, roster_of
from inlay.core.forward.chain import weights
from inlay.core.forward.host import Host
from inlay.core.model.layer import Undo, read_weight, requantise_weight, shape_of, write_weight

TRIAL_ROWS = 4  # rows on which a layer with a forward of its own is tried
# Relative to the output: in half precision, product and bias may be rounded separately or at once.
AGREEMENT = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class MergeReport:
    """How exact a merge was.

    Attributes:
        layers: path → largest absolute rounding error of the merged weight and bias; 0 where the base's dtype holds
            the sum exactly.
        lost: path → norm of that error divided by the norm of the adapter's own change (Frobenius); at 1 the
            rounding is as large as what was learnt.
        untied: whether the input embedding and the output head shared a matrix before and no longer do.
    """

    layers: dict[str, float]
    untied: bool = False
    lost: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        """The largest rounding error of any merged value."""
        return max(self.layers.values(), default=0.0)


def merge(model: nn.Module, name: str, *, requantize: bool = False) -> MergeReport:
    """Merge adapter `name` into the base's weights, in place. The model is then as fast as the base.

    Until `unmerge` the merged adapter is the active one, and choosing another raises.

    The sum is computed in float32 and rounded once to the base's dtype; the report gives the rounding error. A
    quantised layer becomes a dense one.

    Args:
        requantize: keep quantised layers quantised: the sum is rounded to their format, which is less exact.

    Raises:
        AdapterNameError: there is no such adapter.
        UnsupportedError: some piece has no weight with the same effect, some layer computes something other than its
            weight, or another adapter is merged already. The model is unchanged.
    """
    roster = roster_of(model)
    adapter = roster.require(name)
    if roster.merged is not None:
        raise UnsupportedError(f"adapter {roster.merged.name!r} is already merged; call unmerge() first")
    wrong = [
        f"{p.key}: {type(p.prompt if isinstance(p, PromptPiece) else p.delta).__name__} acts on activations"
        for p in adapter.pieces
        if isinstance(p, PromptPiece) or (isinstance(p, DeltaPiece) and not p.delta.merges)
    ]
    if wrong:
        raise UnsupportedError(problems(f"adapter {name!r} ({adapter.method.name}) has no weights to merge", wrong[:8]))
    hosts = hosts_of(model)
    merged_into = [host for host in hosts if host.deltas.get(name)]
    wrong = [
        f"{host.path} ({host.original_class.__name__})" for host in merged_into if not _computes_what_it_holds(host)
    ]
    if wrong:
        raise UnsupportedError(
            problems(
                f"adapter {name!r} cannot be merged: these layers have a forward of their own that computes something "
                "other than their weight; leave the adapter unmerged, or choose other places",
                wrong[:8],
            )
        )
    check_finite([adapter])
    undo: list[Undo] = []
    errors: dict[str, float] = {}
    lost: dict[str, float] = {}
    try:
        with torch.no_grad():
            _merge_parameters(hosts, adapter, undo, errors)
            _merge_deltas(hosts, adapter, undo, errors, lost, requantize)
            untied = _untie(roster, undo)
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    undo.append(functools.partial(setattr, roster, "active", roster.active))
    roster.merged, roster.active = Merged(name, undo), name
    return MergeReport(errors, untied, lost)


def unmerge(model: nn.Module) -> None:
    """Undo the merge: put back the parameters that were there before, bit for bit.

    Raises:
        UnsupportedError: nothing is merged.
    """
    roster = roster_of(model)
    if roster.merged is None:
        raise UnsupportedError("nothing is merged into this model")
    for step in reversed(roster.merged.undo):
        step()
    roster.merged = None


def _merge_deltas(
    hosts: Hosts, adapter: Adapter, undo: list[Undo], errors: dict[str, float], lost: dict[str, float],
    requantize: bool,
) -> None:  # fmt: skip
    for host in hosts:
        placed = host.deltas.get(adapter.name)
        if not placed:
            continue
        before = _wide(read_weight(host.module))
        exact = weights(placed, *before)
        undo.append((requantise_weight if requantize else write_weight)(host.module, *exact))
        rounded = _apart(_wide(read_weight(host.module)), exact)
        errors[host.path] = max((float(part.abs().max()) for part in rounded if part.numel()), default=0.0)
        change = _size(_apart(exact, before))
        lost[host.path] = _size(rounded) / change if change else 0.0


def _computes_what_it_holds(host: Host) -> bool:
    """Whether a layer's forward is that of its known type, or gives the same when tried."""
    module, cls = host.module, host.original_class
    shape = shape_of(module)
    if shape is None or shape.kind not in ("linear", "conv"):  # deltas at an embedding handle its scale themselves
        return True
    known: Any = next(c for c in cls.__mro__ if c in shape_of.registry)
    if host.original_forward is None and cls.forward is known.forward:
        return True
    if shape.kind != "linear":
        return False
    own = host.original_forward or functools.partial(cls.forward, module)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TRIAL_ROWS, shape.in_features, generator=generator).to(shape.device, shape.dtype)
    try:
        with torch.no_grad():
            found, expected = own(x), known.forward(module, x)
    except (RuntimeError, AttributeError, TypeError, IndexError, ValueError):
        return False
    found = found[0] if isinstance(found, tuple) else found
    if type(found) is not Tensor or found.shape != expected.shape or expected.dtype not in AGREEMENT:
        return False
    return bool((found - expected).float().norm() <= AGREEMENT[expected.dtype] * expected.float().norm())


def _wide(layer: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    weight, bias = layer
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide), None if bias is None else bias.to(wide)


def _apart(layer: tuple[Tensor, Tensor | None], other: tuple[Tensor, Tensor | None]) -> list[Tensor]:
    """The differences of weight and bias; a missing bias counts as zero."""
    (weight, bias), (other_weight, other_bias) = layer, other
    apart = [weight - other_weight]
    if bias is not None:
        apart.append(bias if other_bias is None else bias - other_bias)
    return apart


def _size(parts: list[Tensor]) -> float:
    return math.hypot(*(float(part.norm()) for part in parts))


def _merge_parameters(hosts: Hosts, adapter: Adapter, undo: list[Undo], errors: dict[str, float]) -> None:
    """Let differences and copies replace parameters in every module that shares them, so that ties stay."""
    new: dict[int, nn.Parameter] = {}
    for host in hosts:
        names = {**host.differences.get(adapter.name, {}), **host.copies.get(adapter.name, {})}
        for name in names:
            old = host.module._parameters[name]
            assert old is not None
            if id(old) not in new:
                copy = host.copies.get(adapter.name, {}).get(name)
                value = (
                    copy.value
                    if copy is not None
                    else host.differences[adapter.name][name].apply_to(
                        old.to(torch.promote_types(old.dtype, torch.float32))
                    )
                )
                errors[f"{host.path}.{name}"] = _loss(value, old.dtype)
                new[id(old)] = nn.Parameter(value.detach().to(old.dtype), requires_grad=False)
            host.module._parameters[name] = new[id(old)]
            undo.append(functools.partial(_put, host.module, name, old))


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module._parameters[name] = parameter


def _untie(roster: Roster, undo: list[Undo]) -> bool:
    """A head that no longer equals the embedding must not be tied to it again when the model is saved."""
    config: Any = getattr(roster.model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return False
    ends: list[Any] = [getattr(roster.model, f"get_{n}_embeddings", lambda: None)() for n in ("input", "output")]
    if None in ends or ends[0]._parameters.get("weight") is ends[1]._parameters.get("weight"):
        return False
    config.tie_word_embeddings = False
    undo.append(functools.partial(setattr, config, "tie_word_embeddings", True))
    return True


def _loss(exact: Tensor, dtype: torch.dtype) -> float:
    return float((exact.to(dtype).to(exact.dtype) - exact).abs().max()) if exact.numel() else 0.0
