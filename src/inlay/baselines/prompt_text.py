"""Prompt text alone: an instruction in front of the question, without demonstrations: `in-context` with k = 0.

Radford et al. 2019 did so with GPT-2; with instructions, Ouyang et al. 2022, arXiv:2203.02155.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from inlay.baselines.baseline import Baseline, Fitted, Rows
from inlay.baselines.in_context import InContext, language_task
from inlay.data import Layout, Task
from inlay.evaluate.likelihood import Likelihood
from inlay.evaluate.run import Prediction


@dataclass(frozen=True, kw_only=True)
class PromptText(Baseline):
    """An instruction, and nothing learnt.

    Attributes:
        instruction: text in front of every question; may be empty.
        between: text between the instruction and the question.
        length_normalised: compare labels by nats per token.
    """

    name: ClassVar[str] = "prompt-text"
    paper: ClassVar[str] = "arXiv:2203.02155"

    instruction: str = ""
    between: str = "\n\n"
    length_normalised: bool = True

    def task(self, layout: Layout, asked: Task | None, source: str) -> Task:
        return language_task(self.name, layout, asked, source)

    def fit(self, rows: Rows) -> Fitted:
        return Fitted()

    def predict(self, fitted: Fitted, rows: Rows) -> tuple[list[Prediction], dict[str, Any]]:
        found, _ = self._asking.predict(fitted, rows)
        return found, {}

    def likelihood(self, fitted: Fitted, rows: Rows) -> tuple[Likelihood, dict[str, Any]]:
        found, _ = self._asking.likelihood(fitted, rows)
        return found, {}

    @property
    def _asking(self) -> InContext:
        return InContext(
            k=0, instruction=self.instruction, between=self.between, length_normalised=self.length_normalised
        )
