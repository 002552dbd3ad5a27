"""`inlay schema`: the JSON schema of a run's file, by which editors complete and check it."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

WIDTH = 120


def schema() -> None:
    """Print the JSON schema of run.yaml, for editors: options, methods and their hyper-parameters."""
    from importlib.metadata import entry_points

    from inlay.methods import GROUP
    from inlay.train.options import SCHEMA

    added = entry_points(group=GROUP)  # methods of other packages stand in no file that was written before
    sys.stdout.write(f"{written(run_schema())}\n" if added else SCHEMA.read_text(encoding="utf-8"))


def written(made: Any, indent: str = "") -> str:
    """The schema as a file has it: what fits on a line on one line, so that a hyper-parameter's change is a line's."""
    line = json.dumps(made, ensure_ascii=False)
    if len(indent) + len(line) > WIDTH and isinstance(made, dict):
        parts = [f"{json.dumps(key)}: {written(part, indent + ' ')}" for key, part in made.items()]
    elif len(indent) + len(line) > WIDTH and isinstance(made, list):
        parts = [written(part, indent + " ") for part in made]
    else:
        return line
    first, last = ("{", "}") if isinstance(made, dict) else ("[", "]")
    return f"{first}\n" + ",\n".join(f"{indent} {part}" for part in parts) + f"\n{indent}{last}"


def run_schema() -> dict[str, Any]:
    """The options of `RunConfig`, and which hyper-parameters go with which method or baseline."""
    from inlay.baselines import baselines
    from inlay.methods import registry
    from inlay.train.config import RunConfig

    made = _untitled(RunConfig.model_json_schema())
    options: dict[str, Any] = made["properties"]
    known = {**registry(), **baselines()}
    method = options["method"]
    options["method"] = {"anyOf": [{"enum": list(known)}, {"type": method.pop("type")}], **method}
    options["runs"] = {
        "type": "array",
        "items": {"$ref": "#"},
        "description": "Several runs: each has these options on top of those that stand beside this list.",
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "run.yaml of inlay train",
        "type": "object",
        "additionalProperties": False,
        "properties": options,  # none is required: flags may give what a file leaves out
        "allOf": [_settings_of(key, default=method["default"]) for key in known],
        "$defs": {key: _settings(cls) for key, cls in known.items()},
    }


def _settings_of(key: str, *, default: str) -> dict[str, Any]:
    """Where the method is `key`, said or by default, its hyper-parameters are those of `key`."""
    said = {"properties": {"method": {"const": key}}}
    if key != default:
        said["required"] = ["method"]  # type: ignore[assignment]
    return {"if": said, "then": {"properties": {"settings": {"$ref": f"#/$defs/{key}"}}}}


def _settings(cls: Any) -> dict[str, Any]:
    """The hyper-parameters of a method or baseline."""
    from inlay.train.hyper import fields_of

    defaults, told = cls().to_dict(), _told(cls)
    properties = {}
    for name, hint in fields_of(cls).items():
        about = {"description": told[name]} if name in told else {}
        properties[name] = {**_form(hint), **about, "default": defaults[name]}
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _form(hint: Any) -> dict[str, Any]:
    """The schema of a type; only its outermost part where it holds methods."""
    from pydantic import PydanticSchemaGenerationError, TypeAdapter

    try:
        made = TypeAdapter(hint).json_schema()
    except PydanticSchemaGenerationError:
        return {}
    return {"type": made["type"]} if "$defs" in made else dict(_untitled(made))


def _told(cls: type) -> dict[str, str]:
    """What docstrings say of fields, under ``Attributes:`` of the class and of those it inherits from."""
    found: dict[str, str] = {}
    for parent in reversed(cls.__mro__):
        lines = (parent.__doc__ or "").partition("Attributes:\n")[2]
        for names, text in re.findall(r"^        (\w[\w, ]*): (.*(?:\n            .*)*)", lines, re.MULTILINE):
            told = " ".join(text.split())
            found |= {name.strip(): told[:1].upper() + told[1:] for name in names.split(",")}
    return found


def _untitled(made: Any) -> Any:
    """Without the titles that pydantic makes of names."""
    if isinstance(made, list):
        return [_untitled(part) for part in made]
    if not isinstance(made, dict):
        return made
    return {key: _untitled(part) for key, part in made.items() if not (key == "title" and isinstance(part, str))}
