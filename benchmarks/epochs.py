"""Whole training runs: `inlay train` against PEFT in transformers' Trainer, on real rows.

    E2E     one epoch of all 42,061 rows on the embedded base, LoRA r8 on all linear layers
    TREC    five epochs of all 5,452 questions on MiniLM-L6 in bf16

Both see the same rows, batch and rate; the peer pads to the longest row of a batch and scores completions only, as
inlay does. What is timed is a run over a sample of the rows, from the call to the adapter on the disk, reading and
tokenising included, libraries loaded before. The whole work's time is this run's and, for each step more that it has,
the mean of the run's steps behind the first. (TREC taken whole, once each, with the accuracy: `benchmarks.trec`.)
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.realdata import e2e_as_jsonl, minilm, trec_as_jsonl
from benchmarks.report import Options, Part, Row, milliseconds
from benchmarks.timing import Timing, alternate, now, ratio
from benchmarks.trec import CLASSES

E2E_ROWS, E2E_BATCH, E2E_RATE = 160, 16, 2e-3
TREC_ROWS, TREC_BATCH, TREC_RATE = 1_024, 32, 1e-3  # inlay sorts by length within so many
E2E_STEPS, TREC_STEPS = -(-42_061 // E2E_BATCH), 5 * -(-5_452 // TREC_BATCH)  # of the whole work
E2E_MOST, TREC_MOST = 0.35, 0.4
CLOSE = 0.1  # of the mean loss: rows come in another order


@dataclass(frozen=True, kw_only=True)
class Work:
    """What both train on.

    Attributes:
        data: the sample of the rows.
        steps: of the whole work.
    """

    data: Path
    base: Path
    causal: bool
    batch: int
    rate: float
    steps: int


def e2e(options: Options) -> Part:
    """One epoch on real rows."""
    from inlay.train.loading import base_source

    rows = 64 if options.tiny else E2E_ROWS
    with tempfile.TemporaryDirectory() as folder:
        data, _ = e2e_as_jsonl(Path(folder), rows=rows, meanings=1, seed=0)
        work = Work(data=data, base=Path(base_source(None)), causal=True, batch=E2E_BATCH, rate=E2E_RATE,
                    steps=E2E_STEPS)  # fmt: skip
        return _compared(work, Path(folder), "one epoch of all E2E rows, embedded base", E2E_MOST, options)


def trec(options: Options) -> Part:
    """One epoch on some questions."""
    rows = 128 if options.tiny else TREC_ROWS
    with tempfile.TemporaryDirectory() as folder:
        data, _ = trec_as_jsonl(Path(folder), rows=rows)
        work = Work(data=data, base=minilm(), causal=False, batch=TREC_BATCH, rate=TREC_RATE,
                    steps=TREC_STEPS)  # fmt: skip
        return _compared(
            work, Path(folder), "5 epochs of TREC, MiniLM-L6 (accuracy: benchmarks.trec)", TREC_MOST, options
        )


def _compared(work: Work, folder: Path, name: str, most: float, options: Options) -> Part:
    from inlay.train.quiet import quiet_libraries

    losses: dict[str, float] = {}
    steps: dict[str, list[list[float]]] = {"inlay": [], "peft": []}  # who → run → seconds of each step but the first

    def run(who: str, train: Callable[[Work, Path], float]) -> None:
        with _clocked() as ends:
            losses[who] = train(work, folder / who)
        steps[who].append([b - a for a, b in pairwise(ends)])

    with quiet_libraries():
        sample = alternate(
            {"inlay": partial(run, "inlay", with_inlay), "peft": partial(run, "peft", with_peft)},
            runs=options.runs,
            warmup=1,
        )
    whole = {who: _extended(timing, steps[who][-options.runs :], work.steps) for who, timing in sample.items()}
    found = ratio(whole["inlay"], whole["peft"])
    told = {who: timing.to_dict() for who, timing in whole.items()}
    part = Part(
        raw={
            "work": name,
            "losses": losses,
            "timings": told,
            "ratio": found,
            "steps": work.steps,
            "seconds_of_steps": steps,
            "sample": {who: timing.to_dict() for who, timing in sample.items()},
            "ratio_of_the_sample": ratio(sample["inlay"], sample["peft"]),
        }
    )
    taken = len(steps["inlay"][0]) + 1
    detail = f"{milliseconds(told)}; from {taken} of {work.steps:,} steps"
    part.rows.append(Row(work=f"{name}: time / PEFT's", value=found["of_medians"], most=most, detail=detail))
    if abs(losses["inlay"] - losses["peft"]) > CLOSE * losses["peft"]:
        part.wrong.append(f"{name}, mean losses: {losses}")
    return part


@contextmanager
def _clocked() -> Iterator[list[float]]:
    """When each step of any `Trainer` inside ends."""
    from transformers import TrainerCallback
    from transformers.trainer import DEFAULT_CALLBACKS

    ends: list[float] = []

    class Ends(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(now())

    DEFAULT_CALLBACKS.append(Ends)
    try:
        yield ends
    finally:
        DEFAULT_CALLBACKS.remove(Ends)


def _extended(sample: Timing, steps: list[list[float]], wanted: int) -> Timing:
    """The seconds that so many steps take, by each run over the sample."""
    runs = zip(sample.seconds, steps, strict=True)
    return Timing(tuple(seconds + (wanted - len(own) - 1) * statistics.mean(own) for seconds, own in runs))


def with_inlay(work: Work, out: Path) -> float:
    """What `inlay train` does; the mean loss."""
    from inlay.train import RunConfig, run

    config = RunConfig(
        data=str(work.data),
        out=str(out),
        base=None if work.causal else str(work.base),
        task="causal" if work.causal else "classification",
        columns={"prompt": "mr", "completion": "ref"} if work.causal else {},
        eval_share=0.0,
        method="lora",
        settings={"rank": 8, "alpha": 16.0},
        where="all-linear" if work.causal else None,  # the paper's: query and value
        epochs=1.0,
        batch_size=work.batch,
        learning_rate=work.rate,
        precision="bf16",
    )
    return float(run(config, overwrite=out.exists(), progress=False).metrics["train_loss"])


def with_peft(work: Work, out: Path) -> float:
    """PEFT in the Trainer as its users write it."""
    from transformers import (
        DataCollatorForSeq2Seq,
        DataCollatorWithPadding,
        PrinterCallback,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(0)
    tokenizer, model, rows = (_causal if work.causal else _classifier)(work)
    collator = DataCollatorForSeq2Seq(tokenizer) if work.causal else DataCollatorWithPadding(tokenizer)
    arguments = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=1,
        per_device_train_batch_size=work.batch,
        learning_rate=work.rate,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    trainer.remove_callback(PrinterCallback)
    done = trainer.train()
    model.save_pretrained(out / "adapter")
    return float(done.training_loss)


def _causal(work: Work) -> tuple[Any, Any, Any]:
    """Tokenizer, model and rows; prompts are not scored."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work.base)
    model = AutoModelForCausalLM.from_pretrained(work.base, dtype=torch.bfloat16)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")

    def encode(rows: dict[str, list[str]]) -> dict[str, Any]:
        prompts = tokenizer([f"{meaning}\n" for meaning in rows["mr"]], add_special_tokens=False)["input_ids"]
        answers = tokenizer(rows["ref"], add_special_tokens=False)["input_ids"]
        ends = [[*answer, tokenizer.eos_token_id] for answer in answers]
        ids = [prompt + end for prompt, end in zip(prompts, ends, strict=True)]
        labels = [[-100] * len(prompt) + end for prompt, end in zip(prompts, ends, strict=True)]
        return {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids], "labels": labels}

    return tokenizer, peft.get_peft_model(model, config), _encoded(work, encode)


def _classifier(work: Work) -> tuple[Any, Any, Any]:
    import peft
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work.base)
    model = AutoModelForSequenceClassification.from_pretrained(work.base, num_labels=CLASSES, dtype=torch.bfloat16)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return {**tokenizer(rows["text"], truncation=True), "labels": [int(label) for label in rows["label"]]}

    return tokenizer, peft.get_peft_model(model, config), _encoded(work, encode)


def _encoded(work: Work, encode: Callable[[dict[str, list[Any]]], dict[str, Any]]) -> Any:
    import json

    from datasets import Dataset

    rows = Dataset.from_list([json.loads(line) for line in work.data.read_text(encoding="utf-8").splitlines()])
    return rows.map(encode, batched=True, remove_columns=rows.column_names)
