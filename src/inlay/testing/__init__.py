"""Tools for tests, here and in packages with methods of their own."""

from __future__ import annotations

from inlay.testing.check import check_method
from inlay.testing.laws import LAWS, SLOW_LAWS, refusal
from inlay.testing.models import ZOO, Specimen

__all__ = ["LAWS", "SLOW_LAWS", "ZOO", "Specimen", "check_method", "refusal"]
