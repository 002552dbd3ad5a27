"""Which base an adapter belongs to: a digest that survives a change of precision, not of weights.

Names and shapes of the base's parameters are hashed whole. Values are sampled (at most 64 a parameter, evenly
spread) and rounded to bfloat16, so the same checkpoint loaded in another precision is the same base; the layers
that 4-bit stores replace are hashed apart and compared only where both sides are dense.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.view import ModelView

SAMPLES = 64


@dataclass(frozen=True)
class Fingerprint:
    """Digests of a base.

    Attributes:
        structure: of names and shapes.
        vectors: of the values of embeddings, norms and biases.
        matrices: of the values of the other weights, or None where some are not dense.
    """

    structure: str
    vectors: str
    matrices: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Fingerprint:
        return Fingerprint(str(values["structure"]), str(values["vectors"]), values.get("matrices"))

    def differences(self, other: Fingerprint) -> list[str]:
        """What tells the two bases apart; empty where they are the same."""
        found = []
        if self.structure != other.structure:
            return ["its layers have other names or shapes"]
        if self.vectors != other.vectors:
            found.append("its embeddings, norms or biases have other values")
        if None not in (self.matrices, other.matrices) and self.matrices != other.matrices:
            found.append("its weight matrices have other values")
        return found


def fingerprint(model: nn.Module, *, without: Collection[str] = ()) -> Fingerprint:
    """The fingerprint of a base, adapters left out.

    Args:
        without: full names of parameters that adapters own copies of: a head that is made afresh each time
            the base is loaded says nothing about the base.
    """
    structure, vectors, matrices = hashlib.sha256(), hashlib.sha256(), hashlib.sha256()
    dense = True
    for path, module in sorted(ModelView(model).modules.items()):
        for name, value in sorted(module._parameters.items()):
            full = f"{path}.{name}" if path else name
            if value is None or full in without:
                continue
            if not value.is_floating_point():
                dense = False
                structure.update(f"{full} packed\n".encode())
                continue
            structure.update(f"{full} {tuple(value.shape)}\n".encode())
            (vectors if value.ndim == 1 or isinstance(module, nn.Embedding) else matrices).update(_sample(value))
    return Fingerprint(structure.hexdigest(), vectors.hexdigest(), matrices.hexdigest() if dense else None)


def _sample(value: Tensor) -> bytes:
    flat = value.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLES)
    return flat[::step][:SAMPLES].to(torch.bfloat16).contiguous().cpu().view(torch.uint8).numpy().tobytes()
