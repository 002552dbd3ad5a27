"""Kernels and ratios on a GPU: `python -m benchmarks.gpu`, under eight minutes on one CUDA device.

Needs torch, transformers, peft and Triton, and nothing that is downloaded: weights are random, at the shape of a model
of 1.2 B parameters. First every kernel is held against its naive twin; then inlay and Hugging Face PEFT run
alternately in one process, as on the CPU, with the device idle before and after each run. Results go to
``runs/gpu/<device>.json``. What would begin after the seventh minute is left out, and the file says so.

Exit codes: 0; 1 where a kernel and its twin, or inlay and PEFT, do not agree; 2 without a CUDA device. ``--smoke`` runs
every line of it on the CPU instead, at tiny shapes and with Triton's interpreter; its ratios mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import mixed, switching
from benchmarks.contenders import Shape, copy_values, in_peft, randomise, token_rows, with_inlay, with_peft
from benchmarks.provenance import ROOT, provenance, write_json
from benchmarks.step import TOLERANCE, Case, agreement, floor_step, training_step
from benchmarks.timing import Timing, alternate, ratio
from inlay import LoRA
from inlay.kernels import gpu
from inlay.kernels.compiled import compile_layers

LATEST_S = 420  # when the last part may begin
LLAMA_1B = Shape(hidden=2048, intermediate=8192, layers=16, heads=32, vocabulary=32_000)
TINY = Shape(hidden=32, intermediate=48, layers=1, heads=2, vocabulary=64, dtype=torch.float32)


@dataclass(frozen=True, kw_only=True)
class Scale:
    """What is run, and where.

    Attributes:
        sizes: of the tensors that kernels are tried on (`inlay.kernels.gpu.twins.Sizes`).
        batch: rows and tokens of a training step.
        served: rows, each with an adapter of its own, and the tokens of their prompts.
        decoded: tokens a row in a run.
        runs, warmup: that count, and before them.
        backend: of torch.compile.
    """

    device: torch.device
    shape: Shape
    sizes: tuple[dict[str, Any], ...]
    batch: tuple[int, int]
    served: tuple[int, int]
    decoded: int
    runs: int
    warmup: int
    backend: str

    def case(self, dropout: float, labelled: float) -> Case:
        rows, tokens = self.batch
        name = f"LoRA r8 all linears, dropout {dropout}, {labelled:.0%} labelled"
        return Case(
            name=name, shape=self.shape, dropout=dropout, labelled=labelled, rows=rows, tokens=tokens, checked=self.runs
        )


FULL = Scale(
    device=torch.device("cuda"),
    shape=LLAMA_1B,
    sizes=(
        {"rows": 4096, "features": 2048, "rank": 8, "vocabulary": 32_000, "scored": 512},
        {"rows": 1000, "features": 8192, "rank": 64, "vocabulary": 128_256, "scored": 100, "share": 0.5},
        {"rows": 67, "features": 100, "rank": 3, "vocabulary": 301},
    ),
    batch=(4, 1024),
    served=(32, 128),
    decoded=16,
    runs=7,
    warmup=3,
    backend="inductor",
)
SMOKE = Scale(
    device=torch.device("cpu"),
    shape=TINY,
    sizes=({"rows": 5, "features": 12, "rank": 3, "vocabulary": 37, "scored": 2},),
    batch=(2, 6),
    served=(3, 4),
    decoded=1,
    runs=2,
    warmup=0,
    backend="eager",
)


# -- parts --------------------------------------------------------------------------------------------


def kernels(scale: Scale) -> dict[str, Any]:
    """How far each kernel is from its twin, by dtype and sizes."""
    from inlay.kernels.gpu import twins  # imports Triton

    rows = []
    for sizes in scale.sizes:
        for dtype, tolerance in twins.TOLERANCE.items():
            found = twins.differences(twins.Sizes(**sizes), scale.device, dtype)
            worst = max(found.values())
            rows.append(
                {"sizes": sizes, "dtype": str(dtype), "tolerance": tolerance, "differences": found,
                 "agree": worst <= tolerance}
            )  # fmt: skip
    return {"rows": rows, "agree": all(row["agree"] for row in rows)}


def step_with_dropout(scale: Scale) -> dict[str, Any]:
    """A training step with dropout and half the positions labelled, against PEFT's; and both peaks of memory."""
    return _steps(scale, scale.case(0.05, 0.5))


def step_without(scale: Scale) -> dict[str, Any]:
    """Without dropout, every position labelled, against PEFT's and the floor."""
    return _steps(scale, scale.case(0.0, 1.0), floor=True)


def _steps(scale: Scale, case: Case, *, floor: bool = False) -> dict[str, Any]:
    base = _built(scale).train()
    ours = with_inlay(base, case.trained, ["default"], seed=case.seed)
    theirs = in_peft(ours, base).to(scale.device)
    batch = _on(scale, case.batch())
    steps = {name: training_step(model, batch) for name, model in (("inlay", ours), ("peft", theirs))}
    for model in (ours, theirs):
        model.eval()  # masks of dropout come from different generators, so losses are compared without
    first = {name: [float(take()) for _ in range(case.checked)] for name, take in steps.items()}
    losses = agreement(first["inlay"], first["peft"], TOLERANCE[case.shape.dtype])
    for model in (ours, theirs):
        model.train()
    if floor:
        steps["floor"] = floor_step(base, batch)
    timings = _timed(scale, steps)
    peaks = {name: _peak(scale, step) for name, step in steps.items()}
    found = {"case": case.name, "batch": scale.batch, "losses": losses, "agree": losses["agree"]}
    found |= _reported(timings, [("inlay", "peft"), *([("inlay", "floor"), ("peft", "floor")] if floor else [])])
    return found | {"peak_bytes_above_the_models": peaks, "peak: inlay/peft": peaks["inlay"] / max(peaks["peft"], 1)}


def compiled(scale: Scale) -> dict[str, Any]:
    """A step with compiled layers against one without, and the steps after which compiling has paid."""
    from inlay.kernels import compiled as kernel

    kernel.BACKEND = scale.backend
    case = scale.case(0.0, 1.0)
    base = _built(scale).train()
    batch = _on(scale, case.batch())
    models = [with_inlay(base, case.trained, ["default"], seed=case.seed) for _ in range(2)]
    plain, other = (training_step(model, batch) for model in models)
    expected = [float(plain()) for _ in range(2)]
    compile_layers(models[1])
    began = time.perf_counter()
    found = [float(other())]
    seconds = time.perf_counter() - began
    found.append(float(other()))
    timings = _timed(scale, {"compiled": other, "eager": plain})
    apart = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    gain = timings["eager"].median - timings["compiled"].median
    tolerance = TOLERANCE[scale.shape.dtype]
    return {
        "seconds_to_the_first_step": round(seconds, 2),
        "pays_after_steps": int((seconds - timings["compiled"].median) / gain) + 1 if gain > 0 else None,
        "worst_relative_difference_of_losses": apart,
        "tolerance": tolerance,
        "agree": apart <= tolerance,
        **_reported(timings, [("compiled", "eager")]),
    }


def serving(scale: Scale) -> dict[str, Any]:
    """Rows with an adapter each: prefill and decode against the base alone and PEFT; switching between adapters."""
    base = _built(scale).eval()
    rows, prompt = scale.served
    names = [f"a{n}" for n in range(rows)]
    ours = with_inlay(base, LoRA(rank=8), names, seed=0).eval()
    theirs = with_peft(base, LoRA(rank=8), names).eval()
    randomise(ours, seed=1)
    copy_values(ours, theirs)
    ids = token_rows(scale.shape, rows, prompt).to(scale.device)
    callers = {
        "inlay": mixed._with_inlay(ours, names), "peft": mixed._with_peft(theirs, names), "base": mixed._plain(base),
    }  # fmt: skip
    agreement = mixed._logits_agree(callers, ids, mixed.TOLERANCE[scale.shape.dtype])
    with torch.inference_mode():
        prefill = _timed(scale, {n: mixed._prefill(c, ids) for n, c in callers.items()})
        decode = _timed(scale, {n: mixed._decode(c, ids, scale.decoded) for n, c in callers.items()})
    switches = {"inlay": switching._use(ours, names), "peft": switching._set_adapter(theirs, names)}
    switch = alternate(switches, runs=scale.runs, repeat={"inlay": switching.REPEAT})
    pairs = [("inlay", "base"), ("peft", "base"), ("inlay", "peft")]
    return {
        "rows": rows,
        "prompt_tokens": prompt,
        "decoded_tokens_a_run": scale.decoded,
        "logits": agreement,
        "agree": agreement["agree"],
        "prefill": _reported(prefill, pairs),
        "decode": _reported(decode, pairs),
        "switching": _reported(switch, [("inlay", "peft")]),
    }


PARTS: tuple[Callable[[Scale], dict[str, Any]], ...] = (kernels, step_with_dropout, step_without, serving, compiled)


# -- small parts --------------------------------------------------------------------------------------


def _built(scale: Scale) -> Any:
    with scale.device:
        return scale.shape.build()


def _on(scale: Scale, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(scale.device) for name, value in batch.items()}


def _timed(scale: Scale, contenders: Mapping[str, Callable[[], object]]) -> dict[str, Timing]:
    """`alternate`, with nothing left to do on the device when a run is over."""

    def waiting(run: Callable[[], object]) -> Callable[[], None]:
        def timed() -> None:
            run()
            _wait(scale)

        return timed

    _wait(scale)
    return alternate({n: waiting(run) for n, run in contenders.items()}, runs=scale.runs, warmup=scale.warmup)


def _wait(scale: Scale) -> None:
    if scale.device.type == "cuda":
        torch.cuda.synchronize()


def _peak(scale: Scale, step: Callable[[], object]) -> int:
    """Bytes of the device that a step takes beside what is there before it; 0 on a CPU."""
    if scale.device.type != "cuda":
        step()
        return 0
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def _reported(timings: Mapping[str, Timing], pairs: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "timings": {name: timing.to_dict() for name, timing in timings.items()},
        "ratios": {f"{a}/{b}": ratio(timings[a], timings[b]) for a, b in pairs},
    }


def measure(scale: Scale, *, latest_s: float = LATEST_S, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Every part in turn; a part that breaks is noted and counts as one that does not agree."""
    began, results = time.perf_counter(), dict[str, Any]()
    for part in PARTS:
        if time.perf_counter() - began > latest_s:
            results[part.__name__] = {"left_out": f"it would have begun after {latest_s:.0f} s"}
            continue
        started = time.perf_counter()
        try:
            results[part.__name__] = part(scale)
        except Exception as error:
            results[part.__name__] = {"failed": f"{type(error).__name__}: {error}", "agree": False}
        gc.collect()
        if scale.device.type == "cuda":
            torch.cuda.empty_cache()
        results[part.__name__]["seconds"] = round(time.perf_counter() - started, 1)
        say(f"{part.__name__}: {_line(results[part.__name__])}")
    return results


def _line(found: dict[str, Any]) -> str:
    if "failed" in found:
        return str(found["failed"])
    groups = {"": found, **{f"{name} ": v for name, v in found.items() if isinstance(v, dict)}}
    ratios = [f"{n}{r} {v['of_medians']:.2f}" for n, g in groups.items() for r, v in g.get("ratios", {}).items()]
    return ", ".join([*ratios, "agrees" if found["agree"] else "DOES NOT AGREE"])


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="every line of it on the CPU, at tiny shapes")
    parser.add_argument("--out", type=Path, help="default: runs/gpu/<device>.json")
    options = parser.parse_args(arguments)
    if options.smoke and not gpu.interpreted():  # Triton looks when it is imported, which torch may have done
        again = [sys.executable, "-m", "benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)]
        return subprocess.run(again, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}).returncode
    if not options.smoke and not torch.cuda.is_available():
        sys.stderr.write("no CUDA device here; nothing is measured (--smoke runs the script on the CPU)\n")
        return 2
    scale = SMOKE if options.smoke else FULL
    device = "smoke" if options.smoke else torch.cuda.get_device_name()
    out = options.out or ROOT / "runs" / ("tmp" if options.smoke else "gpu") / f"{_file_name(device)}.json"
    results = measure(scale)
    about = provenance(seeds=[0], packages=("triton",))
    write_json(out, {"provenance": about, "device": device, "shape": scale.shape.to_dict(), "results": results})
    print(f"written to {out}")
    return 0 if all(found.get("agree", True) for found in results.values()) else 1


def _file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


if __name__ == "__main__":
    sys.exit(main())
