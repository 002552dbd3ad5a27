"""The planner against the memory that training really takes, on this machine's CPU.

    python -m benchmarks.memory_plan --out runs/plan/memory.json

Each combination of method, precision (float32, bfloat16, or NF4 weights beside bfloat16), checkpointing, batch,
length and architecture is trained in a process of its own, forked from one that has imported the libraries and done
nothing else:

    1  a model of the same widths with one layer makes two steps and is let go of, so that libraries have made what
       they make once and keep (code generated for these shapes, buffers for packed panels); the resident memory is
       the *baseline*
    2  the model is made with random weights (and quantised), the adapter attached, the optimizer created; the
       kernel's high-water mark of resident memory is set back (`/proc/self/clear_refs`)
    3  two steps: the first compares the head's two ways, the second has the optimizer's states
    4  the real peak is the high-water mark (`VmHWM`) minus the baseline

It is the whole process that is measured, with everything that the allocator, oneDNN and torch take on the way. glibc
is told to take blocks of 16 KiB and more from the kernel and to give them back when they are freed
(`MALLOC_MMAP_THRESHOLD_`); by default it keeps some of them, by an amount that depends on the order of everything
before. The same combinations can be measured with the default by `--default-malloc`. A run that was cut off goes on
with the combinations that its results lack; each result says at which commit it was measured.
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

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "16384", "MALLOC_ARENA_MAX": "1"}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
         "num_key_value_heads": 4, "vocab_size": 8192, "max_position_embeddings": 2048},
    ),
    "gpt2": ("GPT2Config", {"n_embd": 512, "n_layer": 8, "n_head": 8, "vocab_size": 8192, "n_positions": 1024}),
    "bert": (
        "BertConfig",
        {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8},
    ),
}  # fmt: skip
ONE_LAYER = {"llama": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1}, "bert": {"num_hidden_layers": 1}}
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


# Llama has no biases; a classifier's pooled token does not see prompts in front of it as a text's tokens do.
UNFIT = (("llama", "bitfit"), ("bert", "prompt-tuning"), ("bert", "vera"), ("gpt2", "houlsby"))


def combinations() -> list[dict[str, Any]]:
    """LoRA over the grid, and every method on each architecture that it fits."""
    names = ("model", "method", "precision", "checkpointing", "batch", "length")
    shapes = ((4, 256), (1, 512), (8, 128))
    grid = [
        (model, "lora", precision, checkpointing, batch, length)
        for model in ("llama", "gpt2")
        for precision in ("fp32", "bf16", "nf4")
        for batch, length in (shapes if precision != "nf4" else shapes[:2])
        for checkpointing in (False, True)
    ]
    each = [
        (model, method, "fp32", False, 4, 256)
        for method in METHODS
        for model in ("llama", "gpt2", "bert")
        if (model, method) not in UNFIT and (method != "lora" or model == "bert")
    ]
    quantised = [("llama", method, "nf4", True, 4, 256) for method in ("dora", "houlsby", "prefix-tuning")]
    return [dict(zip(names, values, strict=True)) for values in (*grid, *each, *quantised)]


def setting_of(row: dict[str, Any]) -> dict[str, Any]:
    """What a row's words mean to the planner: weights of 4 bits stand beside bfloat16."""
    asked = {name: row[name] for name in ("precision", "checkpointing", "batch", "length")}
    return {**asked, "precision": "bf16", "quantisation": "nf4"} if row["precision"] == "nf4" else asked


def child(row: dict[str, Any]) -> dict[str, float]:
    """Measure one combination in this process."""
    import gc

    import torch

    import inlay
    from inlay.machine.precision import dtype_of
    from inlay.plan.setting import Setting
    from inlay.plan.skeleton import Skeleton
    from inlay.plan.step import inputs

    def train(sizes: dict[str, Any], rows: int, length: int, steps: int, *, mark: bool) -> None:
        torch.manual_seed(0)
        skeleton = Skeleton(config_of(row["model"], **sizes))
        name, settings, where = METHODS[row["method"]]
        asked = setting_of(row)
        model = real(skeleton, dtype_of(asked["precision"]), asked.get("quantisation"))
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

    train(ONE_LAYER[row["model"]], row["batch"], row["length"], 2, mark=False)
    gc.collect()
    before = status("VmRSS")
    train({}, row["batch"], row["length"], 2, mark=True)
    return {"peak": status("VmHWM") - before, "baseline": before}


def real(skeleton: Any, dtype: Any, quantisation: str | None) -> Any:
    """The skeleton's model with random weights, as `inlay train` would load it."""
    import torch
    import transformers

    from inlay.bases.loading import read_quantised
    from inlay.plan.skeleton import TASKS

    torch.set_num_threads(1)
    auto = getattr(transformers, TASKS[skeleton.task])
    model = auto.from_config(skeleton.config, dtype=dtype)
    if quantisation is not None:
        transformers.utils.logging.disable_progress_bar()
        model = read_quantised(auto, skeleton.config, dict(model.state_dict()), quantisation, dtype)[0]
    return model.train()


def status(field: str) -> float:
    """Bytes, from the kernel's account of this process."""
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(float(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def config_of(model: str, **sizes: Any) -> Any:
    import transformers

    name, values = MODELS[model]
    return getattr(transformers, name)(**{**values, **sizes})


def planned(row: dict[str, Any], planners: dict[tuple[str, str], Any]) -> dict[str, Any]:
    """The planner's answer for one combination, from the configuration alone."""
    import inlay
    from inlay.plan import Planner, Setting, Skeleton

    key = (row["model"], row["method"])
    if key not in planners:
        name, settings, where = METHODS[row["method"]]
        planners[key] = Planner(Skeleton(config_of(row["model"])), inlay.methods()[name](**settings), where=where)
    plan = planners[key].plan(Setting(**setting_of(row)))
    return {"planned": plan.memory.total, "phase": plan.phase, "roles": plan.memory.to_dict()}


class Measuring:
    """A process that measures combinations, each in a fork of it that has trained nothing before."""

    def __init__(self, *, default_malloc: bool) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **({} if default_malloc else MALLOC)}
        command = [sys.executable, "-m", "benchmarks.memory_plan", "--serve"]
        self._process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> Measuring:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def measured(self, row: dict[str, Any]) -> dict[str, float]:
        given, told = self._process.stdin, self._process.stdout
        assert given is not None and told is not None, "both are pipes"
        given.write(json.dumps(row) + "\n")
        given.flush()
        answer = told.readline()
        if not answer.startswith("{"):
            raise RuntimeError(f"{row} could not be measured: {answer.strip() or 'the process has ended'}")
        values: dict[str, float] = json.loads(answer)
        return values


def serve() -> None:
    """Answer each line of standard input, a combination, with a line of what was measured in a fork."""
    import bitsandbytes  # noqa: F401
    import torch  # noqa: F401

    import inlay.plan
    import inlay.train

    inlay.methods()
    for line in sys.stdin:
        fork = os.fork()
        if not fork:
            try:
                print(json.dumps(child(json.loads(line))), flush=True)
            finally:
                os._exit(0)
        _, status_code = os.waitpid(fork, 0)
        if status_code:
            print(f"exit status {status_code}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/plan/memory.json"))
    parser.add_argument("--replan", action="store_true", help="only plan again what was measured")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="words that a combination must hold, with commas")
    parser.add_argument("--default-malloc", action="store_true")
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    from benchmarks.provenance import git_state, read_json

    if options.replan:
        replan(options.out)
        return
    words = [w for w in options.only.split(",") if w]
    rows = [row for row in combinations() if all(w in map(str, row.values()) for w in words)]
    keys = list(rows[0])
    results: list[dict[str, Any]] = [] if words else read_json(options.out).get("results", [])
    done = [[r[k] for k in keys] for r in results]
    rows = [row for row in rows if [row[k] for k in keys] not in done]
    planners: dict[tuple[str, str], Any] = {}
    with Measuring(default_malloc=options.default_malloc) as measuring:
        for row in rows:
            found = {**row, **planned(row, planners), **measuring.measured(row), "commit": git_state()["commit"]}
            found["error"] = found["planned"] / found["peak"] - 1
            results.append(found)
            name = " ".join(f"{value!s:>6}" for value in row.values())
            print(f"{name}  {found['phase']:<22} planned {found['planned'] / 2**20:8.1f}  "
                  f"real {found['peak'] / 2**20:8.1f} MiB  {found['error']:+.1%}", flush=True)  # fmt: skip
            if not words:
                write(options.out, results, options.default_malloc)
    print(summary(results))


def replan(path: Path) -> None:
    """Hold today's planner against what was measured."""
    from benchmarks.provenance import read_json

    content, planners = read_json(path), {}  # type: ignore[var-annotated]
    for row in content["results"]:
        row |= planned(row, planners)
        row["error"] = row["planned"] / row["peak"] - 1
    write(path, content["results"], content["malloc"] == "default")
    print(summary(content["results"]))


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    errors = sorted(abs(r["error"]) for r in results)
    return {"combinations": len(results), "median_error": statistics.median(errors), "worst_error": errors[-1]}


def write(path: Path, results: list[dict[str, Any]], default_malloc: bool) -> None:
    from benchmarks.provenance import provenance, write_json

    malloc = "default" if default_malloc else MALLOC
    document = {"summary": summary(results), "malloc": malloc, "provenance": provenance(seeds=[0]), "results": results}
    write_json(path, document)


if __name__ == "__main__":
    main()
