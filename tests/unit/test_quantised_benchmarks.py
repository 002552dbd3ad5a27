"""The benchmarks of quantised bases: that they compare like with like, and the one that a test can repeat."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import big_model, memory_plan, qlora, quantised
from benchmarks.contenders import Shape

# 239 million numbers: 0.48 GB in bf16.
SIZES = {"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 8192}


def test_steps_equal_peft() -> None:
    shape = Shape(hidden=64, intermediate=128, layers=2, heads=2, vocabulary=64)
    found = quantised.compare(shape, rows=2, tokens=16, runs=1, checked=4)
    assert set(found["against"]) == {"peft", "peft-prepared"}
    for peer in found["against"].values():
        assert peer["losses"]["agree"], peer["losses"]
        first, last = peer["losses"]["first_and_last"]["inlay"]
        assert first != last


def test_what_falls_short_is_said() -> None:
    def found(step: float, memory: float, difference: float) -> dict[str, Any]:
        losses = {"agree": difference < 1e-3, "worst_relative_difference": difference}
        peers = {"peft": {"losses": losses, "ratio": {"of_medians": step}}}
        return {"against": peers, "memory_ratio": {"peft": {"peak": memory, "above": 0.5}}}

    assert quantised.missed(found(0.8, 1.0, 1e-4)) == []
    assert len(quantised.missed(found(0.81, 1.01, 1.0))) == 3


def test_what_is_planned_and_measured() -> None:
    """At least forty combinations: both sides of every choice, and two architectures in each precision."""
    rows = memory_plan.combinations()
    assert len(rows) >= 40 and len({tuple(row.values()) for row in rows}) == len(rows)
    for precision in ("fp32", "bf16", "nf4"):
        own = [row for row in rows if row["precision"] == precision]
        assert len({row["model"] for row in own}) >= 2 and {row["checkpointing"] for row in own} == {True, False}
    assert memory_plan.setting_of(rows[0] | {"precision": "nf4"})["quantisation"] == "nf4"


def test_points_between_bases(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("bf16", 0, 0.95), ("nf4", 0, 0.94), ("bf16", 1, 0.96), ("nf4", 1, 0.96), ("bf16", 2, 0.5)]
    results = {f"{m} seed {s}": {"method": m, "seed": s, "accuracy": a} for m, s, a in rows}
    qlora.show("trec", {"results": results})
    assert "NF4 -0.50 points" in capsys.readouterr().out


@pytest.mark.exhaustive  # how much address space libraries reserve depends on what else the machine does
def test_a_model_larger_than_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights in bf16 do not fit beside the libraries; in NF4 they do, and are trained."""
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # or each thread reserves 64 MiB that it does not use
    found = big_model.measure(SIZES, steps=2, share=0.85, beside_libraries=True)
    assert found["bf16"]["fits"] is False and "alloc" in found["bf16"]["error"].lower()
    nf4 = found["nf4"]
    assert "losses" in nf4, nf4
    assert len(nf4["losses"]) == 2 and nf4["losses"][1] < nf4["losses"][0]
    assert nf4["weights_quantised_bytes"] < 0.31 * found["bf16_bytes"]
