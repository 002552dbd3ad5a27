"""Which precision a machine is given, how that is found out, and what a user is told."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.machine import precision
from inlay.machine.kept import cache_folder, kept
from inlay.machine.precision import choose, dtype_of, half_of, precision_of


@pytest.fixture
def unfound() -> Iterator[None]:
    """Nothing found out about devices, before and after."""
    half_of.cache_clear()
    yield
    half_of.cache_clear()


@pytest.mark.parametrize(
    ("asked", "stored", "half", "quantised", "expected"),
    [
        ("auto", "bf16", "bf16", False, "bf16"),
        ("auto", "bf16", None, False, "fp32"),
        ("auto", "bf16", "fp16", False, "fp16"),
        ("auto", "fp16", "bf16", False, "bf16"),
        ("auto", "fp16", None, False, "fp32"),
        ("auto", "fp32", "bf16", False, "fp32"),  # what is stored is not rounded
        ("auto", "fp32", "fp16", False, "fp32"),
        ("auto", "fp32", "bf16", True, "bf16"),
        ("auto", "fp32", "fp16", True, "fp16"),
        ("auto", "bf16", None, True, "fp32"),
        ("bf16", "fp32", None, False, "bf16"),
        ("fp16", "bf16", "bf16", False, "fp16"),
        ("fp32", "bf16", "bf16", True, "fp32"),
    ],
)
def test_the_choice(asked: Any, stored: Any, half: Any, quantised: bool, expected: str) -> None:
    chosen = choose(asked, stored, half, device="a T4", quantised=quantised)
    assert chosen.precision == expected
    told = str(chosen)
    assert told.startswith(f"precision: {expected} (") and "\n" not in told and len(told) < 120
    assert ("as asked" in told) == (asked != "auto")
    assert ("fp32 is faster" in told) == (asked == "bf16" and half is None)


def test_names_and_types() -> None:
    for name in ("fp32", "bf16", "fp16"):
        assert precision_of(dtype_of(name)) == precision_of(str(dtype_of(name))) == name  # type: ignore[arg-type]
    assert precision_of("bfloat16") == "bf16" and precision_of(None) == precision_of(torch.float64) == "fp32"


def test_what_a_gpu_has(monkeypatch: pytest.MonkeyPatch, unfound: None) -> None:
    native = {"yes": True}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *, including_emulation: native["yes"])
    assert half_of("cuda") == "bf16"
    half_of.cache_clear()
    native["yes"] = False
    assert half_of("cuda") == "fp16"


def test_a_device_that_cannot_compute_in_bf16_has_no_16_bits(monkeypatch: pytest.MonkeyPatch, unfound: None) -> None:
    def refuses(*_: Any, **__: Any) -> Any:
        raise TypeError("BFloat16 is not supported on MPS")

    monkeypatch.setattr(torch, "ones", refuses)
    assert half_of("mps") is None


@pytest.mark.parametrize("pays", [True, False])
def test_a_cpu_whose_flags_do_not_say_is_measured_once(
    pays: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unfound: None
) -> None:
    measured = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(precision, "_flags", lambda: None)
    monkeypatch.setattr(precision, "_bf16_pays", lambda: measured.append(1) or pays)
    if sys.platform == "linux":
        for _ in range(2):
            half_of.cache_clear()  # as another process
            assert half_of("cpu") == ("bf16" if pays else None)
        assert len(measured) == 1
    monkeypatch.setattr(precision, "_flags", lambda: not pays)
    half_of.cache_clear()
    assert half_of("cpu") == (None if pays else "bf16")


def test_measuring_takes_milliseconds_and_tells_the_emulated_apart() -> None:
    """Where oneDNN has no bf16 at all, products are emulated by far; elsewhere either answer may be right."""
    began = time.perf_counter()
    found = precision._bf16_pays()
    assert time.perf_counter() - began < 5  # 15 ms on a machine that does nothing else
    if platform.machine() == "x86_64" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert not found


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variables are for processors of this kind")
def test_forbidden_instructions_are_not_used() -> None:
    """As tests and benchmarks imitate a processor without bf16."""
    code = "from inlay.machine.precision import half_of; print(half_of('cpu'))"
    restricted = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", code], env=restricted, capture_output=True, text=True, timeout=60)
    assert done.stdout == "None\n", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="the variable says where caches are on Linux")
def test_what_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache" / "inlay"
    assert kept("fact", {"torch": "1"}, lambda: 1).value == 1
    assert kept("fact", {"torch": "1"}, lambda: 2).value == 1  # not measured again
    assert kept("fact", {"torch": "2"}, lambda: 2).value == 2  # under other circumstances
    for path in cache_folder().iterdir():
        assert json.loads(path.read_text())["result"] in (1, 2)
        path.write_text("{")
    assert kept("fact", {"torch": "1"}, lambda: 3).value == kept("fact", {"torch": "1"}, lambda: 4).value == 3
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert kept("fact", {"torch": "1"}, lambda: 5) == (5, 0.0)  # nowhere to keep it


@pytest.mark.skipif(sys.platform != "linux", reason="the variable says where caches are on Linux")
def test_what_is_kept_ages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept("fact", {}, lambda: 1)
    (path,) = cache_folder().iterdir()
    os.utime(path, (path.stat().st_mtime - 7200,) * 2)
    value, age = kept("fact", {}, lambda: 2)
    assert value == 1 and 7200 <= age < 7300
    assert kept("fact", {}, lambda: 3, usable=lambda value: value != 1) == (3, 0.0)  # not what could be measured
    os.utime(path, (path.stat().st_mtime - 7200,) * 2)
    assert kept("fact", {}, lambda: 4, lasts=3600) == (4, 0.0)


def _net(dtype: torch.dtype) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).to(dtype)


def test_a_slow_model_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_told", False)
    monkeypatch.setattr(precision, "half_of", lambda device: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inlay.attach(_net(torch.float32), inlay.LoRA(rank=2), where=["0"])
    slow = _net(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"computes in bfloat16.*model\.float\(\)"):
        inlay.attach(slow, inlay.LoRA(rank=2), where=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inlay.attach(slow, inlay.LoRA(rank=2), name="second", where=["0"])
        inlay.attach(_net(torch.float16), inlay.LoRA(rank=2), where=["0"])


def test_a_model_that_is_fast_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_told", False)
    monkeypatch.setattr(precision, "half_of", lambda device: "bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inlay.attach(_net(torch.bfloat16), inlay.LoRA(rank=2), where=["0"])
