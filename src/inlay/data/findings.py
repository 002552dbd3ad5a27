"""Problems found while going through rows, collected so that one error can list them all."""

from __future__ import annotations

from dataclasses import dataclass, field

from inlay.core.errors import DataError

LISTED = 10  # problems shown for each remedy; the rest are counted


@dataclass
class Findings:
    """Problems grouped by remedy, in the order they were found. Only the first few of each are kept as text."""

    heading: str
    _shown: dict[str, list[str]] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)
    _hints: dict[str, str] = field(default_factory=dict)

    def add(self, problem: str, remedy: str) -> None:
        """Add a problem; problems with the same remedy are listed together."""
        shown = self._shown.setdefault(remedy, [])
        if len(shown) < LISTED:
            shown.append(problem)
        self._counts[remedy] = self._counts.get(remedy, 0) + 1

    def hint(self, remedy: str, hint: str) -> None:
        """Put a sentence in front of a remedy that was given, if it is only known after all rows."""
        if remedy in self._shown:
            self._hints[remedy] = hint

    @property
    def count(self) -> int:
        """How many problems were added."""
        return sum(self._counts.values())

    def message(self) -> str:
        """The text of the error: one line per problem, each remedy after its problems."""
        if self.count == 1:
            ((remedy, shown),) = self._shown.items()
            return f"{self.heading}: {shown[0]}. {self._advice(remedy)}"
        lines = [f"{self.heading} ({self.count} problems):"]
        for remedy, shown in self._shown.items():
            lines += [f"  - {problem}" for problem in shown]
            if more := self._counts[remedy] - len(shown):
                lines.append(f"  - and {more} more")
            lines.append(f"    {self._advice(remedy)}")
        return "\n".join(lines)

    def _advice(self, remedy: str) -> str:
        return f"{self._hints[remedy]} {remedy}" if remedy in self._hints else remedy

    def raise_if_any(self) -> None:
        """Raises: DataError: something was added."""
        if self._shown:
            raise DataError(self.message())
