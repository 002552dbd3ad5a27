"""Norm tuning: only the norms' gains and offsets are trained.

Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
arXiv:2312.11420, section 3.

    y = n(x) ∘ (w + Δw) + b + Δb          Δw, Δb (features) start at zero; at every norm of the model

A norm is affine in (w, b), so the trained part is the norm itself with Δw and Δb as its parameters, minus its output
with zero parameters: nothing for LayerNorm and RMSNorm, n(x) for a norm that multiplies by 1 + w (Gemma). The layer's
own class computes it in full precision, and it is added to the base's output, which stays the same to the bit while the
differences are zero. Norms that keep running statistics make the rows of a batch depend on each other and are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from inlay.authoring import Delta, DeltaMethod, Grouped, Kind, Recipe, SelectionError, Site, problems
from inlay.kernels.grouped import stacked
from inlay.methods._twin import twin
from inlay.methods.bitfit import CHANNELS_FIRST


@dataclass(frozen=True, kw_only=True)
class NormTuning(DeltaMethod):
    """Trained differences to the weight and bias of every norm. No hyper-parameters."""

    name: ClassVar[str] = "norm-tuning"
    paper: ClassVar[str] = "arXiv:2312.11420"
    family: ClassVar[str] = "selective"
    table_order: ClassVar[int] = 20
    # As for biases: about 1e5 numbers near one, which need steps ten times those of a low-rank update.
    recipe: ClassVar[Recipe] = Recipe(learning_rate=3e-3)
    default_where: ClassVar[str] = "norms"
    kinds: ClassVar[tuple[Kind, ...]] = ("norm",)

    def build(self, site: Site) -> Delta:
        if site.module._buffers.get("running_mean") is not None:
            raise SelectionError(
                problems(
                    "where",
                    [f"{site.path} keeps running statistics over batches; leave it out, or train it with 'full'"],
                )
            )
        return NormDelta(site)

    @classmethod
    def examples(cls) -> list[NormTuning]:
        return [cls()]


class NormDelta(Delta):
    """Differences to a norm's weight and bias."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.gain = nn.Parameter(site.empty(site.out_features))  # (features)
        self.offset = nn.Parameter(site.empty(site.out_features)) if site.bias else None  # (features)
        names = {"weight": "gain"} | ({"bias": "offset"} if site.bias else {})
        self.norm = twin(site, self, names)
        self.blank = _blank(site)

    def initialise(self, site: Site) -> None:
        for value in (self.gain, self.offset):
            if value is not None:
                nn.init.zeros_(value)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        wide = x.to(self.gain.dtype)
        change = self.norm(wide)
        if self.blank is not None:
            change = change - self.blank(wide)
        out: Tensor = y + change.to(y.dtype)
        return out

    @classmethod
    def grouped(cls, deltas: Sequence[Self], site: Site, dtype: torch.dtype) -> Grouped | None:
        return None if isinstance(site.module, CHANNELS_FIRST) else _Norms(deltas, site)

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.gain, None if bias is None or self.offset is None else bias + self.offset


class _Norms(Grouped):
    """Many adapters' differences at one norm: n(x) ∘ Δw + Δb, with n(x) computed once for each row."""

    def __init__(self, deltas: Sequence[NormDelta], site: Site) -> None:
        dtype = deltas[0].gain.dtype
        self.gain = stacked([d.gain for d in deltas], dtype)[:, None]  # (segments, 1, features)
        offsets = [d.offset for d in deltas if d.offset is not None]
        self.offset = stacked(offsets, dtype)[:, None] if offsets else None
        self.unit, self.blank = _Blank(site, site.device, weight=1.0), deltas[0].blank

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        wide = x.to(self.gain.dtype)
        normal = self.unit(wide) if self.blank is None else self.unit(wide) - self.blank(wide)
        change = normal * self.gain if self.offset is None else torch.addcmul(self.offset, normal, self.gain)
        return y.add_(change.to(y.dtype))

    post_into = post


class _Blank(nn.Module):
    """The norm with zero weight and bias, which move with the model's device and are never stored."""

    def __init__(self, site: Site, device: torch.device, *, weight: float = 0.0) -> None:
        super().__init__()
        zero = torch.zeros(site.out_features, device=device, dtype=site.empty(0).dtype)
        self.register_buffer("gain", zero + weight, persistent=False)
        self.register_buffer("zero", zero, persistent=False)
        self.norm = twin(site, self, {"weight": "gain"} | ({"bias": "zero"} if site.bias else {}))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        return y


def _blank(site: Site) -> _Blank | None:
    """The norm with zero weight and bias, if its output is not zero even then."""
    trial = _Blank(site, torch.device("cpu"))
    probe = torch.linspace(-1, 1, site.in_features, device="cpu", dtype=site.empty(0).dtype)[None]  # (1, features)
    if isinstance(site.module, CHANNELS_FIRST):
        probe = torch.stack([probe, 2 * probe], -1)  # (1, features, 2)
    return _Blank(site, site.device) if bool(trial(probe).any()) else None
