"""Which base an adapter belongs to: a digest that survives a change of precision, not of weights.

All names and shapes of the base's parameters are hashed. Values are sampled (at most 64 of a parameter, evenly spread)
and rounded to bfloat16, so that the same checkpoint loaded in another precision is the same base. A quantised weight is
hashed with the shape of the weight it stands for; its stored values go into a hash of their own, which is compared only
between bases of the same quantisation. So an adapter trained on a 4-bit base can be loaded on the dense base it was
made from, and the other way round; embeddings, norms and biases tell it from other bases.

Rounding to float16 first can end at another bfloat16: at its neighbour, where float16 lay half way between the two,
or far from it where float16 has no digits left (below 6e-5). No digest survives that, so a few hundred of the samples
are kept as they are, and between two bases of which one is float16 they decide in the place of the digests.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.model.layer import shape_of, store_of
from inlay.core.model.view import ModelView

SAMPLES = 64
KEPT = 512  # of all samples of vectors, and of matrices, as many as are written down
NEIGHBOUR = 2**-7  # relative: one step of bfloat16, which has 8 binary digits
LOST = 2**-24  # what float16 rounds off where it has no digits left
NORMAL = 2**-14  # from where on float16 has all its digits
UNEQUAL = 1 / 8  # of the values; rounding twice moves 1 in 16


@dataclass(frozen=True)
class Fingerprint:
    """Digests of a base.

    Attributes:
        structure: digest of names and shapes.
        vectors: digest of the values of embeddings, norms and biases.
        matrices: digest of the values of the other weights; None if some are quantised.
        quantised: the formats of the quantised weights and a digest of what they store; None if there are none.
        samples: ``fp16`` or ``bf16``, whether anything was rounded to float16, and some of the values behind the
            digests of vectors and of matrices, as bfloat16 in base 64. None in files of earlier versions.
    """

    structure: str
    vectors: str
    matrices: str | None
    quantised: str | None = None
    samples: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Fingerprint:
        stored = values.get("matrices"), values.get("quantised"), values.get("samples")
        return Fingerprint(str(values["structure"]), str(values["vectors"]), *stored)

    def differences(self, other: Fingerprint) -> list[str]:
        """In what the two bases differ; empty if they are the same."""
        found = []
        if self.structure != other.structure:
            return ["its layers have other names or shapes"]
        if self.vectors != other.vectors and not _rounded_apart(self.samples, other.samples, 1):
            found.append("its embeddings, norms or biases have other values")
        dense = None not in (self.matrices, other.matrices)
        if dense and self.matrices != other.matrices and not _rounded_apart(self.samples, other.samples, 2):
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
    structure, packed = hashlib.sha256(), hashlib.sha256()
    vectors, matrices = list[Tensor](), list[Tensor]()
    formats: set[str] = set()
    halved = False
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
                    packed.update(_bytes(_sample(tensor)))
                continue
            structure.update(f"{full} {tuple(value.shape)}\n".encode())
            halved = halved or value.dtype == torch.float16
            (vectors if value.ndim == 1 or isinstance(module, nn.Embedding) else matrices).append(_sample(value))
    samples = " ".join(["fp16" if halved else "bf16", _written(vectors), _written(matrices)])
    digests = structure.hexdigest(), _digest(vectors)
    if not formats:
        return Fingerprint(*digests, _digest(matrices), samples=samples)
    stored = f"{'+'.join(sorted(formats))} {packed.hexdigest()}"
    return Fingerprint(*digests, None, stored, samples)


def _sample(value: Tensor) -> Tensor:
    flat = value.detach().reshape(-1)
    step = max(1, flat.numel() // SAMPLES)
    taken = flat[::step][:SAMPLES]
    taken = taken.to(torch.bfloat16) if taken.is_floating_point() else taken
    return taken.contiguous().cpu()


def _bytes(value: Tensor) -> bytes:
    return value.view(torch.uint8).numpy().tobytes()


def _digest(samples: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(_bytes(sample))
    return digest.hexdigest()


def _written(samples: Sequence[Tensor]) -> str:
    """Some of the samples, evenly spread over all of them."""
    together = torch.cat([s.to(torch.bfloat16) for s in samples]) if samples else torch.empty(0, dtype=torch.bfloat16)
    step = -(-len(together) // KEPT) or 1
    return base64.b64encode(_bytes(together[::step].contiguous())).decode()


def _rounded_apart(ours: str | None, theirs: str | None, part: int) -> bool:
    """Whether two bases may be one of which float16 is a rounding, by the samples that were written down.

    Args:
        part: 1 for those of vectors, 2 for those of matrices.
    """
    if ours is None or theirs is None or {ours[:4], theirs[:4]} != {"fp16", "bf16"}:
        return False
    a, b = _read(ours, part), _read(theirs, part)
    if a is None or b is None or a.shape != b.shape:
        return False
    size = torch.maximum(a.abs(), b.abs())
    if not bool(((a - b).abs() <= NEIGHBOUR * size + LOST).all()):
        return False
    whole = size >= NORMAL
    return int((a != b)[whole].sum()) <= UNEQUAL * int(whole.sum()) + 1 / UNEQUAL


def _read(samples: str, part: int) -> Tensor | None:
    """The inverse of `_written`; None for what is no such text."""
    words = samples.split(" ")
    try:
        raw = bytearray(base64.b64decode(words[part], validate=True))
        return torch.frombuffer(raw, dtype=torch.bfloat16).float() if raw else torch.empty(0)
    except (IndexError, ValueError, binascii.Error):
        return None
