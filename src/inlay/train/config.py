"""The configuration of a training run: one frozen model, whether it comes from flags, YAML, JSON or Python."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from inlay.core.errors import ConfigError, nearest, problems
from inlay.machine.precision import Asked
from inlay.sizes import bytes_of
from inlay.train.words import layers, listed, places

Task = Literal["causal", "seq2seq", "classification", "regression"]
Quantization = Literal["nf4", "fp4", "int8", "torchao-int8", "torchao-int4"]
OnLong = Literal["error", "truncate", "drop", "split"]
Optimizer = Literal["adamw", "adamw8bit", "paged-adamw", "paged-adamw8bit", "lion", "lion8bit", "adafactor", "sgd"]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]

# Text with commas stands for a list, in YAML as on the command line.
_NAMES = BeforeValidator(listed, json_schema_input_type=str | list[str])
_LAYERS = BeforeValidator(layers, json_schema_input_type=int | str | list[int] | None)
_REPORTERS = BeforeValidator(listed, json_schema_input_type=str | list[Literal["tensorboard", "wandb", "mlflow"]])


def _says(text: str, **limits: Any) -> Any:
    """An option's description, and limits of its value beyond its type."""
    return Field(description=text, **limits)


class RunConfig(BaseModel):
    """The complete configuration of a run. `None` means: found out when the run starts, then saved in ``run.yaml``.

    Options are declared here and nowhere else: type, limits, default and description. From these fields `make docs`
    makes `run.schema.json`, which editors use for completion, and from that come the command line and docs/training.md.
    After "Default:" a description says what None means; other defaults are added where the description is shown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # -- what is trained, on what, and where it goes --
    data: Annotated[str, _says("CSV, TSV, JSONL, JSON, Parquet or text file (also .gz), or a datasets id.")]
    out: Annotated[str, _says("Folder to write the run to.")]
    base: Annotated[str | None, _says("Transformers folder or hub id of the model. Default: the embedded base.")] = None
    method: Annotated[str, _says("Method or baseline; `inlay methods` lists them.")] = "lora"
    settings: Annotated[dict[str, Any], _says("Hyper-parameters of the method, such as rank=16.")] = {}
    where: Annotated[
        str | list[str] | None,
        _says(
            "Layers to adapt: all-linear, attention, mlp, a role, module names with commas, or re:PATTERN. "
            "Default: those of the paper, or all-linear for low-rank methods on a quantised base."
        ),
    ] = None
    layers: Annotated[
        list[int] | None, _LAYERS, _says("Numbers of the layers to adapt, such as 0-5,11. Default: all.")
    ] = None
    modules_to_save: Annotated[
        list[str], _NAMES, _says("Modules to train whole. A newly initialised head is added automatically.")
    ] = []
    name: Annotated[str, _says("Name of the adapter.")] = "default"

    # -- the rows --
    split: Annotated[str | None, _says("Split of a datasets id to train on.")] = None
    eval_data: Annotated[str | None, _says("Rows to evaluate on during training.")] = None
    eval_split: Annotated[str | None, _says("Split of a datasets id to evaluate on.")] = None
    eval_share: Annotated[
        float,
        _says("Share of the data to hold out for evaluation if no other rows are given; 0 for none.", ge=0, lt=1),
    ] = 0.05
    reading: Annotated[
        dict[str, Any], _says("How files are read, if the defaults do not suit: format=csv, header=text,label …")
    ] = {}
    task: Annotated[Task | None, _says("What to learn from the rows. Default: guessed from columns and base.")] = None
    columns: Annotated[dict[str, str], _says("Columns with other names: prompt=question,completion=answer.")] = {}
    prompt_template: Annotated[str, _says("Text with column names in braces that becomes the prompt.")] = "{prompt}"
    separator: Annotated[str, _says("Text between prompt and completion; never scored.")] = "\n"
    max_length: Annotated[int | None, _says("Most tokens of a row. Default: what the base can read.", ge=2)] = None
    on_long: Annotated[
        OnLong | None, _says("What to do with longer rows. Default: split for plain text, else error.")
    ] = None
    packing: Annotated[
        bool | None, _says("Several rows in one sequence instead of padding. Default: if that is exact.")
    ] = None

    # -- the training --
    epochs: Annotated[
        float | None, _says("Passes over the data. Default: 3, or more (up to 20) if there are few rows.", gt=0)
    ] = None
    steps: Annotated[int | None, _says("Optimizer steps, instead of epochs.", ge=1)] = None
    batch_size: Annotated[int, _says("Rows in a forward pass (micro-batch).", ge=1)] = 16
    accumulate: Annotated[int, _says("Forward passes in an optimizer step.", ge=1)] = 1
    learning_rate: Annotated[float | None, _says("Peak learning rate. Default: the method's.", gt=0)] = None
    schedule: Annotated[Schedule | None, _says("Learning-rate schedule. Default: the method's.")] = None
    warmup: Annotated[
        float | None,
        _says("Share of the steps over which the rate rises. Default: the method's.", ge=0, lt=1),
    ] = None
    weight_decay: Annotated[float | None, _says("Decoupled weight decay. Default: the method's.", ge=0)] = None
    optimizer: Annotated[Optimizer, _says("Optimizer; Lion, 8-bit and paged ones need bitsandbytes.")] = "adamw"
    max_grad_norm: Annotated[float, _says("Norm above which gradients are scaled down; 0 for none.", ge=0)] = 1.0
    seed: Annotated[int, _says("Seed of every random draw.", ge=0, lt=2**32)] = 0

    # -- evaluation and checkpoints --
    eval_every: Annotated[
        int | None,
        _says("Steps between evaluations. Default: an epoch, or a quarter of a short run.", ge=1),
    ] = None
    save_every: Annotated[
        int | None,
        _says("Steps between checkpoints. Default: as for evaluations, and at least every ten minutes.", ge=1),
    ] = None
    early_stopping: Annotated[int | None, _says("Stop after so many evaluations without a better score.", ge=1)] = None
    report_to: Annotated[
        list[Literal["tensorboard", "wandb", "mlflow"]], _REPORTERS, _says("Trackers to report to.")
    ] = []

    # -- memory and speed --
    precision: Annotated[
        Asked,
        BeforeValidator(lambda value: "auto" if value is None else value),  # in run.yaml of earlier versions
        _says("Precision of the base and of computation; auto is one that is fast and safe on this machine."),
    ] = "auto"
    quantize: Annotated[
        Quantization | None, _says("Format to quantise the base's weights to (QLoRA: nf4). Default: not quantised.")
    ] = None
    gradient_checkpointing: Annotated[bool, _says("Recompute activations instead of storing them, to save memory.")] = (
        False
    )
    compile: Annotated[bool, _says("Compile the layers first; prints after how many steps that pays.")] = False
    trunk_cache: Annotated[
        str,
        _says(
            "Compute the layers below the trained ones only once: auto (in memory, if it is exact and pays), "
            "off, or a folder to keep the results in."
        ),
    ] = "auto"
    trunk_cache_limit: Annotated[str, _says("Memory or disk space that the trunk cache may take.")] = "4GiB"
    plain: Annotated[
        bool,
        _says("Without fast paths: the model's own code, the methods' plain formulas, no packing, no trunk cache."),
    ] = False

    @model_validator(mode="after")
    def _evaluates(self) -> Self:
        if self.early_stopping and self.eval_data is None and self.eval_split is None and self.eval_share == 0:
            raise ValueError("early_stopping needs evaluations: give eval_data, or an eval_share above 0")
        return self

    @model_validator(mode="after")
    def _compiles(self) -> Self:
        beside = [name for name in ("packing", "gradient_checkpointing") if getattr(self, name)]
        if self.compile and beside:
            raise ValueError(
                f"compile cannot be combined with {' and '.join(beside)}: a compiled graph does not know where rows "
                "begin, and decides itself what to recompute. Leave one of them out"
            )
        return self

    @model_validator(mode="after")
    def _is_plain(self) -> Self:
        fast = [*["packing"] * bool(self.packing), *["trunk_cache"] * (self.trunk_cache not in ("auto", "off"))]
        if self.plain and fast:
            raise ValueError(f"plain switches {' and '.join(fast)} off, which you asked for; leave one of them out")
        return self

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_switch(cls, value: Any, field: ValidationInfo) -> Any:
        takes = cls.model_fields[str(field.field_name)].annotation
        if isinstance(value, bool) and bool not in (takes, *get_args(takes)):
            raise ValueError(f"{field.field_name} is {value}, expected a number or text (YAML reads `yes` as true)")
        return value

    @field_validator("trunk_cache_limit")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        try:
            bytes_of(value)
        except ValueError as error:
            raise ValueError(f"trunk_cache_limit {error}") from error
        return value

    @field_validator("where")
    @classmethod
    def _is_a_place(cls, value: str | list[str] | None) -> Any:
        found = places(value)
        return found if isinstance(found, list) else value

    @classmethod
    def of(cls, values: Mapping[str, Any], *, origin: str = "configuration") -> RunConfig:
        """Check plain values.

        Raises:
            ConfigError: lists everything that is wrong with them; unknown names with the nearest known one.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(problems(origin, [_said(e) for e in error.errors()])) from None

    @classmethod
    def read(cls, path: Path, **changes: Any) -> RunConfig:
        """The configuration in a YAML or JSON file, with `changes` on top."""
        return cls.of({**read_values(path), **changes}, origin=str(path))

    def to_yaml(self) -> str:
        """The inverse of `read`, fields in the order of the class."""
        import yaml

        return str(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))

    def changed(self, **changes: Any) -> RunConfig:
        """A copy with other values, checked again."""
        return RunConfig.of({**self.model_dump(), **changes})


def read_values(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file, unchecked.

    Raises:
        ConfigError: the file does not exist, is not a mapping, or has a name twice.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text, object_pairs_hook=_once) if path.suffix == ".json" else _yaml(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}). Give a YAML or JSON file") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be used as YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} contains {type(values).__name__}, expected `name: value` lines such as `data: rows.jsonl`"
        )
    return values


def _yaml(text: str) -> Any:
    """Parse YAML; a name may occur only once, except that a name merged with ``<<`` may be overridden."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            _once([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader)


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """The mapping of these pairs; raises if a name occurs twice, because one value would be lost silently."""
    names = [name for name, _ in pairs]
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is given more than once; keep one")
    return dict(pairs)


def _said(error: Any) -> str:
    """One of pydantic's errors in our words."""
    name = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "extra_forbidden":
            return f"unknown option {name!r}{nearest(name, RunConfig.model_fields)}"
        case "missing":
            return f"{name} is missing; it has no default"
        case "value_error":
            return str(error["ctx"]["error"])
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{name} is {error['input']!r}: {message}"
