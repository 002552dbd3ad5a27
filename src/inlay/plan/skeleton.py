"""A base made from its configuration alone: every module and parameter, but no values."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from inlay.bases.context import stated_context
from inlay.core.errors import ConfigError
from inlay.machine.precision import Precision, dtype_of, precision_of

TASKS = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
}
DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
PER_LAYER = ("layer_types", "mlp_layer_types")


class Skeleton:
    """Weightless models of one configuration, at any depth.

    Args:
        config: transformers' configuration.
        task: one of `TASKS`; None takes the one that the configuration suggests.
    """

    def __init__(self, config: Any, *, task: str | None = None) -> None:
        self.config, self.task = config, task or guess_task(config)
        if self.task not in TASKS:
            raise ConfigError(f"task {self.task!r} is unknown; known: {', '.join(TASKS)}")

    @cached_property
    def precision(self) -> Precision:
        """Precision of the base's files."""
        return precision_of(getattr(self.config, "dtype", None) or getattr(self._text, "dtype", None))

    @property
    def layers(self) -> int:
        """The depth of the deepest stack."""
        return max((int(getattr(self._text, name)) for name in self._depths), default=0)

    @cached_property
    def context(self) -> int | None:
        """Number of tokens the base can read; None if there is no stated limit."""
        return stated_context(self.build(self.precision, layers=1))

    @cached_property
    def period(self) -> int:
        """After how many layers their kinds repeat (sliding and full attention in turn)."""
        for name in PER_LAYER:
            kinds = getattr(self._text, name, None)
            if kinds:
                fitting = (
                    p for p in range(1, len(kinds)) if all(kinds[i] == kinds[i - p] for i in range(p, len(kinds)))
                )
                return next(fitting, len(kinds))
        return 1

    def build(self, precision: Precision, layers: int | None = None) -> Any:
        """The model in training mode, with `layers` layers if given.

        Raises:
            ConfigError: the architecture cannot do the task, or no model can be made from the configuration.
        """
        import transformers

        config = copy.deepcopy(self.config)
        if layers is not None:
            text = config.get_text_config() if hasattr(config, "get_text_config") else config
            for name in self._depths:
                setattr(text, name, min(layers, int(getattr(text, name))))
            for name in PER_LAYER:
                if getattr(text, name, None):
                    setattr(text, name, getattr(text, name)[:layers])
        auto = getattr(transformers, TASKS[self.task])
        try:
            with torch.device("meta"):
                model = auto.from_config(config, dtype=dtype_of(precision))
        except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, ImportError) as error:
            text = " ".join(str(error).split())[:300]
            raise ConfigError(f"this configuration ({config.model_type}) makes no {self.task} model: {text}") from error
        return model.train()

    @property
    def _text(self) -> Any:
        return self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config

    @property
    def _depths(self) -> list[str]:
        return [name for name in DEPTHS if isinstance(getattr(self._text, name, None), int)]


def guess_task(config: Any) -> str:
    """The likely task of a configuration's base, by the name of its architecture or by whether it has a decoder."""
    named = " ".join(getattr(config, "architectures", None) or ())
    if "SequenceClassification" in named or config.model_type in (
        "bert",
        "roberta",
        "distilbert",
        "deberta-v2",
        "electra",
    ):
        return "classification"
    return "seq2seq" if getattr(config, "is_encoder_decoder", False) else "causal"


def read_config(source: str | Path) -> Any:
    """Read a transformers configuration from a folder, a config.json or a hub id; weights are not needed.

    Raises:
        ConfigError: there is none, or it cannot be used.
    """
    from transformers import AutoConfig

    path = Path(source).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise ConfigError(
            f"base {source} has no config.json. Give a transformers model folder, its config.json, or a hub id"
        )
    if not path.exists() and (str(source).startswith((".", "/", "~")) or str(source).count("/") > 1):
        raise ConfigError(
            f"base {source}: there is no such folder. Give a transformers model folder, or a hub id (owner/name)"
        )
    try:
        try:
            return AutoConfig.from_pretrained(str(path if path.exists() else source), local_files_only=True)
        except OSError:
            if path.exists():
                raise
            return AutoConfig.from_pretrained(str(source))
    except (OSError, ValueError, KeyError, TypeError) as error:
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"base {source}: its configuration cannot be read ({text[:300]})") from error
