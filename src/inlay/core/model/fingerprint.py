"""Which base an adapter belongs to: a digest that survives a change of precision, not of weights.

All names and shapes of the base's parameters are hashed. Values are sampled (at most 64 of a parameter, evenly spread)
and rounded to bfloat16, so that the same checkpoint loaded in another precision is the same base. A quantised weight is
hashed with the shape of the weight it stands for; its stored values go into a hash of their own, which is compared only
between bases of the same quantisation. So an adapter trained on a 4-bit base can be loaded on the dense base it was
made from, and the other way round; embeddings, norms and biases tell it from other bases.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.model.layer import shape_of, store_of
from inlay.core.model.view import ModelView

SAMPLES = 64


@dataclass(frozen=True)
class Fingerprint:
    """Digests of a base.

    Attributes:
        structure: digest of names and shapes.
        vectors: digest of the values of embeddings, norms and biases.
        matrices: digest of the values of the other weights; None if some are quantised.
        quantised: the formats of the quantised weights and a digest of what they store; None if there are none.
    """

    structure: str
    vectors: str
    matrices: str | None
    quantised: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Fingerprint:
        stored = values.get("matrices"), values.get("quantised")
        return Fingerprint(str(values["structure"]), str(values["vectors"]), *stored)

    def differences(self, other: Fingerprint) -> list[str]:
        """In what the two bases differ; empty if they are the same."""
        found = []
        if self.structure != other.structure:
            return ["its layers have other names or shapes"]
        if self.vectors != other.vectors:
            found.append("its embeddings, norms or biases have other values")
        if None not in (self.matrices, other.matrices) and self.matrices != other.matrices:
            found.append("its weight matrices have other values")
        formats = [None if q is None else q.partition(" ")[0] for q in (self.quantised, other.quantised)]
        if formats[0] is not None and formats[0] == formats[1] and self.quantised != other.quantised:
            found.append(f"its quantised weights ({formats[0]}) have other values")
        return found


def fingerprint(model: nn.Module, *, without: Collection[str] = ()) -> Fingerprint:
    """The fingerprint of a base, adapters left out.

    Args:
        without: full names of parameters of which adapters own copies. A head that is drawn anew each time the
            base is loaded does not identify the base.
    """
    structure, vectors, matrices, packed = (hashlib.sha256() for _ in range(4))
    formats: set[str] = set()
    for path, module in sorted(ModelView(model).modules.items()):
        store, shape = store_of(module), shape_of(module)
        for name, value in sorted(module._parameters.items()):
            full = f"{path}.{name}" if path else name
            if value is None or full in without:
                continue
            if name == "weight" and store is not None and shape is not None:
                formats.add(store.name)
                size = (shape.out_features, shape.in_features)
                if getattr(getattr(module, "source_cls", None), "__name__", "") == "Conv1D":  # what it stands for
                    size = size[::-1]
                structure.update(f"{full} {size}\n".encode())
                for tensor in store.tensors:
                    packed.update(_sample(tensor))
                continue
            structure.update(f"{full} {tuple(value.shape)}\n".encode())
            (vectors if value.ndim == 1 or isinstance(module, nn.Embedding) else matrices).update(_sample(value))
    if not formats:
        return Fingerprint(structure.hexdigest(), vectors.hexdigest(), matrices.hexdigest())
    stored = f"{'+'.join(sorted(formats))} {packed.hexdigest()}"
    return Fingerprint(structure.hexdigest(), vectors.hexdigest(), None, stored)


def _sample(value: Tensor) -> bytes:
    flat = value.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLES)
    taken = flat[::step][:SAMPLES]
    taken = taken.to(torch.bfloat16) if taken.is_floating_point() else taken
    return taken.contiguous().cpu().view(torch.uint8).numpy().tobytes()
