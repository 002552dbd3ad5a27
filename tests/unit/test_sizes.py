"""Amounts of memory, read and shown."""

from __future__ import annotations

import pytest

from inlay.sizes import bytes_of, told_age, told_bytes, told_rate, told_seconds


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("16GiB", 2**34),
        ("24 GB", 24 * 10**9),
        ("16 G", 16 * 10**9),
        ("1.5MiB", 3 * 2**19),
        (" 500 mb ", 5 * 10**8),
        ("1.5k", 1500),
        ("100", 100),
        ("0GiB", 0),
    ],
)
def test_amounts(text: str, amount: int) -> None:
    assert bytes_of(text) == amount


@pytest.mark.parametrize("text", ["", "much", "16 H", "-3GB", "GiB", "1e3", "inf"])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not an amount"):
        bytes_of(text)


def test_amounts_have_an_end() -> None:
    with pytest.raises(ValueError, match="more memory than there is"):
        bytes_of("9" * 400 + "GiB")


def test_what_is_told() -> None:
    told = [told_bytes(n) for n in (5, 1536, 3 * 2**20, 2**34, 200 * 2**30, 2**41)]
    assert told == ["5 B", "1.50 KiB", "3.00 MiB", "16.0 GiB", "200 GiB", "2.00 TiB"]
    assert [told_bytes(n) for n in (999, 1003 * 2**10, 1023 * 2**30)] == ["999 B", "0.98 MiB", "1.00 TiB"]
    assert all(bytes_of(told_bytes(n)) == pytest.approx(n, rel=0.01) for n in range(1, 10**7, 9973))


@pytest.mark.parametrize(
    "amount, told",
    [(0.0, "0"), (0.31, "0.3"), (0.04, "0.04"), (0.0002, "0.0002"), (0.99, "1.0"), (3.14, "3.1"), (9.96, "10"),
     (12_345.6, "12,346")],
)  # fmt: skip
def test_speeds_are_never_told_as_nothing(amount: float, told: str) -> None:
    assert told_rate(amount) == told


def test_times() -> None:
    assert [told_seconds(s) for s in (0, 59.6, 245, 45_296)] == ["0:00", "1:00", "4:05", "12:34:56"]
    assert [told_age(s) for s in (5, 60, 7_300, 200_000)] == ["just now", "1 minute ago", "2 hours ago", "2 days ago"]
