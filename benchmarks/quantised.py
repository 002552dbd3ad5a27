"""QLoRA against Hugging Face PEFT with bitsandbytes: a training step's time and its peak of memory.

    python -m benchmarks.quantised [--rounds 7]

The same NF4 model (double quantisation, bf16), the same LoRA (rank 8, all linears), batch and optimizer. Time: both
in one process, a step of each in turns, medians of the ratios. Memory: a process each, the highest resident size in
three steps, counted from when the model was loaded. Results: runs/quantised/peft.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import provenance, write_json

OUT = Path(__file__).parents[1] / "runs/quantised/peft.json"
SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12}
ROWS, TOKENS, VOCABULARY = 4, 256, 16384
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Step = Callable[[], float]


def base() -> Any:
    """A random Llama in NF4."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from inlay.bases.loading import read_quantised

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, vocab_size=VOCABULARY, max_position_embeddings=TOKENS)
    tensors = LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    return read_quantised(AutoModelForCausalLM, config, dict(tensors), "nf4", torch.bfloat16)[0].train()


def batch() -> dict[str, torch.Tensor]:
    """Rows whose first half is a prompt."""
    ids = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, : TOKENS // 2] = -100
    return {"input_ids": ids, "labels": labels}


def ours() -> Step:
    import inlay

    model = base()
    adapter = inlay.attach(model, inlay.LoRA(rank=8, alpha=16), where="all-linear")
    return stepping(model, list(adapter.parameters()))


def theirs() -> Step:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    prepared = prepare_model_for_kbit_training(base(), use_gradient_checkpointing=False)
    model = get_peft_model(prepared, LoraConfig(r=8, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM"))
    return stepping(model.train(), [p for p in model.parameters() if p.requires_grad])


def stepping(model: Any, parameters: list[Any]) -> Step:
    optimizer, rows = torch.optim.AdamW(parameters, lr=1e-4), batch()

    def step() -> float:
        started = time.process_time()
        loss = model(**rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.process_time() - started

    return step


CONTENDERS: dict[str, Callable[[], Step]] = {"inlay": ours, "peft": theirs}


def timed(rounds: int) -> dict[str, Any]:
    """Seconds of a step of each, in turns."""
    steps = {name: make() for name, make in CONTENDERS.items()}
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name in sorted(steps, reverse=number % 2 == 1):
            seconds[name].append(steps[name]())
    ratios = [a / b for a, b in zip(seconds["inlay"], seconds["peft"], strict=True)]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"seconds": medians, "ratio": statistics.median(ratios), "ratios": ratios}


def peaks() -> dict[str, int]:
    """Bytes above the loaded model that three steps of each take, a process each."""
    found = {}
    for name in CONTENDERS:
        command = [sys.executable, "-m", "benchmarks.quantised", "--peak-of", name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = int(json.loads(done.stdout.splitlines()[-1]))
    return found


def peak_of(name: str) -> int:
    """The highest resident size of this process while it trains."""
    step = CONTENDERS[name]()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    for _ in range(3):
        step()
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak-of", choices=tuple(CONTENDERS), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak_of:
        print(peak_of(asked.peak_of))
        return
    setting = {"model": SIZES, "vocabulary": VOCABULARY, "batch": [ROWS, TOKENS], "threads": torch.get_num_threads()}
    found = {"setting": setting, "time": timed(asked.rounds), "peak_bytes": peaks()}
    print(json.dumps(found, indent=2))
    packages = ["peft", "bitsandbytes"]
    write_json(OUT, found | {"provenance": provenance(seeds=[0], packages=packages)})


if __name__ == "__main__":
    main()
