"""Parsing options: ``rank=16`` becomes a value of the type of the dataclass field with this name."""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from inlay.core.contracts.method import Method
from inlay.core.errors import ConfigError, nearest, problems

_CLASSES = ConfigDict(arbitrary_types_allowed=True)  # fields may hold methods


def parse_settings(method: str, words: Sequence[str]) -> dict[str, Any]:
    """Parse ``["rank=16", "dropout=0.1"]`` to values of the types of the method's fields.

    Lists are written with commas, None as ``none``, mappings as JSON.

    Raises:
        ConfigError: lists all words that are not ``name=value``, name no hyper-parameter or do not fit its type.
    """
    from inlay.methods import method_named

    return parse_fields(method_named(method), words, heading=f"--set, method {method!r}", noun="hyper-parameter")


def parse_fields(cls: type, words: Sequence[str], *, heading: str, noun: str) -> dict[str, Any]:
    """Parse ``name=value`` words to values of the types of a dataclass's fields. Raises as `parse_settings` does."""
    hints = fields_of(cls)
    found: list[str] = []
    values: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            found.append(f"{word!r} is not of the form name=value")
        elif name not in hints:
            found.append(f"unknown {noun} {name!r}{nearest(name, hints)}")
        elif name in values:
            found.append(f"{name} is given twice")
        else:
            try:
                values[name] = _typed(hints[name], text if hints[name] is str else text.strip())
            except (ValidationError, json.JSONDecodeError):
                found.append(f"{name}={text.strip()!r} is not {_called(hints[name])}")
    if found:
        raise ConfigError(problems(heading, found))
    return values


def build_method(name: str, settings: Mapping[str, Any]) -> Method:
    """The method that a configuration describes.

    Raises:
        ConfigError: the method or a hyper-parameter is unknown, or a value has the wrong type or is out of range.
    """
    from inlay.methods import method_named

    cls = method_named(name)
    nested = {key: _methods_in(value) for key, value in settings.items()}
    return cls.from_dict(check_fields(cls, nested, heading=f"method {name!r}", noun="hyper-parameter"))


def usual_places(method: Method, quantize: str | None) -> str | None:
    """The default places of a run with this method; None means the method's own."""
    # As in QLoRA: adapters at every linear layer compensate for what 4 bits lose.
    return "all-linear" if quantize and method.family == "low rank" else None


def _methods_in(value: Any) -> Any:
    """Turn every mapping in a value that describes a method into that method (`Stack`, `Parallel`, `Average`)."""
    if isinstance(value, Mapping) and "method" in value:
        return build_method(str(value["method"]), {k: v for k, v in value.items() if k != "method"})
    return [_methods_in(v) for v in value] if isinstance(value, (list, tuple)) else value


def check_fields(cls: type, values: Mapping[str, Any], *, heading: str, noun: str) -> dict[str, Any]:
    """Check values from a file against the types of a dataclass's fields. Raises as `build_method` does."""
    hints = fields_of(cls)
    found: list[str] = []
    checked: dict[str, Any] = {}
    for key, value in values.items():
        if key not in hints:
            found.append(f"unknown {noun} {key!r}{nearest(key, hints)}")
            continue
        options = get_args(hints[key]) or (hints[key],)
        if isinstance(value, bool) and bool not in options and any(kind in options for kind in (int, float)):
            found.append(f"{key}={value!r} is not {_called(hints[key])}")  # YAML's `yes`, which would count as 1
            continue
        try:
            checked[key] = TypeAdapter(hints[key], config=_CLASSES).validate_python(value)
        except ValidationError:
            found.append(f"{key}={value!r} is not {_called(hints[key])}")
    if found:
        raise ConfigError(problems(heading, found))
    return checked


def fields_of(cls: Any) -> dict[str, Any]:
    """Field → type, for a dataclass."""
    return {field.name: _hint(cls, field.name) for field in dataclasses.fields(cls)}


def _hint(cls: type, name: str) -> Any:
    """A field's type, resolved in the module where it was declared."""
    owner = next(parent for parent in cls.__mro__ if name in inspect.get_annotations(parent))
    hint = inspect.get_annotations(owner)[name]
    return eval(hint, vars(sys.modules[owner.__module__])) if isinstance(hint, str) else hint


def _typed(hint: Any, text: str) -> Any:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    if text.startswith(("{", "[")):
        return TypeAdapter(hint).validate_python(json.loads(text))
    if any(get_origin(option) in (tuple, list) for option in options):
        return TypeAdapter(hint).validate_python([part.strip() for part in text.split(",") if part.strip()])
    return TypeAdapter(hint).validate_strings(text)


def _called(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if get_origin(hint) is None:
        return names.get(hint, getattr(hint, "__name__", str(hint)))
    options = get_args(hint)
    if all(isinstance(option, str) for option in options):
        return "one of " + ", ".join(map(str, options))
    return str(hint).replace("typing.", "")
