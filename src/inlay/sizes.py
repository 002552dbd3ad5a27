"""Amounts of memory and of time, and rates, as people write and read them."""

from __future__ import annotations

import math
import re

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_WRITTEN = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?", re.IGNORECASE)
_MOST = 2**80


def bytes_of(text: str) -> int:
    """``16GiB``, ``24 GB``, ``1.5k`` or ``1024`` as a number of bytes.

    Raises:
        ValueError: it is not an amount of memory.
    """
    found = _WRITTEN.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is not an amount of memory: give a number and a unit, such as 16GiB or 500MB")
    amount = float(found[1]) * _UNITS[found[2].lower()]
    if amount >= _MOST:
        raise ValueError(f"{text[:40]!r} is more memory than there is: give an amount such as 16GiB")
    return round(amount)


def told_bytes(amount: float) -> str:
    """An amount with three digits, in the unit in which it is easiest to read: ``3.42 GiB``."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if abs(amount) >= 999.5 * size / 1024:  # 0.98 MiB, not 1003 KiB
            digits = 2 if abs(amount) < 10 * size else 1 if abs(amount) < 100 * size else 0
            return f"{amount / size:.{digits}f} {unit}"
    return f"{amount:.0f} B"


def told_rate(amount: float) -> str:
    """A speed: whole from 10 on, one digit below, and below 1 the first digit that is not zero: ``1,234``, ``0.3``."""
    if amount >= 9.95 or amount <= 0:
        return f"{amount:,.0f}"
    return f"{amount:.{max(1, -math.floor(math.log10(amount)))}f}"


def told_seconds(seconds: float) -> str:
    """A time on a clock: ``4:05``, ``12:34:56``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def told_age(seconds: float) -> str:
    """How long ago something was: ``just now``, ``3 hours ago``."""
    for unit, size in (("day", 86_400), ("hour", 3_600), ("minute", 60)):
        if seconds >= size:
            count = int(seconds // size)
            return f"{count:,} {unit}{'s' if count > 1 else ''} ago"
    return "just now"
