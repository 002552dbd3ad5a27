"""inlay: small trained pieces set into a frozen model, flush with its surface.

Importing this package does not import torch: public names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from inlay.methods._table import METHODS

__version__ = "0.1.0"

# Public name → module. Methods follow from their files; the rest is imported for type checkers below.
_HOMES = {
    "attach": "inlay.core.attach",
    "detach": "inlay.core.attach",
    "use": "inlay.core.attach",
    "adapters": "inlay.core.attach",
    "merge": "inlay.core.merge",
    "unmerge": "inlay.core.merge",
    "MergeReport": "inlay.core.merge",
    "combine": "inlay.arithmetic",
    "CombineReport": "inlay.arithmetic",
    "compile_layers": "inlay.kernels.compiled",
    "fast_paths": "inlay.core.fast_paths",
    "Adapter": "inlay.core.contracts.adapter",
    "save": "inlay.formats",
    "load": "inlay.formats",
    "InlayError": "inlay.core.errors",
    "UserError": "inlay.core.errors",
    **{row.cls: f"inlay.methods.{key.replace('-', '_')}" for key, row in METHODS.items()},
}
__all__ = sorted([*_HOMES, "methods", "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'inlay' has no attribute {name!r}")
    import_module("inlay.bases")  # registers the layer types that the core can read
    import_module("inlay.kernels")  # puts the fast paths into effect
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from inlay.arithmetic import CombineReport as CombineReport
    from inlay.arithmetic import combine as combine
    from inlay.core.attach import adapters as adapters
    from inlay.core.attach import attach as attach
    from inlay.core.attach import detach as detach
    from inlay.core.attach import use as use
    from inlay.core.contracts.adapter import Adapter as Adapter
    from inlay.core.errors import InlayError as InlayError
    from inlay.core.errors import UserError as UserError
    from inlay.core.fast_paths import fast_paths as fast_paths
    from inlay.core.merge import MergeReport as MergeReport
    from inlay.core.merge import merge as merge
    from inlay.core.merge import unmerge as unmerge
    from inlay.formats import load as load
    from inlay.formats import save as save
    from inlay.kernels.compiled import compile_layers as compile_layers
    from inlay.methods import methods as methods
    from inlay.methods._table import *  # noqa: F403 - the classes of the methods, whose list is generated
