"""A method in one new file outside the package, registered by entry point, gets everything the built-in ones get."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

METHOD = '''
"""Scale and shift (SSF, arXiv:2210.08823): y' = g * y + s, per output; g starts at one, s at zero."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from inlay.core.delta import Delta, DeltaMethod, cast
from inlay.core.method import Recipe


@dataclass(frozen=True, kw_only=True)
class ScaleShift(DeltaMethod):
    name: ClassVar[str] = "scale-shift"
    paper: ClassVar[str] = "arXiv:2210.08823"
    family: ClassVar[str] = "rescaling"
    recipe: ClassVar[Recipe] = Recipe(learning_rate=5e-3)
    default_where: ClassVar[tuple[str, ...]] = ("query", "value")

    shift: bool = True

    def build(self, site):
        return ScaleShiftDelta(site, self.shift)

    @classmethod
    def examples(cls):
        return [cls(), cls(shift=False)]


class ScaleShiftDelta(Delta):
    def __init__(self, site, shift):
        super().__init__()
        self.gain = nn.Parameter(site.empty(site.out_features))
        self.shift = nn.Parameter(site.empty(site.out_features)) if shift and site.bias else None

    def initialise(self, site):
        nn.init.ones_(self.gain)
        if self.shift is not None:
            nn.init.zeros_(self.shift)

    def post(self, x, y, site):
        y = y * cast(self.gain, y)
        return y if self.shift is None else y + cast(self.shift, y)

    def weight(self, weight, bias):
        scaled = None if bias is None else bias * self.gain
        return weight * self.gain[:, None], scaled if self.shift is None or scaled is None else scaled + self.shift
'''

SCRIPT = """
import inlay
from inlay.testing import check_method
from inlay.testing.models import ZOO

method = inlay.methods()["scale-shift"]
check_method(method, [ZOO[name] for name in ("llama", "gpt2", "bert", "t5")])

model, batch = ZOO["llama"].build(), ZOO["llama"].batch(3, 0)
inlay.attach(model, method(), name="mine")
inlay.attach(model, inlay.PrefixTuning(length=3), name="prefix")
with inlay.use(model, ["mine", None, "prefix"]):
    assert model(**batch).logits.shape[0] == 3
inlay.merge(model, "mine")
inlay.unmerge(model)
inlay.save(model, "mine", "stored")
assert inlay.load(ZOO["llama"].build(), "stored").method == method()
"""


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a process that has the package ``ssf`` installed: one module and its metadata."""
    (tmp_path / "ssf.py").write_text(METHOD)
    metadata = tmp_path / "ssf-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ssf\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[inlay.methods]\nscale-shift = ssf:ScaleShift\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}


def test_laws_batches_storage_and_merging(installed: dict[str, str], tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=installed, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_row_in_the_methods_table(installed: dict[str, str]) -> None:
    program = "import sys; from inlay.cli.main import main; sys.argv = ['inlay', 'methods', '--json']; main()"
    done = subprocess.run([sys.executable, "-c", program], env=installed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["method"]: row for row in json.loads(done.stdout)["methods"]}
    assert rows["scale-shift"]["merges"] and rows["scale-shift"]["mixed_batches"]
    assert rows["scale-shift"]["trained"] > 0
