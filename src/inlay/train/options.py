"""The options of a run as plain data: the fields of `RunConfig`, read from `run.schema.json` without importing it.

So `inlay train --help` does not have to wait for pydantic, torch or the methods.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SCHEMA = Path(__file__).with_name("run.schema.json")
UNSAID = " Default: "


@dataclass(frozen=True, kw_only=True)
class Option:
    """A field of `RunConfig`.

    Attributes:
        name: name of the field; the flag has dashes instead of underscores.
        kinds: JSON's words for its types, without ``null``: ``string``, ``integer``, ``number``, ``boolean``,
            ``array``, ``object``.
        choices: the words it may be; empty if it is not restricted to words.
        default: None if it is found out when the run starts, or if the option is required.
        told: what it does.
        unsaid: what happens if it is not given; empty if that follows from `told`.
    """

    name: str
    kinds: tuple[str, ...]
    choices: tuple[str, ...]
    default: Any
    told: str
    unsaid: str

    @property
    def help(self) -> str:
        """One line: what it does, its choices, its default."""
        choices = f" One of {', '.join(self.choices)}." if self.choices else ""
        return f"{self.told}{choices}{UNSAID if self.unsaid else ''}{self.unsaid}{'.' if self.unsaid else ''}"


@cache
def options() -> dict[str, Option]:
    """Every option by its name, in the order of the fields."""
    return described(json.loads(SCHEMA.read_text(encoding="utf-8")))


def described(schema: dict[str, Any]) -> dict[str, Option]:
    """The options in a schema."""
    return {name: _option(name, facts) for name, facts in schema["properties"].items() if name != "runs"}


def choices(name: str) -> str:
    """The choices of an option as text: ``nf4, fp4, int8``."""
    return ", ".join(options()[name].choices)


def _option(name: str, facts: dict[str, Any]) -> Option:
    forms = [form for form in facts.get("anyOf", [facts]) if form.get("type") != "null"]
    closed = (
        [form.get("items", {}) for form in forms] if len(forms) > 1 else forms
    )  # text beside a list spells the list
    told, _, unsaid = facts["description"].partition(UNSAID)
    default = facts.get("default")
    if default is not None and default is not False and default not in ([], {}):
        unsaid = default if isinstance(default, str) and default.isprintable() else json.dumps(default)
    return Option(
        name=name,
        kinds=tuple(str(form.get("type", "string")) for form in forms),
        choices=next((tuple(form["enum"]) for form in closed if "enum" in form), ()),
        default=default,
        told=told,
        unsaid=unsaid.removesuffix("."),
    )
