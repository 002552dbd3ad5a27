"""How a prompt and its completion are joined to one text."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from inlay.core.errors import ConfigError, DataError, nearest, problems


@dataclass(frozen=True, kw_only=True)
class Template:
    """The text of a row: ``prompt`` + ``separator`` + completion + the tokenizer's end token.

    The model learns, and later generates, exactly what follows ``prompt + separator``. In encoder–decoders the encoder
    reads the prompt, without a separator.

    Attributes:
        prompt: text with names of columns in braces; ``{prompt}`` is the prompt column (for labelled text, ``{text}``
            and ``{pair}``), whatever its name in the data. Write ``{{`` for a brace.
        separator: text between prompt and completion, never scored.
        end: whether the end token follows the completion (and is learnt).

    Raises:
        ConfigError: braces that do not close, fields without a name, or formats that do not apply to text.
    """

    prompt: str = "{prompt}"
    separator: str = "\n"
    end: bool = True

    def __post_init__(self) -> None:
        try:
            found = [f"{{{name}}} is not a column's name" for name in self.names if not name or {*name} & {*".["}]
            if not found:
                self.render(dict.fromkeys(self.names, ""))  # raises for formats that do not apply to text
        except (ValueError, KeyError) as error:
            found = [f"{error}; write {{{{ and }}}} for braces that are part of the text"]
        if found:
            raise ConfigError(problems(f"template prompt {self.prompt!r}", found))

    @property
    def names(self) -> list[str]:
        """The columns that the prompt names, in order."""
        return [name for _, name, _, _ in string.Formatter().parse(self.prompt) if name is not None]

    def check(self, known: Sequence[str]) -> None:
        """Raises: DataError: the prompt names a column that is not there."""
        found = [f"{{{name}}} is not a column{nearest(name, known)}" for name in self.names if name not in known]
        if found:
            raise DataError(problems(f"template prompt {self.prompt!r}", found))

    def render(self, values: Mapping[str, Any]) -> str:
        """The prompt with the row's values filled in; braces in the values have no meaning."""
        return self.prompt.format_map(values)
