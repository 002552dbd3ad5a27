"""LoftQ's delta: a backbone Q that replaces the base's own weight, and a low-rank pair beside it.

h = W x + (Q − W) x + s B A x          Q is unpacked from codes when needed, never stored
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from inlay.authoring import ConfigError, Originals, Site, problems, stored_whole
from inlay.kernels.low_rank import applies
from inlay.kernels.normal_float import dequantise, made_again_linear, quantise, sizes
from inlay.methods._low_rank import LowRank
from inlay.methods.pissa import principal


@dataclass(frozen=True)
class Alternation:
    """How Q, A and B are found at a layer.

    Attributes:
        scale: factor on the product B A.
        bits: bits of Q; None takes the codes of the quantised base as Q.
        iterations: rounds of the alternation; 0 is plain quantisation, with LoRA's own start.
        niter: power iterations of a randomised decomposition; None computes it exactly.
    """

    rank: int
    scale: float
    bits: int | None
    iterations: int
    niter: int | None


class Backbone(LowRank):
    """At a linear layer.

    Buffers: ``codes`` (bytes) and ``constants`` (blocks) of Q, absent if Q is the base's own; ``errors`` (2):
    ‖W − q(W)‖ and ‖W − Q − s B A‖ at the start, divided by ‖W‖.
    """

    def __init__(self, site: Site, plan: Alternation, dropout: float) -> None:
        super().__init__(site, plan.rank, plan.scale, dropout)
        wrong = []
        if plan.rank > min(site.in_features, site.out_features):
            wrong.append(f"rank is {plan.rank}, larger than a side of {site.key}: lower it, or leave the layer out")
        if plan.bits is None and stored_whole(site.module):
            wrong.append(f"bits is None, but {site.key} is not quantised, so it has no codes to take: give bits 4 or 2")
        if wrong:
            raise ConfigError(problems("method 'loftq'", wrong))
        self.site, self.plan = site, plan
        self.originals = Originals("")
        self.register_buffer("errors", site.empty(2))
        self.errors: Tensor
        if plan.bits is not None:
            length, blocks = sizes(site.in_features * site.out_features, plan.bits)
            self.register_buffer("codes", torch.empty(length, dtype=torch.uint8, device=site.device))
            self.register_buffer("constants", site.empty(blocks))
            self.codes: Tensor
            self.constants: Tensor

    def initialise(self, site: Site) -> None:
        plan, weight = self.plan, self.originals.weight(site).to(self.a.dtype)
        super().initialise(site)  # LoRA's start: B A is zero
        low, least, plain = torch.zeros_like(weight), torch.inf, 0.0
        for step in range(max(1, plan.iterations)):
            codes, constants, q = self._quantised(weight - low)
            if step == 0:
                plain = float((weight - q).norm())
            a, b = self.a.data, self.b.data
            if plan.iterations or plan.bits is None:
                a, b = principal(weight - q, rank=plan.rank, scale=plan.scale, niter=plan.niter)
            low = plan.scale * (b @ a)
            error = float((weight - q - low).norm())
            if error < least:
                least = error
                self._keep(a, b, codes, constants)
            if plan.bits is None:
                break  # the base's own codes do not change, so the first decomposition is the best
        length = max(float(weight.norm()), torch.finfo(weight.dtype).tiny)
        self.errors.copy_(torch.tensor([plain / length, least / length]))

    def _quantised(self, weight: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        if self.plan.bits is None:
            return None, None, self.site.read_weight()[0].to(weight.dtype)
        codes, constants = quantise(weight, self.plan.bits)
        return codes, constants, dequantise(codes, constants, self.plan.bits, tuple(weight.shape)).to(weight.dtype)

    def _keep(self, a: Tensor, b: Tensor, codes: Tensor | None, constants: Tensor | None) -> None:
        self.a.copy_(a)
        self.b.copy_(b)
        if codes is not None and constants is not None:
            self.codes.copy_(codes)
            self.constants.copy_(constants)

    def backbone(self) -> Tensor:
        """Q, (out, in), in float32."""
        if self.plan.bits is None:
            return self.site.read_weight()[0].float()
        shape = (self.site.out_features, self.site.in_features)
        return dequantise(self.codes, self.constants, self.plan.bits, shape)

    def shift(self, like: Tensor) -> Tensor:
        """Q − W in the dtype of `like`."""
        weight = self.site.read_weight()[0].detach()
        return (self.backbone().to(weight.device) - weight.to(self.a.dtype)).to(like.dtype)

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return super().post(x, self._moved(x, y), site)

    def post_into(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        if not applies(
            x, y, self.dropout if self.training else 0.0
        ):  # then the parent calls `post`, which adds the shift too
            return self.post(x, y, site)
        return super().post_into(x, self._moved(x, y), site)

    def _moved(self, x: Tensor, y: Tensor) -> Tensor:
        return y if self.plan.bits is None else y + made_again_linear(x, lambda: self.shift(x))

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        moved = weight if self.plan.bits is None else weight + self.shift(self.a).to(weight.device)
        return super().weight(moved, bias)
