"""The method that README shows."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def readme_method() -> str:
    """The file that README's recipe for a method writes."""
    found = re.search(r"## Adding a method\n.*?```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None, "README shows no method under `## Adding a method`"
    return found[1]
