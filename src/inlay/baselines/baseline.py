"""The contract of a baseline: a frozen dataclass of hyper-parameters that fits and answers; the base stays as it is."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from inlay.core.errors import ConfigError, problems
from inlay.data import Layout, OnLong, Task, Template
from inlay.evaluate.likelihood import Likelihood
from inlay.evaluate.progress import Advance, Progress, counting
from inlay.evaluate.run import Prediction

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows and a base: everything that fitting and answering need.

    Attributes:
        labels: labels of the training data, in order; None if it has none.
        max_length: most tokens of a row.
        seed: seed of every random draw.
        max_new_tokens: most tokens of a generated text; None is a little more than the longest reference.
        num_beams: number of beams; 1 is greedy search.
    """

    model: Any
    tokenizer: Any
    dataset: Dataset
    layout: Layout
    task: Task
    labels: tuple[str, ...] | None
    template: Template
    max_length: int
    batch_size: int = 8
    on_long: OnLong = "error"
    seed: int = 0
    max_new_tokens: int | None = None
    num_beams: int = 1
    progress: Progress | None = None

    def stage(self, name: str, total: int) -> Advance | None:
        """A callback for a stage, to be called with the number of rows just finished; None if nobody listens."""
        return counting(self.progress, name, total)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The result of fitting.

    Attributes:
        tensors: numbers, to be stored as safetensors.
        facts: plain data, to be stored as JSON.
        texts: file name → text, for files in another library's format.
        parameters: number of values learnt outside of the base.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    parameters: int = 0


@dataclass(frozen=True, kw_only=True)
class Baseline(ABC):
    """Hyper-parameters of one baseline. Abstract.

    Class variables:
        name: registry key and command-line word.
        paper: where it was published.
        on_long: possible values of the option `on_long`; all of them keep every row.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    family: ClassVar[str] = "baseline"
    on_long: ClassVar[tuple[OnLong, ...]] = ("error",)

    @abstractmethod
    def task(self, layout: Layout, asked: Task | None, source: str) -> Task:
        """The task for which to load the base, given the layout of the data.

        Raises:
            ConfigError: the baseline does not suit the data, or the task that was asked for.
        """

    @abstractmethod
    def fit(self, rows: Rows) -> Fitted:
        """Learn from training rows, without changing the base."""

    @abstractmethod
    def predict(self, fitted: Fitted, rows: Rows) -> tuple[list[Prediction], dict[str, Any]]:
        """The answers, and facts about how they were found."""

    def likelihood(self, fitted: Fitted, rows: Rows) -> tuple[Likelihood, dict[str, Any]]:
        """How probable the given completions are."""
        raise ConfigError(f"method {self.name!r} gives answers, not probabilities of texts; choose metrics of answers")

    def seen(self, model: Any) -> Any:
        """The part of a model on which answers depend; its fingerprint identifies the base."""
        return model

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.name, **dataclasses.asdict(self)}

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """Make one from plain values; raises one `ConfigError` that lists everything wrong with them."""
        from inlay.train.hyper import check_fields

        return cls(**check_fields(cls, settings, heading=f"method {cls.name!r}", noun="hyper-parameter"))

    def require(self, *checks: tuple[bool, str]) -> None:
        wrong = [message for holds, message in checks if not holds]
        if wrong:
            raise ConfigError(problems(f"method {self.name!r}", wrong))
