"""The registry: one file a method, file name = registry key = command-line word (with ``-`` for ``_``).

A file of this folder whose name does not begin with ``_`` is a method; it is named nowhere else. A package of its own
registers a method class under the entry-point group ``inlay.methods``. The registry is ``inlay.methods()``: this
package can be called.

Importing this package imports neither torch nor any method. What must be known of the methods before that (public
names, the words of the command line) is in `_table.py`, which `make docs` writes from the files (`_listed.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING

from inlay.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from inlay.core.contracts.method import Method

# The families in the order of the methods table; one that is not among them stands last.
FAMILIES = (
    "low rank", "orthogonal", "rescaling", "adapter", "selective", "soft prompt", "representation", "composition",
    "side", "baseline",
)  # fmt: skip
GROUP = "inlay.methods"


@cache
def registry() -> Mapping[str, type[Method]]:
    """Every known method by its key: inlay's own, then those of installed packages, both by family and `table_order`.

    Raises:
        ConfigError: a file of this folder defines no method of its name; an installed package registers something
            that is no method, or takes a key that is in use.
    """
    own = {key: _of_file(key) for key in built_in()}
    return MappingProxyType({**_ordered(own), **_ordered(_of_packages(own))})


def method_named(key: str) -> type[Method]:
    """The method class of a key, or an error with the nearest key."""
    if key in built_in():
        return _of_file(key)
    known = registry()
    if key not in known:
        raise ConfigError(f"unknown method {key!r}{nearest(key, known)}")
    return known[key]


def methods() -> Mapping[str, type[Method]]:
    """Key → method class, for every known method."""
    return registry()


def built_in() -> list[str]:
    """The keys of inlay's own methods, by the names of their files; imports none of them."""
    import pkgutil

    names = (module.name for module in pkgutil.iter_modules(__path__))
    return [name.replace("_", "-") for name in names if not name.startswith("_")]


def _of_file(key: str) -> type[Method]:
    """The one method that the file of this key defines, beside which it may have abstract ones and helpers."""
    from importlib import import_module
    from inspect import isabstract

    from inlay.core.contracts.method import Method

    module = import_module(f"{__name__}.{key.replace('-', '_')}")
    found = [
        cls
        for cls in vars(module).values()
        if isinstance(cls, type) and issubclass(cls, Method) and not isabstract(cls)
        if cls.__module__ == module.__name__  # defined there, not imported
    ]
    if [cls.name for cls in found] != [key]:
        said = ", ".join(f"{cls.__name__} (name = {cls.name!r})" for cls in found) or "none"
        raise ConfigError(
            f"{module.__file__} must define one subclass of Method with name = {key!r}, the file's own; found: {said}. "
            "A file of helpers has a name that begins with an underscore"
        )
    return found[0]


def _of_packages(taken: Mapping[str, type[Method]]) -> dict[str, type[Method]]:
    """The methods that installed packages register."""
    from importlib import metadata

    from inlay.core.contracts.method import Method

    found: dict[str, type[Method]] = {}
    for point in metadata.entry_points(group=GROUP):
        cls = point.load()
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise ConfigError(f"entry point {point.name!r} ({point.value}) is not a subclass of inlay's Method")
        if cls.name in taken or cls.name in found:
            raise ConfigError(f"entry point {point.name!r} ({point.value}) takes the key {cls.name!r}, which is in use")
        found[cls.name] = cls
    return found


def _ordered(found: Mapping[str, type[Method]]) -> dict[str, type[Method]]:
    """By family, then as the methods say, then by key: the order of a folder or of imports decides nothing."""

    def place(key: str) -> tuple[int, str, int, str]:
        cls = found[key]
        family = FAMILIES.index(cls.family) if cls.family in FAMILIES else len(FAMILIES)
        return family, cls.family, cls.table_order, key

    return {key: found[key] for key in sorted(found, key=place)}


class _CallableModule(ModuleType):
    """`inlay.methods` is a package to Python, whoever imports it first, and `inlay.methods()` what users call.

    Python lets a module take another class (language reference, "Customizing module attribute access").
    """

    def __call__(self) -> Mapping[str, type[Method]]:
        return registry()


sys.modules[__name__].__class__ = _CallableModule
