"""What tests need, here and in packages that bring methods of their own."""

from __future__ import annotations

from inlay.testing.models import ZOO, Specimen

__all__ = ["ZOO", "Specimen"]
