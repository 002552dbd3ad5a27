"""The planner against the memory that training really takes, on this machine's CPU.

    python -m benchmarks.memory_plan --out runs/plan/memory.json

Each combination of method, precision, checkpointing, batch, length and architecture is trained in a fresh process:

    1  everything is imported, and a tiny model of the same architecture, precision and method makes two steps, so
       that libraries have made what they make once; the resident memory is the *baseline*
    2  the model is made with random weights, the adapter attached, the optimizer created; the kernel's high-water
       mark of resident memory is set back (`/proc/self/clear_refs`)
    3  two steps: the first compares the head's two ways, the second has the optimizer's states
    4  the real peak is the high-water mark (`VmHWM`) minus the baseline

It is the whole process that is measured, with everything that the allocator, oneDNN and torch take on the way. glibc
is told to take blocks of 64 KiB and more from the kernel and to give them back when they are freed
(`MALLOC_MMAP_THRESHOLD_`); by default it keeps some of them, by an amount that depends on the order of everything
before. The same combinations can be measured with the default by `--default-malloc`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 12,
         "num_key_value_heads": 4, "vocab_size": 16384, "max_position_embeddings": 2048},
    ),
    "gpt2": ("GPT2Config", {"n_embd": 640, "n_layer": 10, "n_head": 10, "vocab_size": 16384, "n_positions": 1024}),
    "bert": (
        "BertConfig",
        {"hidden_size": 640, "intermediate_size": 2560, "num_hidden_layers": 8, "num_attention_heads": 10},
    ),
}  # fmt: skip
TINY = {"llama": {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 1}, "gpt2": {"n_embd": 80, "n_layer": 1},
        "bert": {"hidden_size": 80, "intermediate_size": 96, "num_hidden_layers": 1}}  # fmt: skip
METHODS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "lora": ("lora", {"rank": 16}, "all-linear"),
    "lora-dropout": ("lora", {"rank": 16, "dropout": 0.1}, "all-linear"),
    "dora": ("dora", {"rank": 16}, "all-linear"),
    "ia3": ("ia3", {}, None),
    "houlsby": ("houlsby", {}, None),
    "bitfit": ("bitfit", {}, None),
    "prefix-tuning": ("prefix-tuning", {"length": 20}, None),
    "prompt-tuning": ("prompt-tuning", {"length": 20, "init": "random"}, None),
    "vera": ("vera", {"rank": 64}, None),
    "full": ("full", {}, None),
}


def combinations() -> list[dict[str, Any]]:
    """Every method somewhere, and LoRA, DoRA and full fine-tuning over the grid."""
    rows = [
        {"model": model, "method": method, "precision": precision, "checkpointing": checkpointing, "batch": batch, "length": length}
        for model in ("llama", "gpt2")
        for method in ("lora", "dora")
        for precision in ("fp32", "bf16")
        for checkpointing in (False, True)
        for batch, length in ((1, 512), (4, 256), (8, 128))
    ]  # fmt: skip
    rows += [
        {"model": model, "method": method, "precision": "fp32", "checkpointing": False, "batch": 4, "length": 256}
        for model in ("llama", "gpt2", "bert")
        for method in METHODS
        if (model, method) not in (("llama", "bitfit"), ("bert", "prompt-tuning")) and not (model != "bert" and method in ("lora", "dora"))
    ]  # fmt: skip
    return rows


def child(row: dict[str, Any]) -> dict[str, float]:
    """Measure one combination in this process."""
    import gc

    import torch

    import inlay
    from inlay.plan.skeleton import DTYPES, Skeleton
    from inlay.plan.setting import Setting
    from inlay.plan.step import inputs

    def train(sizes: dict[str, Any], rows: int, length: int, steps: int, *, mark: bool) -> None:
        torch.manual_seed(0)
        skeleton = Skeleton(config_of(row["model"], **sizes))
        name, settings, where = METHODS[row["method"]]
        model = real(skeleton, DTYPES[row["precision"]])
        adapter = inlay.attach(model, inlay.methods()[name](**settings), where=where)
        if row["checkpointing"]:
            model.config.use_cache = False
            model.activation_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-4), fused=True)
        setting = Setting(batch=rows, length=length)
        if mark:
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")
        for _ in range(steps):
            loss = model(**inputs(model, setting, skeleton.task))["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            del loss

    train(TINY[row["model"]], 2, 32, 2, mark=False)
    gc.collect()
    before = status("VmRSS")
    train({}, row["batch"], row["length"], 2, mark=True)
    return {"peak": status("VmHWM") - before, "baseline": before}


def real(skeleton: Any, dtype: Any) -> Any:
    """The skeleton's model with random weights."""
    import torch
    import transformers

    from inlay.plan.skeleton import TASKS

    torch.set_num_threads(1)
    return getattr(transformers, TASKS[skeleton.task]).from_config(skeleton.config, dtype=dtype).train()


def status(field: str) -> float:
    """Bytes, from the kernel's account of this process."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def config_of(model: str, **sizes: Any) -> Any:
    import transformers

    name, values = MODELS[model]
    return getattr(transformers, name)(**{**values, **sizes})


def planned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The planner's answer for every combination, from configurations alone."""
    import inlay
    from inlay.plan import Planner, Setting, Skeleton

    planners: dict[tuple[str, str], Planner] = {}
    found = []
    for row in rows:
        key = (row["model"], row["method"])
        if key not in planners:
            name, settings, where = METHODS[row["method"]]
            planners[key] = Planner(Skeleton(config_of(row["model"])), inlay.methods()[name](**settings), where=where)
        asked = {k: row[k] for k in ("precision", "checkpointing", "batch", "length")}
        plan = planners[key].plan(Setting(**asked))
        found.append({"planned": plan.memory.total, "phase": plan.phase, "roles": plan.memory.to_dict()})
    return found


def measured(row: dict[str, Any], *, default_malloc: bool) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **({} if default_malloc else MALLOC)}
    command = [sys.executable, "-m", "benchmarks.memory_plan", "--one", json.dumps(row)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{row}: {done.stderr[-2000:]}")
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/plan/memory.json"))
    parser.add_argument("--one", help="measure this combination in this process (JSON)")
    parser.add_argument("--only", default="", help="words that a combination must hold, with commas")
    parser.add_argument("--default-malloc", action="store_true")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(child(json.loads(options.one))))
        return
    words = [w for w in options.only.split(",") if w]
    rows = [row for row in combinations() if all(w in map(str, row.values()) for w in words)]
    results = []
    for row, plan in zip(rows, planned(rows), strict=True):
        found = {**row, **plan, **measured(row, default_malloc=options.default_malloc)}
        found["error"] = found["planned"] / found["peak"] - 1
        results.append(found)
        name = " ".join(f"{value!s:>6}" for value in row.values())
        print(f"{name}  {found['phase']:<22} planned {found['planned'] / 2**20:8.1f}  "
              f"real {found['peak'] / 2**20:8.1f} MiB  {found['error']:+.1%}", flush=True)  # fmt: skip
    errors = sorted(abs(r["error"]) for r in results)
    summary = {"combinations": len(results), "median_error": statistics.median(errors), "worst_error": errors[-1]}
    print(summary)
    if words:
        return
    from benchmarks.provenance import provenance, write_json

    malloc = "default" if options.default_malloc else MALLOC
    where = provenance(seeds=[0])
    write_json(options.out, {"summary": summary, "malloc": malloc, "provenance": where, "results": results})


if __name__ == "__main__":
    main()
