"""The settings that are planned, and the memory by role that comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from inlay.core.errors import ConfigError
from inlay.machine.precision import Precision

Quantisation: TypeAlias = Literal["nf4", "fp4", "int8", "torchao-int8", "torchao-int4"]

BYTES: Mapping[Precision, int] = {"fp32": 4, "bf16": 2, "fp16": 2}
# Bytes a weight. 4 bits and one float32 in a block of 64; with double quantisation that float is kept in 8 bits,
# with a float32 of its own for every 256 of them (QLoRA, arXiv:2305.14314, §3: 0.127 bits a weight). torchao's int4
# has two bfloat16 for every 64 weights; the constants of a row of 8-bit weights are not counted.
BYTES_PER_WEIGHT: Mapping[Quantisation, float] = {
    "nf4": (4 + 8 / 64 + 32 / (64 * 256)) / 8,
    "fp4": (4 + 8 / 64 + 32 / (64 * 256)) / 8,
    "int8": 1.0,
    "torchao-int8": 1.0,
    "torchao-int4": (4 + 32 / 64) / 8,
}
ROLES = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "temporary")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a step is run.

    Attributes:
        precision: precision of the base's weights; if they are quantised, of computation.
        quantisation: format of the linear layers in the base's blocks; None means not quantised.
        checkpointing: whether layers store only their input and recompute the rest in the backward pass.
        batch: rows in a forward pass.
        length: tokens in each row.
        accumulate: forward passes in a step.
        padded: whether rows have different lengths, so that masks are needed; a single row never does.
        optimizer_bytes: bytes of optimizer state for each trained value; AdamW has two in float32.
    """

    precision: Precision = "bf16"
    quantisation: Quantisation | None = None
    checkpointing: bool = False
    batch: int = 1
    length: int = 512
    accumulate: int = 1
    padded: bool = True
    optimizer_bytes: float = 8.0

    def __post_init__(self) -> None:
        for name in ("batch", "length", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected at least 1")

    @property
    def weights(self) -> str:
        """The format of the base's weights."""
        return self.quantisation or self.precision


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes in use at the peak of a step, by role.

    Attributes:
        weights: the frozen base, its buffers included.
        adapter: everything an adapter stores, trained or not.
        gradients, optimizer: gradients and optimizer state of what is trained.
        activations: tensors made in the forward pass and needed in the backward pass.
        logits: tensors of the output head and the loss.
        temporary: tensors made and freed within an operation or a layer.
    """

    weights: float = 0.0
    adapter: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    temporary: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(getattr(self, role) for role in ROLES))

    @classmethod
    def of(cls, values: Mapping[str, float]) -> Memory:
        return cls(**{role: max(0.0, values.get(role, 0.0)) for role in ROLES})

    def to_dict(self) -> dict[str, Any]:
        """Whole bytes by role, and their ``total``."""
        return {role: round(value) for role, value in dataclasses.asdict(self).items()} | {"total": round(self.total)}
