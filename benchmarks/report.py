"""What a section of `make bench` gives: rows with their targets, what disagreed, and everything measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        most: the target; None is a figure for information.
        unit: of value and target; a ratio has none.
        detail: what the value is made of, in a few words.
    """

    work: str
    value: float
    most: float | None = None
    unit: str = ""
    detail: str = ""

    @property
    def met(self) -> bool:
        return self.most is None or self.value <= self.most

    def to_dict(self) -> dict[str, Any]:
        return {
            "work": self.work, "at_most": self.most, "found": self.value, "unit": self.unit, "met": self.met,
            "detail": self.detail,
        }  # fmt: skip

    @classmethod
    def of(cls, written: Mapping[str, Any]) -> Row:
        """The row that `to_dict` wrote."""
        known = {name: written[name] for name in ("work", "unit", "detail")}
        return cls(value=written["found"], most=written["at_most"], **known)


@dataclass
class Part:
    """What a section found.

    Attributes:
        wrong: where ours and the peer's results differ, so that their times compare nothing.
        raw: the section's own dictionary, for the results file.
    """

    rows: list[Row] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    raw: Any = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a section measures.

    Attributes:
        runs: alternating ones that count.
        checked: steps over which losses must agree.
        tiny: shapes that only show that everything runs.
        quick: as few processes and steps as tell something.
    """

    runs: int
    checked: int = 20
    tiny: bool = False
    quick: bool = False
    say: Callable[[str], None] = lambda words: None


def milliseconds(timings: dict[str, Any]) -> str:
    """The medians of several contenders, for a row's details."""
    return ", ".join(f"{name} {timing['median_ms']:.4g} ms" for name, timing in timings.items())


def table(rows: Sequence[Row]) -> Table:
    """Every row with its target, what was found, and whether that is met."""
    shown = Table(title="Targets, and what was found")
    shown.add_column("work", ratio=3)
    for title in ("at most", "found"):
        shown.add_column(title, justify="right", no_wrap=True)
    shown.add_column("met")
    shown.add_column("in detail", ratio=2)
    for row in rows:
        met = "" if row.most is None else "yes" if row.met else "[red]no[/red]"
        most = "" if row.most is None else f"{row.most:g} {row.unit}".strip()
        shown.add_row(row.work, most, f"{row.value:.3g} {row.unit}".strip(), met, row.detail)
    return shown
