"""Prompt tuning: trained vectors in front of the embedded input.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", arXiv:2104.08691, section 2.

    [P_e ; X_e]          P_e (length, hidden); on an encoder–decoder in front of the encoder's input only

Initialisation (section 3.2): ``random`` uniform in ±0.5; ``vocabulary`` embeddings of tokens drawn from the 5,000
most common (a subword vocabulary is ordered by frequency, so its first 5,000 that are not special); ``text``
the tokens of a text, repeated to the length; ``labels`` one slot for each class label (the mean if it
has several tokens), the rest drawn from the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.authoring import ConfigError, ModelView, PromptMethod, Recipe, TokenPrompt
from inlay.methods._soft import common_words, embedded, empty, repeated, table, words


@dataclass(frozen=True, kw_only=True)
class PromptTuning(PromptMethod):
    """A soft prompt.

    Attributes:
        length: virtual tokens; the paper's default is 100.
        init: ``random``, ``vocabulary``, ``text`` or ``labels``.
        text: the text for ``init="text"``.
        labels: the class labels for ``init="labels"``.
    """

    name: ClassVar[str] = "prompt-tuning"
    paper: ClassVar[str] = "arXiv:2104.08691"
    family: ClassVar[str] = "soft prompt"
    table_order: ClassVar[int] = 10
    # The paper's 0.3 is Adafactor's, whose step is relative to the parameter's size.
    recipe: ClassVar[Recipe] = Recipe(learning_rate=3e-2, schedule="constant_with_warmup")
    default_where: ClassVar[str] = "input"
    expected_failures: ClassVar[dict[str, str]] = {"identity": "virtual tokens change the output from the start"}

    length: int = 20
    init: Literal["random", "vocabulary", "text", "labels"] = "vocabulary"
    text: str = ""
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = ("random", "vocabulary", "text", "labels")
        self.require(
            (self.length >= 1, f"length is {self.length}, expected at least 1"),
            (self.init in known, f"init is {self.init!r}, expected one of {known}"),
            ((self.init == "text") == bool(self.text), "init='text' and a `text` go together"),
            ((self.init == "labels") == bool(self.labels), "init='labels' and `labels` go together"),
            (len(self.labels) <= self.length, f"{len(self.labels)} labels do not fit a length of {self.length}"),
        )

    def build(self, view: ModelView, layers: tuple[int, ...] | None) -> TokenPrompt:
        if layers is not None:
            raise ConfigError("method 'prompt-tuning' acts at the input, so it takes no `layers`")
        return SoftPrompt(view, self)

    @classmethod
    def examples(cls) -> list[PromptTuning]:
        return [cls(length=3, init="random"), cls(length=5)]


class SoftPrompt(TokenPrompt):
    """The trained vectors."""

    def __init__(self, view: ModelView, method: PromptTuning) -> None:
        super().__init__()
        self.method, self.length = method, method.length
        self.vectors = nn.Parameter(empty(view, method.length, table(view).shape[1]))

    def embeddings(self) -> Tensor:
        return self.vectors

    def initialise(self, view: ModelView) -> None:
        if self.method.init == "random":
            nn.init.uniform_(self.vectors, -0.5, 0.5)
        else:
            self.vectors.copy_(torch.stack([embedded(view, ids).mean(0) for ids in self._rows(view)]))

    def _rows(self, view: ModelView) -> list[list[int]]:
        """For each slot, the vocabulary entries whose embeddings are averaged."""
        if self.method.init == "text":
            return [[i] for i in repeated(words(view, self.method.text), self.length)]
        named = [words(view, label) for label in self.method.labels]
        return named + [[i] for i in common_words(view, self.length - len(named))]
