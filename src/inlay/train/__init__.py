"""The run: configuration → data and base → transformers.Trainer → adapter.

config.py     `RunConfig`: what a run is, from flags, YAML or Python; its options are declared here
options.py    the same options as plain data, from run.schema.json, for what must start fast
words.py      text that stands for a list, for layers or for places
hyper.py      `--set rank=16`: words to a method
loading.py    `load_base`: a transformers folder → model, tokenizer, freshly initialised modules
rows.py       tables → the rows of a run, split and encoded
prepare.py    files and configuration → model, rows and resolved configuration
members.py    adapters that a method is made of, from their folders
running.py    `run`: all of it, start to end
several.py    `run_several`: one after another, or together on one base, in turns (turns.py)
trainer.py    transformers.Trainer with adapters as checkpoints and exact losses
order.py      the order of the rows
packing.py    rows behind one another in place of padding
passes.py     passes that are cut smaller when memory runs out
trunk.py      the states below the lowest trained layer, kept
optimizers.py optimizers by name
foresight.py  what a run will need, said before its first step
callbacks.py  pace, metrics.jsonl, progress
stop.py       Ctrl-C and SIGTERM;  quiet.py: noise of libraries, off
folder.py     the output folder: who may use it, what is in it, full disks
record.py     `training.json`: what later commands must know about a trained adapter
card.py       the adapter's README.md

Names are imported when first used, so that the configuration can be had without torch.
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
