"""Loading a base model and its tokenizer from a folder or the hub: strictly, and without warnings."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from inlay.core.errors import ConfigError, nearest, problems
from inlay.machine.precision import (
    ASKED,
    Asked,
    Choice,
    Precision,
    choose,
    device_named,
    dtype_of,
    half_of,
    is_slow,
    precision_of,
    told_of_slowness,
    training_device,
)
from inlay.train.quiet import quiet_libraries

if TYPE_CHECKING:
    import torch
    from torch import nn

AUTO = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
}
# What `AutoModel…` looks a configuration up in.
MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "regression": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SHOWN = 8


class Base(NamedTuple):
    """A loaded base.

    Attributes:
        fresh: names of modules for which the base's files have no weights, so that they must be trained.
    """

    model: Any
    tokenizer: Any
    fresh: tuple[str, ...]


def load_base(
    path: str | Path | None,
    *,
    task: str = "causal",
    num_labels: int | None = None,
    label_names: Sequence[str] | None = None,
    precision: Asked | Literal["stored"] = "auto",
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
    device: str | None = None,
) -> Base:
    """Load a base for a task.

    Args:
        path: transformers folder or hub id; None is the embedded base. A hub id is loaded from the local cache if
            it is there, without the network.
        task: ``causal``, ``seq2seq``, ``classification`` or ``regression``.
        num_labels: number of outputs of a classification head; None means that of `label_names`.
        label_names: names of the classes, in order. A head that was trained for other names counts as fresh.
        precision: of the weights and what is computed with them. ``auto`` is what the device computes fast and safely
            (`inlay.machine.precision`), ``stored`` is the files' own whatever that costs, for weights that are to be
            written and not computed with; else ``bf16``, ``fp32`` or ``fp16``.
        dtype: a type of torch in the place of `precision`.
        quantize: format of the weights of the numbered layers (`inlay.bases.loading`), made while they are read. All
            weights are read in bfloat16 then, so that every machine has the same base; `precision` is what is computed.
        device: kind of the device that the model will be moved to, which decides what ``auto`` is; None is where
            `inlay train` would put it.

    Raises:
        ConfigError: it is not a model, weights are missing or damaged, the architecture cannot do the task, or there is
            no tokenizer. The message says what to give instead.
    """
    source = base_source(path)
    with quiet_libraries():
        config = read_config(source)
        _check_task(config, source, task)
        labels = _head_options(task, num_labels, label_names)
        dtype = dtype or dtype_of(_choice(config, source, precision, quantize, device).precision)
        model, info = _read_model(source, task, labels, dtype, quantize)
        tokenizer = _read_tokenizer(source)
    fresh = _fresh_modules(model, info, source, task)
    if task == "classification" and label_names is not None and not fresh and _other_labels(config, label_names):
        fresh = head_modules(model)
    _settle(model, tokenizer, task)
    return Base(model, tokenizer, fresh)


def absolute(source: str) -> str:
    """The absolute path of a local file or folder; a hub id as it is."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def base_source(path: str | Path | None) -> str:
    """The folder or hub id that `path` means.

    Raises:
        ConfigError: the path is not a model folder.
    """
    if path is None:
        from inlay.assets import base_path

        path = base_path()
    folder = Path(path).expanduser()
    if folder.is_dir():
        _check_folder(folder)
        return str(folder)
    if folder.is_file():
        raise ConfigError(f"base {path} is a file; expected a transformers model folder (config.json and weights)")
    if isinstance(path, Path) or not _HUB_ID.fullmatch(path) or path.startswith("."):
        raise ConfigError(
            f"base {path}: there is no such folder. Give a transformers model folder, or a hub id (owner/name)"
        )
    return path


def precision_for(
    path: str | Path | None, asked: str = "auto", *, quantize: str | None = None, device: str | None = None
) -> Choice:
    """In which precision `load_base` would hold a base, and why; the arguments are as there.

    Raises:
        ConfigError: no such precision, or as `load_base`.
    """
    source = base_source(path)
    with quiet_libraries():
        config = read_config(source)
    return _choice(config, source, asked, quantize, device)


def asked_precision(word: str) -> Asked:
    """A user's word for a precision.

    Raises:
        ConfigError: it is none.
    """
    for known in ASKED:
        if word == known:
            return known
    raise ConfigError(f"precision {word!r} is unknown{nearest(word, ASKED)}; expected {', '.join(ASKED)}")


def _choice(config: Any, source: str, asked: str, quantize: str | None, device: str | None) -> Choice:
    if asked == "stored":
        return Choice("bf16" if quantize is not None else stored_precision(config, source), "as the base is stored")
    wanted, device = asked_precision(asked), device or training_device()
    quantised = quantize is not None or getattr(config, "quantization_config", None) is not None
    stored = stored_precision(config, source)
    chosen = choose(wanted, stored, half_of(device), device=device_named(device), quantised=quantised)
    if is_slow(dtype_of(chosen.precision), device):
        told_of_slowness()  # whoever asked for it reads why not to
    return chosen


def stored_precision(config: Any, source: str) -> Precision:
    """In which a base's files are: as their configuration says, else as the first tensor of them is."""
    stated = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if stated is None:
        from inlay.bases.loading import stored_tensors

        with suppress(ConfigError):  # old files that are no safetensors are float32
            stated = next((t.dtype for t in stored_tensors(source).values() if t.dtype.is_floating_point), None)
    return precision_of(stated)


def own_precision(path: str | Path | None, quantize: str | None) -> Precision:
    """What runs of versions without ``auto`` computed in: the files' own, fp32 where those are fp16 on a CPU."""
    if quantize is not None:
        return "bf16"
    source = base_source(path)
    stored = stored_precision(read_config(source), source)
    return "fp32" if stored == "fp16" and training_device() == "cpu" else stored


def read_config(source: str) -> Any:
    """The base's transformers configuration.

    Raises:
        ConfigError: it is unreadable, has an unknown architecture, or cannot be found.
    """
    from transformers import AutoConfig

    try:
        return _cached_first(AutoConfig.from_pretrained, source)
    except OSError as error:
        raise ConfigError(_unreachable(source)) from error
    except (ValueError, KeyError) as error:
        raise ConfigError(f"base {source}: its config.json cannot be used ({_first_line(error)})") from error


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """The heads of a model: the modules outside of its trunk."""
    trunk = getattr(model, "base_model", None)
    return tuple(
        name
        for name, child in model.named_children()
        if child is not trunk and name != "inlay" and any(True for _ in child.parameters())
    )


def _cached_first(read: Any, source: str, **options: Any) -> Any:
    """Read from the local cache if possible, else from the hub."""
    if Path(source).is_dir():
        return read(source, **options)
    try:
        return read(source, local_files_only=True, **options)
    except OSError:
        return read(source, **options)


def _check_folder(folder: Path) -> None:
    names = {entry.name for entry in folder.iterdir()}
    if "config.json" not in names:
        if names & {"adapter.safetensors", "adapter_config.json"}:
            raise ConfigError(f"base {folder} is an adapter, not a model. Give the base it was trained on")
        raise ConfigError(
            f"base {folder} is not a model folder: it has no config.json. Give a transformers model folder"
        )
    if not any(name.endswith((".safetensors", ".bin")) for name in names):
        raise ConfigError(
            f"base {folder} has a config.json but no weights (*.safetensors). Download the weights beside it; "
            "large files that git keeps elsewhere (LFS) must be fetched too"
        )


def able_tasks(config: Any) -> list[str]:
    """The tasks for which a configuration's architecture has a head."""
    import transformers

    return [task for task, mapping in MAPPINGS.items() if type(config) in getattr(transformers, mapping)]


def _check_task(config: Any, source: str, task: str) -> None:
    if task not in AUTO:
        raise ConfigError(f"task {task!r} is unknown; known: {', '.join(AUTO)}")
    able = able_tasks(config)
    if task not in able:
        can = f"it can do {', '.join(able)}" if able else "no text task is known for it"
        raise ConfigError(
            f"base {source} ({config.model_type}) cannot do the task {task}: {can}. Choose another task or base"
        )


def _head_options(task: str, num_labels: int | None, label_names: Sequence[str] | None) -> dict[str, Any]:
    if task == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    if task != "classification":
        return {}
    if label_names is not None:
        return {
            "id2label": dict(enumerate(label_names)),
            "label2id": {name: i for i, name in enumerate(label_names)},
            "num_labels": len(label_names),
            "problem_type": "single_label_classification",
        }
    return {} if num_labels is None else {"num_labels": num_labels, "problem_type": "single_label_classification"}


def _read_model(
    source: str, task: str, labels: dict[str, Any], dtype: torch.dtype, quantize: str | None
) -> tuple[Any, dict[str, Any]]:
    import transformers
    from safetensors import SafetensorError

    auto = getattr(transformers, AUTO[task])
    try:
        if quantize is not None:
            return _read_quantised(auto, source, labels, dtype, quantize)
        model, info = _cached_first(
            auto.from_pretrained,
            source,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=bool(labels),
            **labels,
        )
    except SafetensorError as error:
        raise ConfigError(
            f"base {source}: its weights are damaged or truncated ({error}). Download them again"
        ) from error
    except OSError as error:
        raise ConfigError(f"base {source}: its weights cannot be read ({_first_line(error)})") from error
    except (RuntimeError, ValueError, ImportError) as error:
        raise ConfigError(f"base {source} cannot be loaded for {task}: {_first_line(error)}") from error
    if getattr(model.config, "quantization_config", None) is not None:  # in the files already
        from inlay.bases.loading import compute_in

        compute_in(model, dtype)
    return model, info


def _read_quantised(
    auto: Any, source: str, labels: dict[str, Any], dtype: torch.dtype, quantize: str
) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoConfig, GenerationConfig

    from inlay.bases.loading import check_quantisation, read_quantised, stored_tensors

    check_quantisation(quantize)
    config = _cached_first(AutoConfig.from_pretrained, source, **labels)
    tensors: dict[str, Any] = {**stored_tensors(source)}
    options: dict[str, Any] = {"read_in": dtype_of("bf16"), "ignore_mismatched_sizes": bool(labels)}
    model, info = read_quantised(auto, config, tensors, quantize, dtype, **options)
    model.name_or_path = source
    if model.can_generate():
        with suppress(OSError):  # the model has no generation configuration
            model.generation_config = _cached_first(GenerationConfig.from_pretrained, source)
    return model, info


def _read_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return _cached_first(AutoTokenizer.from_pretrained, source)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"base {source} has no tokenizer that can be read ({_first_line(error)}). Put its tokenizer files "
            "(tokenizer.json, tokenizer_config.json) into the folder"
        ) from error


def _fresh_modules(model: Any, info: dict[str, Any], source: str, task: str) -> tuple[str, ...]:
    """The modules without weights; raises if they are more than a head."""
    mismatched = {key if isinstance(key, str) else key[0] for key in info.get("mismatched_keys", ())}
    missing = {str(key) for key in info.get("missing_keys", ())} | mismatched
    parameters = {name for name, _ in model.named_parameters()}
    missing &= parameters
    trunk = f"{getattr(model, 'base_model_prefix', '') or ' '}."
    pooler = re.compile(r"(^|\.)pooler\.")
    wrong = sorted(
        name
        for name in missing
        if task in ("causal", "seq2seq") or (name.startswith(trunk) and (name in mismatched or not pooler.search(name)))
    )
    if wrong:
        more = [f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
        raise ConfigError(
            problems(
                f"base {source} lacks weights that the task {task} needs, so it cannot be used",
                [*wrong[:_SHOWN], *more],
            )
        )
    return collapse(missing, parameters)


def collapse(missing: Collection[str], parameters: Collection[str]) -> tuple[str, ...]:
    """The largest modules of which all parameters are missing, in the order of `parameters`."""
    found: list[str] = []
    for name in (name for name in parameters if name in missing):
        parts = name.split(".")[:-1]
        chosen = ".".join(parts)
        for depth in range(len(parts) - 1, 0, -1):
            parent = ".".join(parts[:depth])
            if any(other.startswith(parent + ".") and other not in missing for other in parameters):
                break
            chosen = parent
        if chosen not in found:
            found.append(chosen)
    return tuple(sorted(found))


def _other_labels(config: Any, label_names: Sequence[str]) -> bool:
    known = [config.id2label[i] for i in sorted(config.id2label)]
    return known != list(label_names)


def _settle(model: Any, tokenizer: Any, task: str) -> None:
    """Make model and tokenizer agree on padding, by which a decoder that classifies finds the end of a text."""
    if tokenizer.pad_token_id is None and tokenizer.eos_token_id is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if task in ("classification", "regression") and tokenizer.pad_token_id is not None:
        model.config.pad_token_id = tokenizer.pad_token_id
        model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    size = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > size:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer)} tokens, but the base embeds only {size}: they do not belong "
            "together. Use the base's own tokenizer files"
        )


def _unreachable(source: str) -> str:
    if Path(source).is_dir():
        try:
            json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            return f"base {source}: its config.json is not JSON ({error}). Download it again"
        return f"base {source}: its config.json cannot be used"
    return (
        f"base {source}: there is no such folder, and no model of that name in the local cache or on the hub. "
        "Check the name, or give a folder"
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
