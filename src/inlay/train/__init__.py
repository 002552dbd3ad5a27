"""Training runs: configuration → data and base → transformers.Trainer → adapter.

config.py     `RunConfig`: the configuration of a run, from flags, YAML or Python; options are declared here
options.py    the same options as plain data, from run.schema.json, for code that must start fast
words.py      parsing text that stands for a list, for layers or for places
hyper.py      `--set rank=16`: from words to a method
loading.py    `load_base`: a transformers folder → model, tokenizer, newly initialised modules
rows.py       data files → the rows of a run, split and encoded
prepare.py    files and configuration → model, rows and resolved configuration
members.py    the adapters that a method combines, from their folders
running.py    `run`: a whole run, from start to end
several.py    `run_several`: runs one after another, or in turns on one base (turns.py)
trainer.py    transformers.Trainer, with adapters as checkpoints and exact losses
order.py      the order of the rows
packing.py    several rows in one sequence instead of padding
passes.py     micro-batches that get smaller when memory runs out
trunk.py      the trunk cache: hidden states below the lowest trained layer
optimizers.py optimizers by name
foresight.py  the memory plan of a run, printed before its first step
callbacks.py  Trainer callbacks: pace, metrics.jsonl, progress
stop.py       Ctrl-C and SIGTERM;  quiet.py: silencing libraries
folder.py     the output folder: locking, its files, full disks
record.py     `training.json`: what later commands need to know about a trained adapter
card.py       the adapter's README.md

Names are imported when first used, so that the configuration is available without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inlay.train.config import RunConfig
    from inlay.train.loading import Base, load_base
    from inlay.train.record import TrainingRecord, read_record
    from inlay.train.running import RunResult, run
    from inlay.train.stop import Stopped

_HOMES = {
    "RunConfig": "config",
    "Base": "loading",
    "load_base": "loading",
    "TrainingRecord": "record",
    "read_record": "record",
    "RunResult": "running",
    "run": "running",
    "Stopped": "stop",
}

__all__ = ["Base", "RunConfig", "RunResult", "Stopped", "TrainingRecord", "load_base", "read_record", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
