"""`inlay convert`: an adapter in the files of another library, exactly, or a list of what has no counterpart there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inlay.cli import flags
from inlay.cli.output import write_json
from inlay.cli.tables import show_facts

if TYPE_CHECKING:
    from inlay.train import TrainingRecord
    from inlay.train.loading import Base

FORMATS = ("peft", "native")
HEADS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")
TASKS = {"CAUSAL_LM": "causal", "SEQ_2_SEQ_LM": "seq2seq", "SEQ_CLS": "classification"}  # PEFT's words


def convert(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder of an adapter, or a file of tensors.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New folder for the converted one.")],
    to: Annotated[str, typer.Option(help="peft (Hugging Face PEFT's files) or native (inlay's).")],
    base: flags.BaseOfAdapter = None,
    allow_pickle: flags.AllowPickle = False,
    alpha: Annotated[
        float | None, typer.Option(help="Of a LoRA in a single file, which does not say it (loralib).")
    ] = None,
    as_json: flags.AsJson = False,
) -> None:
    """Write an adapter in another library's files: PEFT both ways; AdapterHub's, loralib's and t-few's are read."""
    from inlay.cli.merge import check_unused
    from inlay.core.errors import ConfigError

    if to not in FORMATS:
        raise ConfigError(f"--to is {to!r}, expected one of {', '.join(FORMATS)}")
    check_unused(out)
    import inlay
    from inlay.formats import format_of, peft
    from inlay.formats.describing import base_named
    from inlay.train import read_record
    from inlay.train.folder import write_beside

    source = format_of(adapter)
    if source == to:
        raise ConfigError(f"{adapter} is in {to} format already; nothing was written")
    record = read_record(adapter) if adapter.is_dir() else None
    found = _base(adapter, source, base, record, pickles=allow_pickle)
    model = found.model
    loaded = inlay.load(model, adapter, name=None, allow_pickle=allow_pickle, alpha=alpha)
    saved = [f"{path}." for path in loaded.modules_to_save]
    fresh = [p for p in found.fresh if not any(s.startswith(f"{p}.") or f"{p}.".startswith(s) for s in saved)]
    if to == "native" and fresh:
        raise ConfigError(
            f"neither the base nor the adapter has weights for {', '.join(fresh)}, so there is no base that the new "
            "file could say it belongs to; give a --base that has them"
        )

    def write(part: Path) -> None:
        inlay.save(model, loaded.name, part, format=to)
        if record is not None:
            record.write(part)

    write_beside(out, write)
    facts: dict[str, Any] = {
        "out": str(out),
        "from": source,
        "to": to,
        "method": loaded.method.name,
        "parameters": loaded.count + loaded.count_copied,
        "bytes": sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
        "left_out": peft.LEFT_OUT.get(loaded.method.name) if to == "peft" else None,
        "base_in_file": base_named(adapter),
    }
    if as_json:
        write_json(facts)
    else:
        show_facts(f"Converted {adapter}", {key: value for key, value in facts.items() if value is not None})


def _base(adapter: Path, source: str, base: str | None, record: TrainingRecord | None, *, pickles: bool) -> Base:
    """The base that an adapter belongs to."""
    from inlay.cli.models import base_of
    from inlay.train import load_base

    if base is None and adapter.is_dir():
        base = base_of([str(adapter)])
    if record is not None:
        labels = record.labels if record.task == "classification" else None
        return load_base(base, task=record.task, label_names=labels, precision="stored")
    classes = next((s[0] for n, s in _shapes(adapter, source, pickles).items() if n.endswith(HEADS)), None)
    if classes is not None:
        return load_base(base, task="classification", num_labels=classes, precision="stored")
    return load_base(base, task=TASKS.get(_task_type(adapter, source)) or _task_of(base), precision="stored")


def _task_of(base: str | None) -> str:
    """What a base was saved as."""
    from inlay.cli.models import writing_task
    from inlay.train.loading import base_source, read_config

    names = getattr(read_config(base_source(base)), "architectures", None) or [""]
    writes = names[0].endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
    # An encoder that is saved without a head still has one for classifying, which no adapter here has changed.
    return writing_task(base) if writes else "classification"


def _task_type(adapter: Path, source: str) -> str:
    from inlay.formats.configuration import read_config

    return str(read_config(adapter).get("task_type")) if source == "peft" else ""


def _shapes(adapter: Path, source: str, pickles: bool) -> dict[str, tuple[int, ...]]:
    """Name → shape of the stored tensors."""
    from inlay.formats import header
    from inlay.formats.archive import archive, open_archive
    from inlay.formats.configuration import HUB_WEIGHTS, WEIGHTS

    match source:
        case "native":
            return {n: tuple(t["shape"]) for n, t in header.read_header(adapter)["tensors"].items()}
        case "tensors":
            return archive(adapter, allow_pickle=pickles).shapes
    names = WEIGHTS if source == "peft" else HUB_WEIGHTS
    return open_archive(adapter, *names, allow_pickle=pickles).shapes
