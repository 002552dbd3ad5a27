"""Memory and work of training one method on one base, for any setting, from the base's configuration alone.

Weights and adapter are counted on the whole model, without values. The step is run (`step.py`) on two models with few
layers, and every phase and role is extrapolated by what one more layer adds, so the plan for 80 layers takes as long as
that for 4. If an adapter does not grow evenly with the layers, the step is run on all of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

import inlay.bases  # registers the layer types that can be read  # noqa: F401
from inlay.core.build import build
from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.method import Method
from inlay.core.install import install
from inlay.core.model.select import Places, Where
from inlay.core.model.view import ModelView
from inlay.core.upstream import storage_number
from inlay.kernels.labelled_loss import TRIAL_TOKENS
from inlay.machine.precision import Precision
from inlay.plan.machine import Machine
from inlay.plan.setting import BYTES_PER_WEIGHT, ROLES, Memory, Setting
from inlay.plan.skeleton import Skeleton
from inlay.plan.standins import quantisable
from inlay.plan.step import PHASES, Trace, Trial, trace, trial, warm

FEW_LAYERS = 4
FEW_ROWS = (2, 4)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What training needs.

    Attributes:
        trainable: number of trained values.
        base_parameters: number of parameters of the frozen base.
        memory: memory at the peak of a step.
        phase: the phase of the peak.
        disk_bytes: size of the saved adapter.
        seconds: time of a step on the given machine; None without one.
    """

    method: str
    setting: Setting
    trainable: int
    base_parameters: int
    memory: Memory
    phase: str
    disk_bytes: int
    seconds: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, bytes in whole numbers."""
        speed = self.tokens_per_second
        return {
            "method": self.method,
            "setting": dataclasses.asdict(self.setting),
            "trainable": self.trainable,
            "base_parameters": self.base_parameters,
            "memory_bytes": self.memory.to_dict(),
            "worst_phase": self.phase,
            "disk_bytes": self.disk_bytes,
            "step_seconds": self.seconds,
            "tokens_per_second": None if speed is None else round(speed, 1),
        }

    @property
    def tokens_per_second(self) -> float | None:
        setting = self.setting
        return None if not self.seconds else setting.batch * setting.length * setting.accumulate / self.seconds


class Planner:
    """Makes plans for one method at its places.

    Args:
        where, layers, modules_to_save: as in `attach`.
        machine: the machine to plan for; None estimates no speed.

    Raises (on the first plan):
        SelectionError, UnsupportedError: the method cannot be attached to this base.
    """

    def __init__(
        self, skeleton: Skeleton, method: Method, *, where: Where | None = None, layers: Sequence[int] | None = None,
        modules_to_save: Sequence[str] = (), machine: Machine | None = None, whole: bool = False,
    ) -> None:  # fmt: skip
        self.skeleton, self.method, self.machine, self.whole = skeleton, method, machine, whole or layers is not None
        self._places, self._saved = Places.of(where, layers), tuple(modules_to_save)
        self._attached: dict[tuple[Precision, int | None], _Attached] = {}
        self._traces: dict[tuple[Setting, int | None], Trace] = {}

    def plan(self, setting: Setting, *, by_batch: bool = False) -> Plan:
        """The plan for one setting.

        Args:
            by_batch: extrapolate large batches from small ones, which makes a search faster.
        """
        full = self._model(setting.precision, None)
        sizes, seen = full.sizes, self._seen_by_batch(setting) if by_batch else self._seen(setting)
        trained = sum(p.numel() for p in full.adapter.parameters() if p.requires_grad)
        phase, memory = self._worst(setting, seen, self._weights(setting), sizes.adapter, trained)
        return Plan(
            method=self.method.name,
            setting=setting,
            trainable=trained,
            base_parameters=sizes.base_parameters,
            memory=memory,
            phase=phase,
            disk_bytes=sizes.stored,
            seconds=None if self.machine is None else self.machine.seconds(seen, setting, trained),
        )

    def forget(self) -> None:
        """Free models and traces."""
        self._attached.clear()
        self._traces.clear()

    # -- sizes --------------------------------------------------------------------------------

    def _model(self, precision: Precision, layers: int | None) -> _Attached:
        key = (precision, layers)
        if key not in self._attached:
            model = self.skeleton.build(precision, layers)
            frozen = list(model.parameters())
            method = self.method.foreseen(ModelView(model), self._places)
            adapter = build(model, method, name="planned", places=self._places, modules_to_save=self._saved)
            install(model, adapter, trainable=True)
            self._attached[key] = _Attached(model, adapter, frozen)
        return self._attached[key]

    def _weights(self, setting: Setting) -> float:
        """Bytes of the base, with what is quantised at its bits."""
        full = self._model(setting.precision, None)
        if setting.quantisation is None:
            return full.sizes.weights
        packed = full.linears
        saved = sum(p.numel() * (p.element_size() - BYTES_PER_WEIGHT[setting.quantisation]) for p in packed)
        return full.sizes.weights - saved

    # -- the step -----------------------------------------------------------------------------

    def _seen(self, setting: Setting) -> Trace:
        """The step's trace at the base's depth."""
        depth, period = self.skeleton.layers, self.skeleton.period
        few = max(FEW_LAYERS, 2 * period)
        if self.whole or depth <= few + period or not self._even(setting.precision, few - period, few, depth):
            return self._trace(setting, None)
        first, second = self._trace(setting, few - period), self._trace(setting, few)
        return _extrapolated(first, second, (depth - few) / period)

    def _seen_by_batch(self, setting: Setting) -> Trace:
        if setting.batch <= max(FEW_ROWS):
            return self._seen(setting)
        first, second = (self._seen(replace(setting, batch=rows)) for rows in FEW_ROWS)
        return _extrapolated(first, second, (setting.batch - FEW_ROWS[1]) / (FEW_ROWS[1] - FEW_ROWS[0]))

    def _even(self, precision: Precision, fewer: int, few: int, depth: int) -> bool:
        """Whether every layer adds the same to the adapter, and to the base.

        The base's layers differ where encoder and decoder are not equally deep, or some layers have experts.
        """
        more, rest = few - fewer, depth - few  # layers
        a, b, all_ = (self._model(precision, n).sizes for n in (fewer, few, None))
        a_, b_, base = a.base_parameters, b.base_parameters, all_.base_parameters
        adapter = b.adapter + (b.adapter - a.adapter) * rest / more
        return math.isclose(adapter, all_.adapter, rel_tol=1e-3) and (base - b_) * more == (b_ - a_) * rest

    def _trace(self, setting: Setting, layers: int | None) -> Trace:
        plain = replace(setting, accumulate=1, optimizer_bytes=8.0, padded=setting.padded and setting.batch > 1)
        plain = replace(plain, quantisation=plain.quantisation and "nf4")
        key = (plain, layers)
        if key not in self._traces:
            at = self._model(setting.precision, layers)
            how: dict[str, Any] = {
                "task": self.skeleton.task,
                "gpu": self.machine is not None and self.machine.gpu,
                "quantised": {id(p) for p in at.linears} if setting.quantisation else set(),
            }
            tried = at.trial(plain, how)
            self._traces[key] = trace(at.model, at.adapter, setting, tried=tried, **how)
        return self._traces[key]

    def _worst(self, setting: Setting, seen: Trace, weights: float, adapter: float, trained: int) -> tuple[str, Memory]:
        """The phase that needs most memory, and its memory by role."""
        found: list[tuple[str, Memory]] = []
        for phase in PHASES:
            roles = dict(seen.peaks.get(phase, {}))
            if phase != "trial":
                roles["optimizer"] = trained * setting.optimizer_bytes
                if setting.accumulate > 1:  # the sum of earlier passes is there; a new gradient is added and let go
                    roles["gradients"] = seen.gradients
                    if phase.startswith("backward"):
                        roles["temporary"] = roles.get("temporary", 0.0) + seen.largest_gradient
            found.append((phase, Memory.of({**roles, "weights": weights, "adapter": adapter})))
        return max(found, key=lambda pair: pair[1].total)


class _Sizes(NamedTuple):
    weights: float
    base_parameters: int
    adapter: float
    stored: int


class _Attached:
    """A weightless model with its adapter."""

    def __init__(self, model: Any, adapter: Adapter, frozen: list[nn.Parameter]) -> None:
        self.model, self.adapter = model, adapter
        self._frozen, self._warm = frozen, False
        self._trials: dict[Setting, Trial] = {}

    @cached_property
    def linears(self) -> list[Tensor]:
        """Weights that quantisation takes; what an adapter trains as a copy is left alone."""
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        saved = self.adapter.modules_to_save
        return [
            cast(Tensor, layer._parameters["weight"])
            for path, layer in quantisable(self.model, head)
            if not any(path == s or path.startswith(f"{s}.") for s in saved)
        ]

    def trial(self, setting: Setting, how: Mapping[str, Any]) -> Trial:
        """What the first call needs; afterwards the model is as later steps find it."""
        few = replace(setting, batch=1, length=min(setting.length, TRIAL_TOKENS), padded=False)
        found = self._trials.get(few) or self._trials.get(setting)
        if found is None:
            found = trial(self.model, self.adapter, setting, **how)
            self._trials[few if found.few else setting] = found
        if not self._warm:
            warm(self.model, how["task"])
            self._warm = True
        return found

    @cached_property
    def sizes(self) -> _Sizes:
        own = {id(t) for t in _parts(self.adapter)}
        buffers = [b for b in self.model.buffers() if id(b) not in own]
        tensors = self.adapter.tensors().values()
        return _Sizes(
            weights=_bytes([*self._frozen, *buffers]),
            base_parameters=sum(p.numel() for p in self._frozen),
            adapter=_bytes(_parts(self.adapter)),
            stored=int(sum(t.numel() * t.element_size() for t in tensors)),
        )


def _parts(adapter: Adapter) -> list[Tensor]:
    modules = adapter.modules()
    return [*adapter.parameters(), *(b for m in modules for b in m.buffers())]


def _bytes(tensors: list[Any]) -> float:
    """Of the distinct storages of tensors."""
    storages = {storage_number(s): s for s in (t.untyped_storage() for t in tensors)}
    return float(sum(s.nbytes() for s in storages.values()))


def _extrapolated(first: Trace, second: Trace, times: float) -> Trace:
    """`second` plus `times` what it has more than `first`."""

    def more(a: float, b: float) -> float:
        return b + (b - a) * times

    peaks = {
        phase: {
            role: more(first.peaks.get(phase, {}).get(role, 0.0), second.peaks[phase].get(role, 0.0)) for role in ROLES
        }
        for phase in second.peaks
    }
    return Trace(
        peaks=peaks,
        gradients=more(first.gradients, second.gradients),
        largest_gradient=second.largest_gradient,
        flops=more(first.flops, second.flops),
        bytes_moved=more(first.bytes_moved, second.bytes_moved),
    )
