"""A base with the adapters that a command names, and how each of them wants to be asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inlay.data import Template
    from inlay.machine.precision import Choice
    from inlay.train import TrainingRecord


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model in which every named adapter is attached, the last one active.

    Attributes:
        base: folder or hub name; None is the embedded base.
        task: that the model was loaded for.
        names: folder → the adapter's name in the model.
        records: folder → what its training left beside it, or None.
        fresh: modules that neither the base nor an adapter has weights for.
        precision: that the base is held and computed in, and why.
    """

    model: Any
    tokenizer: Any
    base: str | None
    task: str
    names: Mapping[str, str]
    records: Mapping[str, TrainingRecord | None]
    fresh: tuple[str, ...]
    precision: Choice


def load_adapted(
    base: str | None,
    folders: Sequence[str],
    *,
    task: str | None = None,
    quantize: str | None = None,
    precision: str | None = None,
) -> Loaded:
    """Load a base and attach adapters to it.

    Args:
        base: transformers folder or hub name; None is the one the adapters were trained on, and the embedded
            one where that is not recorded.
        folders: of adapters.
        task: None is the one the adapters were trained for; where that is not recorded, to write texts.
        quantize: format of the base's weights; None is the one in training, ``none`` leaves them as they are.
        precision: as for `inlay.train.load_base`; None is ``auto``, on the CPU, where the model stays.

    Raises:
        ConfigError: the adapters disagree about base, task or labels, or the base cannot be loaded.
        AdapterFileError, BaseMismatchError: an adapter that cannot be attached.
    """
    import inlay
    from inlay.baselines import is_fitted
    from inlay.core.errors import ConfigError
    from inlay.train import load_base, read_record
    from inlay.train.loading import precision_for

    for folder in folders:
        if is_fitted(folder):
            raise ConfigError(f"{folder} is a baseline, not an adapter; it can be scored with inlay evaluate")
    records = {folder: read_record(folder) for folder in folders}
    labels = _agreed("labels", records, lambda record: record.labels if record.task == "classification" else None)
    if base is None:
        base = base_of(folders)
    if task is None:
        task = _agreed("tasks", records, lambda record: record.task) or writing_task(base)
    if quantize is None:
        quantize = _agreed("quantisations of the base", records, lambda record: record.quantize)
    quantize = None if quantize == "none" else quantize
    chosen = precision_for(base, precision or "auto", quantize=quantize, device="cpu")
    loaded = load_base(
        base,
        task=task,
        label_names=labels if task == "classification" else None,
        precision=chosen.precision,
        quantize=quantize,
    )
    names = {folder: f"adapter{place}" for place, folder in enumerate(records)}
    for folder, name in names.items():
        inlay.load(loaded.model, folder, name=name)
    trained = {path for adapter in inlay.adapters(loaded.model).values() for path in adapter.modules_to_save}
    return Loaded(
        model=loaded.model.eval(),
        tokenizer=loaded.tokenizer,
        base=base,
        task=task,
        names=names,
        records=records,
        fresh=tuple(path for path in loaded.fresh if path not in trained),
        precision=chosen,
    )


def base_of(folders: Sequence[str]) -> str | None:
    """The base that adapters were trained on: as their training recorded it, else the folder that they name.

    Returns:
        None is the embedded base, and where nothing is known.

    Raises:
        ConfigError: they were trained on different ones, or another library's adapter names no folder of this
            machine.
    """
    from inlay.core.errors import ConfigError
    from inlay.formats import format_of
    from inlay.formats.describing import base_named
    from inlay.formats.provenance import LOCAL
    from inlay.train import read_record
    from inlay.train.loading import absolute

    found: dict[str, str | None] = {}
    for folder in folders:
        record, kind = read_record(folder), format_of(Path(folder))
        names = [record.base] if record is not None else []
        names += [named] if (named := base_named(Path(folder))) is not None else []
        there = [absolute(name) for name in names if name and Path(name).expanduser().is_dir()]
        if there:
            found[folder] = there[0]
        elif record is not None and (record.base is None or not record.base.startswith(LOCAL)):
            found[folder] = record.base
        elif names or kind != "native":
            said = f"names the base {names[0]!r}, which is no folder here" if names else "does not say its base"
            raise ConfigError(f"{folder} ({kind}) {said}: give it with --base, a transformers folder or hub id")
    if len(set(found.values())) > 1:
        lines = "\n".join(f"  - {folder}: {base}" for folder, base in found.items())
        raise ConfigError(f"the adapters have different bases, so they cannot share a model:\n{lines}")
    return next(iter(found.values()), None)


def recorded_task(folders: Sequence[str]) -> str | None:
    """The task that the adapters were trained for; None where none of them has a record.

    Raises:
        ConfigError: they were trained for different ones.
    """
    from inlay.train import read_record

    records = {folder: read_record(folder) for folder in folders}
    task: str | None = _agreed("tasks", records, lambda record: record.task)
    return task


def prompt_tokens(loaded: Loaded, text: str, folder: str | None, *, chat: bool | None = None) -> list[int]:
    """The tokens of a prompt typed by hand, written as the adapter's training wrote prompts.

    Args:
        folder: of the adapter that will answer; None is the base itself, which is asked in plain text.
        chat: write it with the chat template, or not; None is as in training.

    Raises:
        ConfigError: a chat without a chat template.
        DataError: training made its prompts of several columns.
    """
    from inlay.data import Template, encode_prompt
    from inlay.data.chat import chat_pieces
    from inlay.data.joining import Joiner

    record = loaded.records.get(folder) if folder is not None else None
    if chat or (chat is None and record is not None and record.kind == "chat"):
        pieces = chat_pieces([{"role": "user", "content": text}], loaded.tokenizer, open_turn=True)
        tokens = Joiner(loaded.tokenizer).pieces([[piece for piece, _ in pieces]])[0]
        return [token for piece in tokens for token in piece]
    task: Any = loaded.task
    continued = record is None or chat is False or record.kind in ("text", "chat")
    template = Template(separator="") if continued or record is None else template_of(record)
    return encode_prompt(text, loaded.tokenizer, task=task, template=template)


def template_of(record: TrainingRecord | None) -> Template:
    """How the training joined prompt and completion; the default where that is not recorded."""
    from inlay.data import Template

    if record is None:
        return Template()
    return Template(prompt=record.prompt_template, separator=record.separator)


def writing_task(base: str | None) -> str:
    """The task of a base that writes texts."""
    from inlay.train.loading import base_source, read_config

    encoder_decoder = getattr(read_config(base_source(base)), "is_encoder_decoder", False)
    return "seq2seq" if encoder_decoder else "causal"


def _agreed(what: str, records: Mapping[str, TrainingRecord | None], pick: Callable[[TrainingRecord], Any]) -> Any:
    """The one value that all records hold; None where there is no record."""
    from inlay.core.errors import ConfigError

    found = {folder: pick(record) for folder, record in records.items() if record is not None}
    if len(set(found.values())) > 1:
        lines = "\n".join(f"  - {folder}: {value}" for folder, value in found.items())
        raise ConfigError(f"the adapters have different {what}, so they cannot share a model:\n{lines}")
    return next(iter(found.values()), None)
