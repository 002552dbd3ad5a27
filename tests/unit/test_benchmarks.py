"""The benchmarks' own checks: that they compare like with like, notice when not, and keep what they measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import mixed, peft_comparison, provenance, realdata, step, steps, switching
from benchmarks.contenders import Shape, copy_values, with_inlay, with_peft
from benchmarks.report import Options, Part, Row, table
from benchmarks.series import Job, run_series
from benchmarks.timing import Timing, alternate, ratio
from inlay import LoRA

TINY = Shape(hidden=32, intermediate=48, layers=2, heads=2, vocabulary=64, dtype=torch.float32)
CASE = step.Case(name="tiny", shape=TINY, rank=2, rows=2, tokens=8, checked=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_first_losses_equal_peft(dtype: torch.dtype, dropout: float) -> None:
    case = replace(CASE, shape=replace(TINY, dtype=dtype), dropout=dropout)
    found = steps.compare(steps.Contest(case=case), Options(runs=1, checked=4))
    assert found["losses"]["agree"], found["losses"]
    first, last = found["losses"]["first_and_last"]["inlay"]
    assert first != last  # a step that changed nothing would agree with anything


def test_losses_that_differ_are_noticed() -> None:
    base = TINY.build()
    ours = with_inlay(base, CASE.trained, ["default"], seed=0)
    theirs = with_peft(base, LoRA(rank=2, alpha=8.0), ["default"])
    copy_values(ours, theirs)
    steps = {"inlay": step.training_step(ours, CASE.batch()), "peft": step.training_step(theirs, CASE.batch())}
    ours, theirs = ([float(take()) for _ in range(CASE.checked)] for take in steps.values())
    assert not step.agreement(ours, theirs, step.TOLERANCE[TINY.dtype])["agree"]


@pytest.mark.parametrize("contest", steps.method_contests(), ids=lambda contest: contest.named + contest.case.name)
def test_methods_equal_their_peers(contest: steps.Contest) -> None:
    case = replace(contest.case, shape=TINY, rows=2, tokens=24)
    found = steps.compare(replace(contest, case=case), Options(runs=1, checked=4))
    assert found["losses"]["agree"], found["losses"]
    first, last = found["losses"]["first_and_last"]["inlay"]
    assert first != last


def test_a_missed_target_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [Row(work="fast", value=0.1, most=0.2), Row(work="told", value=9.0)]
    part = Part(rows)
    monkeypatch.setitem(peft_comparison.SECTIONS, "lora", lambda options: part)
    out = tmp_path / "found.json"
    assert peft_comparison.main(["--only", "lora", "--out", str(out)]) == 0
    rows.append(Row(work="slow", value=0.3, most=0.2))
    assert peft_comparison.main(["--only", "lora", "--out", str(out)]) == 1
    written = json.loads(out.read_text(encoding="utf-8"))
    assert [row["met"] for row in written["table"]] == [True, True, False]
    rows.pop()
    part.wrong.append("other losses")
    assert peft_comparison.main(["--only", "lora", "--out", str(out)]) == 1
    assert table(rows).row_count == 2
    assert [Row.of(row.to_dict()) for row in rows] == rows


def test_sections_are_measured_apart_and_told_together(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    peft_comparison.main(["--smoke", "--only", "activations", "switches", "--out", str(out)])
    written = json.loads(out.read_text(encoding="utf-8"))
    assert list(written["sections"]) == list(written["seconds"]) == ["activations", "switches"]
    assert len(written["table"]) == 4 and not written["disagreements"]


def test_adapters_at_other_places_are_refused() -> None:
    base = TINY.build()
    ours = with_inlay(base, CASE.trained, ["one"], seed=0)
    with pytest.raises(ValueError, match="different places"):
        copy_values(ours, with_peft(base, CASE.trained, ["other"]))


def test_the_floor_trains_nothing() -> None:
    base = TINY.build()
    before = [p.clone() for p in base.parameters()]
    step.floor_step(base, CASE.batch())()
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(base.parameters(), before, strict=True))


def test_switches_serve_what_was_asked_for() -> None:
    found = switching.compare(adapters=3, shape=TINY, runs=1)
    assert found["outputs"]["agree"], found["outputs"]
    assert found["layers"] == 2 * 7


def test_attaching_is_timed() -> None:
    found = switching.compare_attaching(adapters=3, shape=TINY, runs=1)
    assert set(found["first"]) == set(found["last"]) == {"inlay", "peft"}


def test_mixed_methods_equal_rows_alone() -> None:
    found = mixed.compare_methods(mixed.Load(shape=TINY, rows=5, prompt=6, steps=2), runs=1)
    assert found["logits"]["agree"], found["logits"]
    assert len(found["methods"]) == 5


def test_mixed_batches_equal_peft() -> None:
    found = mixed.compare(mixed.Load(shape=TINY, rows=4, prompt=6, steps=2), counts=(1, 2, 4), runs=1)
    assert [r["adapters"] for r in found["results"]] == [1, 2, 4]
    assert all(r["logits"]["agree"] for r in found["results"]), found["results"]


def test_rounds_alternate() -> None:
    order: list[str] = []
    found = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, runs=2, warmup=1)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert all(len(t.seconds) == 2 for t in found.values())


def test_a_ratio_tells_the_medians_and_the_extremes() -> None:
    found = ratio(Timing((1.0, 2.0, 9.0)), Timing((2.0, 2.0, 3.0)))
    assert found == {"of_medians": 1.0, "lowest_round": 0.5, "highest_round": 3.0}


def test_provenance_names_no_path_of_the_machine() -> None:
    text = json.dumps(provenance.provenance(seeds=[0]))
    assert str(provenance.ROOT) not in text
    assert json.loads(text)["versions"].keys() >= {"python", "inlay", "torch", "transformers", "peft"}


def test_a_series_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    program = "import sys, json; json.dump({'score': int(sys.argv[2])}, open(sys.argv[1], 'w'))"

    def run(*jobs: Job, settings: dict[str, int] | None = None) -> dict[str, dict[str, int]]:
        content = run_series(
            jobs,
            out=out,
            settings=settings or {"epochs": 1},
            command=lambda job, report: ["-c", program, str(report), str(job.seed)],
            say=lambda _: None,
        )
        return content["results"]

    assert run(Job("lora", 1))["lora seed 1"]["score"] == 1
    first = json.loads(out.read_text())["results"]["lora seed 1"]
    assert run(Job("lora", 1), Job("lora", 2))["lora seed 1"] == first
    with pytest.raises(SystemExit, match="settings"):
        run(Job("lora", 1), settings={"epochs": 2})
    with pytest.raises(SystemExit, match="failed"):
        run_series([Job("x", 0)], out=out, settings={"epochs": 1}, command=lambda job, report: ["-c", "1/0"])
    assert set(json.loads(out.read_text())["results"]) == {"lora seed 1", "lora seed 2"}


def test_real_data_is_read_whole(tmp_path: Path) -> None:
    try:
        trec = realdata.trec_as_jsonl(tmp_path)
        e2e = realdata.e2e_as_jsonl(tmp_path, rows=100, meanings=None, seed=0)
    except FileNotFoundError as absent:
        pytest.skip(str(absent))
    questions = [[json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in trec]
    assert [len(q) for q in questions] == [5452, 500]
    assert {row["label"] for row in questions[0]} == set("012345")
    train, dev = ([json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in e2e)
    assert len(train) == 100 and len(dev) == 4672
    assert len({row["mr"] for row in dev}) == 547


def test_a_run_that_stays_where_it_began_has_learnt_nothing():
    from benchmarks.quality.__main__ import learnt

    assert not learnt([0.69, 0.70, 0.93, 0.57, 0.69, 0.68, 0.70, 0.69] * 20, 0.1)
    assert learnt([0.69] * 20 + [0.6 - 0.001 * step for step in range(300)], 0.1)
    assert not learnt([1.8, 1.2, *[1.75] * 50], 0.1)
    trained_before = [1.0] * 20 + [1.2] * 300
    assert learnt(trained_before, -0.3) and not learnt(trained_before, -0.1)
