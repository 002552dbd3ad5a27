"""This machine's speed: measured in a moment, once."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from inlay.machine.kept import cache_folder
from inlay.plan import calibrate, machine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the variable says where caches are on Linux")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[dict[str, float]]:
    """What measuring gave, so far; each time another speed."""
    found: list[dict[str, float]] = []

    def rates(at: torch.device) -> dict[str, float]:
        found.append({"fp32": 1e9 + len(found), "bf16": 2e9, "bandwidth": 3e9})
        return found[-1]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "_rates", rates)
    return found


def test_it_is_measured_once(measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first, again = calibrate(), calibrate()
    assert len(measured) == 1 and first.flops == again.flops == {"fp32": 1e9, "bf16": 2e9, "fp16": 2e9}
    assert first.age == 0 and again.age is not None and 0 <= again.age < 100 and first.bandwidth == 3e9
    assert calibrate(anew=True).flops["fp32"] == 1e9 + 1 == calibrate().flops["fp32"]
    for name, changed in (("get_num_threads", lambda: 999), ("__version__", "99.0")):
        monkeypatch.setattr(torch, name, changed)
        calibrate()
    assert len(measured) == 4
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX9")
    assert calibrate().age == 0 and len(measured) == 5


@pytest.mark.parametrize("written", [{}, [], None, {"fp32": "1", "bf16": 1.0, "bandwidth": 1.0},
                                     {"fp32": 0.0, "bf16": 1.0, "bandwidth": 1.0}])  # fmt: skip
def test_a_file_that_is_not_ours_is_measured_anew(measured: list[Any], written: Any) -> None:
    calibrate()
    (path,) = cache_folder().iterdir()
    path.write_text(json.dumps({"result": written}))
    assert calibrate().flops["fp32"] == 1e9 + 1 and len(measured) == 2


def test_real_speeds() -> None:
    rates = machine._rates(torch.device("cpu"))
    assert machine._are_rates(rates) and rates["bandwidth"] > 1e8
