"""A place in a model that one delta is built for."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from inlay.core.errors import UnsupportedError
from inlay.core.model.fused_part import Part
from inlay.core.model.layer import Kind, read_weight


@dataclass(frozen=True, eq=False)
class Site:
    """One layer, a part of a fused layer, or the output of a sublayer.

    Attributes:
        path: of the module whose call is adapted.
        kind: the layer's kind; ``output`` for a module of which only input and output are known.
        in_features, out_features: of the canonical weight, or of the part.
        bias: whether the layer has one.
        role: what the layer is for (`core/model/roles.py`), or None.
        part: the part of a fused layer's outputs, or None for the whole.
        source: path of another module whose *input* is this site's ``x``: a delta beside a feed-forward reads the
            input of its first matrix and adds to the output of its last. None: the layer's own input.
        sources: paths of several modules whose inputs, as a tuple, are this site's ``x``: a side network reads
            the input of every block.
    """

    path: str
    module: nn.Module
    kind: Kind
    in_features: int
    out_features: int
    bias: bool
    dtype: torch.dtype
    device: torch.device
    role: str | None = None
    part: Part | None = None
    source: str | None = None
    sources: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The name under which this site's tensors are stored."""
        return self.path if self.part is None else f"{self.path}:{self.part.name}"

    @property
    def original_class(self) -> type[nn.Module]:
        """The layer's own class, even if an adapter has exchanged it."""
        return next(c for c in type(self.module).__mro__ if not getattr(c, "inlay_adapted", False))

    @property
    def fed_by(self) -> tuple[str, ...]:
        """Paths of the modules whose inputs a delta here reads instead of its own layer's."""
        return self.sources if self.source is None else (self.source,)

    def entering(self, x: Tensor, captured: Mapping[str, Tensor]) -> Any:
        """What a delta here is given as ``x``.

        Args:
            x: what enters the layer.
            captured: what entered the modules of `fed_by`.
        """
        missing = [path for path in self.fed_by if path not in captured]
        if missing:
            raise UnsupportedError(
                f"an adapter at {self.path} reads the input of {missing[0]}, which this model runs later or never; "
                "choose another method for this model"
            )
        if self.source is not None:
            return captured[self.source]
        return tuple(captured[path] for path in self.sources) if self.sources else x

    def read_weight(self) -> tuple[Tensor, Tensor | None]:
        """The base's weight and bias in canonical layout; the part's rows alone if the site is a part."""
        weight, bias = read_weight(self.module)
        weight, bias = _gathered(weight), None if bias is None else _gathered(bias)
        if self.part is None:
            return weight, bias
        return self.part.take(weight, 0), None if bias is None else self.part.take(bias, 0)

    def compute(self, x: Tensor) -> Tensor:
        """The output of the layer's own forward for `x`, without deltas; works outside the model's forward too."""
        layer, held = self.module, self.module._parameters
        if any(hasattr(p, "full_tensor") for p in held.values()):
            layer = copy.copy(self.module)
            layer._parameters = {n: None if p is None else _gathered(p) for n, p in held.items()}  # type: ignore[misc]
        return self.original_class.forward(layer, x)  # type: ignore[no-any-return]

    def empty(self, *shape: int) -> Tensor:
        """Uninitialised storage for an adapter's parameter: on the layer's device, in full precision.

        Adapters are kept in float32 even if the base is in half precision, because bfloat16 loses an update of 1e-4 of
        a weight's size; they are cast where they are used.
        """
        dtype = self.dtype if self.dtype == torch.float64 else torch.float32
        return torch.empty(*shape, device=self.device, dtype=dtype)


def _gathered(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered if FSDP has sharded it, for reading outside its module's forward."""
    full = getattr(tensor, "full_tensor", None)
    return tensor if full is None else full()
