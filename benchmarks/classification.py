"""Text classification in a plain PyTorch loop, fp32: LoRA on query and value of MiniLM-L6, TREC's questions.

    python -m benchmarks.classification                 here, as the processor is
    python -m benchmarks.classification --cpu-time      processor time, on a busy machine

Questions are shuffled and taken 32 at a time, and the tokenizer pads them to the longest of the batch: four in ten
positions are padding. A second figure is for batches of questions with the same number of tokens, which have none. Both
contenders are copies of one model with equal adapters and heads and see the same batches. The losses of the first steps
must agree, without dropout; while steps are timed, it is on.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import inlay
from benchmarks import step, steps, timing
from benchmarks.contenders import in_peft, trained
from benchmarks.realdata import TREC, minilm, shared_data
from benchmarks.report import Options, Part, Row, milliseconds, table
from benchmarks.timing import MINIMUM_RUNS, alternate, ratio
from benchmarks.trec import CLASSES
from inlay import LoRA

BATCH = 32
RUN = 8  # steps that are timed as one
MOST = 0.8
Batches = list[dict[str, Tensor]]


def measure(options: Options) -> Part:
    """A step's time as a share of PEFT's, with padding and without."""
    part = Part(raw=[])
    steps_a_run = 2 if options.tiny else RUN
    for padded in (True, False):
        name = "TREC on MiniLM-L6, LoRA on query and value, fp32, batch 32"
        name += ", padded to the longest" if padded else ", questions of one length"
        options.say(f"  {name}")
        found = compare(batches(steps_a_run, padded=padded, seed=0), options)
        part.raw.append({"work": name, **found})
        detail = f"{milliseconds(found['timings'])} for {steps_a_run} steps; {found['padding']:.0%} padding"
        most = MOST if padded else None
        part.rows.append(
            Row(work=f"{name}: step / PEFT's", value=found["ratio"]["of_medians"], most=most, detail=detail)
        )
        if not found["losses"]["agree"]:
            part.wrong.append(f"{name}, losses: {found['losses']}")
    return part


def batches(count: int, *, padded: bool, seed: int) -> Batches:
    """Batches of shuffled training questions with their classes.

    Args:
        padded: to the longest of a batch; else all questions are of the commonest length.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm())
    lines = (shared_data("trec") / TREC[0]).read_text(encoding="latin-1").splitlines()
    rows = [line.split(" ", 1) for line in lines if line.strip()]
    random.Random(seed).shuffle(rows)
    if not padded:
        lengths = [len(ids) for ids in tokenizer([text.strip() for _, text in rows])["input_ids"]]
        [(commonest, _)] = Counter(lengths).most_common(1)
        rows = [row for row, length in zip(rows, lengths, strict=True) if length == commonest]
    found = []
    for start in range(0, count * BATCH, BATCH):
        some = rows[start : start + BATCH]
        texts = tokenizer([text.strip() for _, text in some], padding=True, return_tensors="pt")
        found.append({**texts, "labels": torch.tensor([int(label) for label, _ in some])})
    return found


def compare(given: Batches, options: Options) -> dict[str, Any]:
    """Losses of the first steps without dropout, then timings with it."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=CLASSES, dtype=torch.float32)
    ours = copy.deepcopy(base)
    inlay.attach(ours, LoRA(rank=8, alpha=16), modules_to_save=["classifier"])
    models = {"inlay": ours, "peft": in_peft(ours, base)}
    losses: dict[str, list[float]] = {name: [] for name in models}
    takes = {name: steps.recorded(training_step(model.eval(), given), losses[name]) for name, model in models.items()}
    steps.take_on(takes, losses, options.checked)
    agreement = step.agreement(losses["inlay"], losses["peft"], step.TOLERANCE[torch.float32])
    for model in models.values():
        model.train()
    runs = {name: partial(_several, take, len(given)) for name, take in takes.items()}
    found = alternate(runs, runs=options.runs, warmup=1)
    masks = [batch["attention_mask"] for batch in given]
    return {
        "losses": agreement,
        "timings": {name: timed.to_dict() for name, timed in found.items()},
        "ratio": ratio(found["inlay"], found["peft"]),
        "padding": 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks),
        "shapes": [list(mask.shape) for mask in masks],
    }


def training_step(model: nn.Module, given: Batches) -> Callable[[], Tensor]:
    """A step of AdamW on the next batch; returns its loss."""
    optimizer = torch.optim.AdamW(trained(model), lr=step.LEARNING_RATE)
    taken = 0

    def take() -> Tensor:
        nonlocal taken
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = model(**given[taken % len(given)]).loss
        loss.backward()
        optimizer.step()
        taken += 1
        return loss.detach()

    return take


def _several(take: Callable[[], object], count: int) -> None:
    for _ in range(count):
        take()


def main(arguments: list[str] | None = None) -> int:
    """Returns 1 if losses disagree or the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=MINIMUM_RUNS)
    parser.add_argument("--threads", type=int, help="torch threads; the default is torch's own")
    parser.add_argument("--cpu-time", action="store_true", help="time what the process computes: for a busy machine")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.cpu_time:
        timing.count_processor_time()
    part = measure(Options(runs=given.runs, say=partial(print, flush=True)))
    Console().print(table(part.rows))
    for words in part.wrong:
        print(f"results disagree: {words}")
    return int(bool(part.wrong) or not all(row.met for row in part.rows))


if __name__ == "__main__":
    sys.exit(main())
