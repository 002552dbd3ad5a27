"""Everything inlay raises on purpose, in one tree.

    InlayError
    └── UserError                 a mistake the caller can correct; commands end with exit code 2
        ├── ConfigError           an option, a method's hyper-parameter, a run configuration
        ├── SelectionError        `where` or `modules_to_save` matches nothing, or something that cannot be adapted
        ├── AdapterNameError      an adapter name that is unknown, already taken or ill-formed
        ├── RouteError            rows and adapters do not fit each other
        ├── DataError             a data file: type, columns, rows, lengths, labels
        ├── AdapterFileError      a file that is truncated, was tampered with, or is no adapter
        ├── BaseMismatchError     an adapter that belongs to another base model
        ├── OutputError           an output folder in use, a full disk
        └── UnsupportedError      a combination that cannot be exact, refused instead of approximated

A message says what happened, what was expected and what to do; where several things are wrong,
one error lists them all (`problems`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class InlayError(Exception):
    """Root of the tree."""


class UserError(InlayError):
    """A mistake the caller can correct."""


class ConfigError(UserError):
    """An option, a hyper-parameter or a run configuration that cannot be used."""


class SelectionError(UserError):
    """A place that is not in the model, or that the method cannot adapt."""


class AdapterNameError(UserError):
    """An adapter name that is unknown, already taken or ill-formed."""


class RouteError(UserError):
    """Rows and adapters do not fit each other."""


class DataError(UserError):
    """A data file, a column, a row, a length or a label that cannot be used."""


class AdapterFileError(UserError):
    """A file that is truncated, was tampered with, or is no adapter."""


class BaseMismatchError(UserError):
    """An adapter that belongs to another base model."""


class OutputError(UserError):
    """An output folder that is in use, or a disk that is full."""


class UnsupportedError(UserError):
    """A combination that cannot be exact; refused instead of approximated."""


def problems(heading: str, found: Sequence[str]) -> str:
    """One message for everything that is wrong: the heading, then one line per problem."""
    if len(found) == 1:
        return f"{heading}: {found[0]}"
    return "\n".join([f"{heading} ({len(found)} problems):", *(f"  - {line}" for line in found)])


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a mistyped word: `; did you mean 'rank'?`, or the known words if they are few, or nothing."""
    import difflib  # takes longer to import than the rest of `import inlay`

    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= 24 else ""
