"""A twin of a base layer: the layer's own forward, computing with other parameters.

Model families differ in their norms and scaled embeddings (Gemma multiplies by 1 + w and by √d). A twin runs the
layer's own class, so a method that trains such parameters is exact without knowing any of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from inlay.authoring import Site


def twin(site: Site, owner: nn.Module, names: Mapping[str, str], dtype: torch.dtype | None = None) -> nn.Module:
    """A layer with the settings of the site's, that reads its parameters from `owner`.

    It has no parameters and no stored buffers itself, and may be a child of `owner`.

    Args:
        names: the layer's name of a parameter → the owner's name; for all others the layer sees None.
        dtype: the dtype in which the layer sees them; None is the one that they have at the time.
    """
    layer = site.module
    original: Any = site.original_class
    made: nn.Module = object.__new__(_twin_class(original, tuple(layer._parameters)))
    nn.Module.__init__(made)
    own = {*made.__dict__, "forward"}
    made.__dict__.update({k: v for k, v in layer.__dict__.items() if k not in own and not k.startswith("_inlay")})
    for name, value in layer._buffers.items():
        made.register_buffer(name, value, persistent=False)
    made.__dict__["_twin"] = (owner, dict(names), dtype)  # past nn.Module's registration: the owner may be the parent
    return made


@cache
def _twin_class(cls: Any, parameters: tuple[str, ...]) -> Any:
    body: dict[str, Any] = {name: property(partial(_seen, name)) for name in parameters}
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__qualname__": cls.__qualname__, **body})


def _seen(name: str, layer: nn.Module) -> Tensor | None:
    owner, names, dtype = layer.__dict__["_twin"]
    if name not in names:
        return None
    value: Tensor = getattr(owner, names[name])
    return value if dtype is None else value.to(dtype)
