"""What a baseline is: a frozen dataclass of hyper-parameters that fits and answers; the base learns nothing."""

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
    """Rows before a base: all that fitting and answering need.

    Attributes:
        labels: of the training data, in order; None where the data has none.
        max_length: tokens a row may have.
        seed: of every draw.
        max_new_tokens, num_beams: of generated texts; None is a little more than the longest reference.
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
        """A function that is told how many rows of a stage were just finished."""
        return counting(self.progress, name, total)


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What fitting found.

    Attributes:
        tensors: numbers, for safetensors.
        facts: plain data, for JSON.
        texts: file name → text, for what another library writes.
        parameters: numbers that were learnt outside the base.
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
        on_long: what can happen to rows that are too long; every row keeps its answer.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    family: ClassVar[str] = "baseline"
    on_long: ClassVar[tuple[OnLong, ...]] = ("error",)

    @abstractmethod
    def task(self, layout: Layout, asked: Task | None, source: str) -> Task:
        """The task to load the base for, of data of this layout.

        Raises:
            ConfigError: not for such data, or not for the task that was asked for.
        """

    @abstractmethod
    def fit(self, rows: Rows) -> Fitted:
        """Learn from training rows, without touching the base."""

    @abstractmethod
    def predict(self, fitted: Fitted, rows: Rows) -> tuple[list[Prediction], dict[str, Any]]:
        """Answers, and facts about how they came about."""

    def likelihood(self, fitted: Fitted, rows: Rows) -> tuple[Likelihood, dict[str, Any]]:
        """How probable the given completions are."""
        raise ConfigError(f"method {self.name!r} gives answers, not probabilities of texts; choose metrics of answers")

    def seen(self, model: Any) -> Any:
        """The part of a model that answers depend on, by which its base is known again."""
        return model

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.name, **dataclasses.asdict(self)}

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Self:
        """From plain values; all that is wrong with them is one `ConfigError`."""
        from inlay.train.hyper import check_fields

        return cls(**check_fields(cls, settings, heading=f"method {cls.name!r}", noun="hyper-parameter"))

    def require(self, *checks: tuple[bool, str]) -> None:
        wrong = [message for holds, message in checks if not holds]
        if wrong:
            raise ConfigError(problems(f"method {self.name!r}", wrong))
