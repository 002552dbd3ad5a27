"""What a training run is: one frozen model, the same from flags, YAML, JSON or Python."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from inlay.core.errors import ConfigError, nearest, problems
from inlay.train.sizes import parse_bytes

Task = Literal["causal", "seq2seq", "classification", "regression"]
Precision = Literal["bf16", "fp32"]
Quantization = Literal["nf4", "fp4", "int8", "torchao-int8", "torchao-int4"]
OnLong = Literal["error", "truncate", "drop", "split"]
Optimizer = Literal["adamw", "adamw8bit", "paged-adamw", "paged-adamw8bit", "lion", "lion8bit", "adafactor", "sgd"]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]


class RunConfig(BaseModel):
    """One run, whole. `None` means: found out when the run starts, then saved in ``run.yaml``.

    Attributes:
        data: file or `datasets` id to train on.
        out: folder the run writes to.
        base: transformers folder or hub id; None is the embedded base.
        split, eval_split: of `datasets` ids.
        reading: how files are read, where the defaults do not suit (`inlay.data.Reading`): format, header, …
        eval_data: file or id to evaluate on during training.
        eval_share: share of `data` held out for that where `eval_data` is not given; 0 is none.
        task: None is guessed from the columns and the base.
        columns: role → column, where the names are not the roles.
        prompt_template: text with column names in braces that becomes the prompt.
        separator: between prompt and completion, never scored.
        method: registry key.
        settings: the method's hyper-parameters.
        where: places; None is the paper's. ``re:`` in front makes it a regular expression.
        layers: numbers of the layers to stay within.
        modules_to_save: whole modules to train; a freshly initialised head is added by itself.
        name: of the adapter.
        epochs, steps: length of the run; steps, where given, decide. None is 3 epochs, more of few rows.
        batch_size: rows in one forward pass.
        accumulate: forward passes in one step.
        learning_rate, schedule, warmup, weight_decay: None is the method's recipe; warmup is a share of the steps.
        optimizer: over the adapter's parameters; Lion, 8 bits and pages come from bitsandbytes.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        max_length: tokens a row may have; None is what the base can read.
        on_long: what happens to longer rows; None splits plain text and refuses the rest.
        seed: of every random draw.
        precision: of the base's weights; None is the base's own, and bf16 beside quantised ones.
        quantize: format of the weights of the numbered layers (QLoRA: ``nf4``); None leaves them. Low-rank methods
            are put at every linear layer then, where `where` says nothing.
        gradient_checkpointing: recompute activations instead of keeping them.
        eval_every, save_every: steps between evaluations and between checkpoints.
        early_stopping: evaluations without a better score after which the run ends.
        report_to: of ``tensorboard``, ``wandb``, ``mlflow``.
        packing: rows behind one another in place of padding; None is where that is exact.
        compile: compile the layers before the first step, one by one (`inlay.kernels.compiled`).
        trunk_cache: where the states below the lowest trained layer are kept, so that they are computed once:
            a folder, ``auto`` (memory, where it is exact and pays) or ``off``.
        trunk_cache_limit: bytes it may take, such as ``4GiB``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    data: str
    out: str
    base: str | None = None
    split: str | None = None
    eval_data: str | None = None
    eval_split: str | None = None
    reading: dict[str, Any] = {}
    eval_share: float = Field(default=0.05, ge=0, lt=1)
    task: Task | None = None
    columns: dict[str, str] = {}
    prompt_template: str = "{prompt}"
    separator: str = "\n"
    method: str = "lora"
    settings: dict[str, Any] = {}
    where: str | list[str] | None = None
    layers: list[int] | None = None
    modules_to_save: list[str] = []
    name: str = "default"
    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)
    accumulate: int = Field(default=1, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    schedule: Schedule | None = None
    warmup: float | None = Field(default=None, ge=0, lt=1)
    weight_decay: float | None = Field(default=None, ge=0)
    optimizer: Optimizer = "adamw"
    max_grad_norm: float = Field(default=1.0, ge=0)
    max_length: int | None = Field(default=None, ge=2)
    on_long: OnLong | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)
    precision: Precision | None = None
    quantize: Quantization | None = None
    gradient_checkpointing: bool = False
    eval_every: int | None = Field(default=None, ge=1)
    save_every: int | None = Field(default=None, ge=1)
    early_stopping: int | None = Field(default=None, ge=1)
    report_to: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    packing: bool | None = None
    compile: bool = False
    trunk_cache: str = "auto"
    trunk_cache_limit: str = "4GiB"

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
                f"compile cannot be combined with {' and '.join(beside)}: a graph knows nothing of where rows begin, "
                "and keeps or recomputes what it needs by itself. Leave one of them out"
            )
        return self

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_switch(cls, value: Any, field: ValidationInfo) -> Any:
        takes = cls.model_fields[str(field.field_name)].annotation
        if isinstance(value, bool) and bool not in (takes, *get_args(takes)):
            raise ValueError(f"{field.field_name} is {value}, no number or text (as YAML reads `yes` and `on`)")
        return value

    @field_validator("trunk_cache_limit")
    @classmethod
    def _is_a_size(cls, value: str) -> str:
        parse_bytes(value)
        return value

    @classmethod
    def of(cls, values: Mapping[str, Any], *, origin: str = "configuration") -> RunConfig:
        """Check plain values.

        Raises:
            ConfigError: everything that is wrong with them, unknown names with the nearest known one.
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
        ConfigError: no such file, not a mapping, or one that says something twice.
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
            f"{path} holds {type(values).__name__}, expected `name: value` lines such as `data: rows.jsonl`"
        )
    return values


def _yaml(text: str) -> Any:
    """What YAML says, each name once; what a name is merged from (``<<``) may be said again beside it."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            _once([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader)


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """The mapping of these pairs; of a name given twice, one value would be lost in silence."""
    names = [name for name, _ in pairs]
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} stands there more than once; keep one")
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
