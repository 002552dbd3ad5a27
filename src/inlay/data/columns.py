"""Which column means what: found by name, or given as a mapping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

from inlay.core.errors import DataError, nearest, problems

if TYPE_CHECKING:
    from datasets import Dataset

Kind = Literal["completion", "chat", "classification", "regression", "text"]
Task = Literal["causal", "seq2seq", "classification", "regression"]

TASKS: tuple[Task, ...] = ("causal", "seq2seq", "classification", "regression")
TASKS_OF: dict[Kind, tuple[Task, ...]] = {
    "completion": ("causal", "seq2seq"),
    "chat": ("causal",),
    "classification": ("classification", "causal", "seq2seq"),  # a decoder answers with the label's name
    "regression": ("regression",),
    "text": ("causal",),
}
ROLES = ("prompt", "completion", "messages", "text", "pair", "label")
_SHAPES: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"), ("text", "label"), ("text",))
_EXPECTED = "`prompt` and `completion`, or `messages`, or `text` and `label`, or `text`"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The kind of a data set, and the column for each role (`None` if this kind has no such role).

    Attributes:
        kind: ``completion`` (prompt, completion), ``chat`` (messages), ``classification`` and ``regression``
            (text, perhaps pair, label) or ``text``.
    """

    kind: Kind
    prompt: str | None = None
    completion: str | None = None
    messages: str | None = None
    text: str | None = None
    pair: str | None = None
    label: str | None = None

    def column(self, role: str) -> str:
        """The column for `role`. Raises: DataError: this kind of data has no such role."""
        name: str | None = getattr(self, role)
        if name is None:
            raise DataError(f"{self.kind} data has no {role} column. Give one with columns, as {role}=NAME")
        return name


def parse_columns(text: str) -> dict[str, str]:
    """The mapping written as ``prompt=mr,completion=ref``.

    Raises:
        DataError: a part without ``=``, a role given twice, or an unknown role.
    """
    found, columns = [], dict[str, str]()
    for part in text.split(","):
        role, equals, name = (piece.strip() for piece in part.partition("="))
        if not equals or not role or not name:
            found.append(f"{part.strip()!r} is not of the form role=column")
        elif role in columns:
            found.append(f"{role} is given twice")
        elif role not in ROLES:
            found.append(_unknown_role(role))
        else:
            columns[role] = name
    if found:
        raise DataError(problems("columns, expected for example prompt=mr,completion=ref", found))
    return columns


def resolve_columns(dataset: Dataset, columns: Mapping[str, str] | None = None, *, task: Task | None = None) -> Layout:
    """Find the column for each role.

    Args:
        dataset: the rows.
        columns: role → column, for roles whose column has another name; the rest is found by name.
            ``pair`` is the second text of a pair (entailment, paraphrase).
        task: what the data is for. It decides between classification and regression; without it the labels
            decide (fractional numbers mean regression).

    Raises:
        DataError: columns that do not exist or do not fit together, or the columns can be read in several ways or none.
    """
    names = [name for name in dataset.column_names if not name.startswith("__")]
    given = dict(columns or {})
    found = [_unknown_role(role) for role in given if role not in ROLES]
    found += [_no_column(role, name, names) for role, name in given.items() if name not in names]
    found += [
        f"column {name!r} is given for {' and '.join(users)}"
        for name in dict.fromkeys(given.values())
        if len(users := [role for role, other in given.items() if other == name]) > 1
    ]
    if task is not None and task not in TASKS:
        found.append(f"task {task!r} is unknown{nearest(task, TASKS)}")
    if found:
        raise DataError(problems("columns", found))
    shape = _shape(given, names, task)
    roles = {role: given.get(role, role) for role in shape}
    if "label" in shape and (pair := given.get("pair", "pair" if "pair" in names else None)):
        roles["pair"] = pair
    kind = _kind(dataset, roles, task)
    if task is not None and task not in TASKS_OF[kind]:
        raise DataError(
            f"{kind} data ({', '.join(f'{r}={c}' for r, c in roles.items())}) is not for the task {task!r}, "
            f"but for {' or '.join(TASKS_OF[kind])}. Choose that, or name other columns: {_listed(names)}"
        )
    return Layout(kind=kind, **roles)


def _shape(given: Mapping[str, str], names: list[str], task: Task | None) -> tuple[str, ...]:
    wanted = set(given) - {"pair"} | ({"text", "label"} if "pair" in given else set())
    fitting = [s for s in _SHAPES if wanted <= set(s) and all(role in given or role in names for role in s)]
    if task is not None and len(fitting) > 1:
        fitting = [s for s in fitting if _serves(s, task)] or fitting
    if ("text", "label") in fitting and ("text",) in fitting:
        text_alone = task == "causal" and "text" in given and "label" not in given
        fitting.remove(("text", "label") if text_alone else ("text",))
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        readings = "; ".join(" and ".join(s) for s in fitting)
        raise DataError(f"the columns can be read in several ways: {readings}. Choose one with columns=")
    if wanted and not any(wanted <= set(s) for s in _SHAPES):
        raise DataError(f"columns {', '.join(sorted(given))} do not go together. Expected {_EXPECTED}")
    raise DataError(_none_fits(wanted, names))


def _serves(shape: tuple[str, ...], task: Task) -> bool:
    match task:
        case "classification" | "regression":
            return "label" in shape
        case "seq2seq":
            return "completion" in shape or "label" in shape
    return True


def _none_fits(wanted: set[str], names: list[str]) -> str:
    shapes = [s for s in _SHAPES if wanted <= set(s)]
    if len(shapes) != 1:  # nothing given: take the shape of which some columns are there
        begun = (s for s in _SHAPES if len(s) == 2 and any(role in names for role in s))
        shapes = list(islice(begun, 1))
    missing = [role for s in shapes for role in s if role not in names and role not in wanted]
    what = f"there is no column {missing[0]!r}{_like(missing[0], names)}" if missing else "no known columns."
    return (
        f"{what} The columns are: {_listed(names)}. Expected {_EXPECTED}; for other names say, for "
        "example, columns prompt=question,completion=answer (for a file without a header row, give header=)"
    )


def _kind(dataset: Dataset, roles: Mapping[str, str], task: Task | None) -> Kind:
    if "messages" in roles:
        return "chat"
    if "completion" in roles:
        return "completion"
    if "label" not in roles:
        return "text"
    if task is not None:
        return "regression" if task == "regression" else "classification"
    return "regression" if _broken_numbers(dataset, roles["label"]) else "classification"


def _broken_numbers(dataset: Dataset, column: str) -> bool:
    """Whether the labels are numbers (in CSV: text that can be read as numbers), some of them fractional."""
    if "ClassLabel" in type(dataset.features[column]).__name__:
        return False
    broken = False
    for value in islice(dataset[column], 10_000):
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return False
        try:
            broken |= not float(value).is_integer()
        except (ValueError, OverflowError):
            return False
    return broken


def _no_column(role: str, name: str, names: list[str]) -> str:
    like = _like(name, names)
    return f"{role}={name}: there is no column {name!r}{like} The columns are: {_listed(names)}"


def _listed(names: list[str]) -> str:
    # In a file without a header row, the first row was taken for the names.
    shown = [name if len(name) <= 40 else f"{name[:39]}…" for name in names[:30]]
    return ", ".join(shown) + (", …" if len(names) > 30 else "")


def _like(name: str, names: list[str]) -> str:
    hint = nearest(name, names)
    return hint if hint.startswith("; did") else "."


def _unknown_role(role: str) -> str:
    return f"unknown role {role!r}{nearest(role, ROLES)}"
