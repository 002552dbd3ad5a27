"""Multitask prompt tuning: one prompt for all tasks, and two vectors for each.

Wang et al. 2023, "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning", arXiv:2303.02861, equation 2.

    P̂_k = P* ∘ (u_k v_kᵀ)         P* (length, hidden) for all tasks; u_k (length), v_k (hidden) for task k

Each task is an adapter of its own. The first holds P*; another one names it in `shared_with` and trains the same P*, so
that a batch of several tasks (``inlay.use(model, ["a", "b", …])``) trains P* on all of them. Every saved file has P*
and its own vectors; loaded without its partner, it gets its own copy of P*. Detaching one leaves the others. P* starts
as embeddings of common words, as in prompt tuning; u and v start at one, so that every task begins with P* itself
(Hugging Face PEFT draws them around zero, so that a task begins with nearly nothing).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from inlay.authoring import ConfigError, ModelView, PromptMethod, Recipe, Shared, TokenPrompt, find_roster
from inlay.methods._soft import common_words, embedded, empty, repeated, table, words


@dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuning(PromptMethod):
    """A task's share of a prompt for many tasks.

    Attributes:
        length: virtual tokens; the paper uses 100.
        init: initialisation of P*: ``random``, ``vocabulary`` or ``text``.
        text: the text for ``init="text"``.
        shared_with: name of an attached adapter of this method whose P* to share; empty means a P* of its own.
    """

    name: ClassVar[str] = "multitask-prompt"
    paper: ClassVar[str] = "arXiv:2303.02861"
    family: ClassVar[str] = "soft prompt"
    table_order: ClassVar[int] = 30
    # The paper's 0.3 is Adafactor's, as prompt tuning's; the product of three factors moves with each of them.
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-2, schedule="constant_with_warmup")
    default_where: ClassVar[str] = "input"
    expected_failures: ClassVar[dict[str, str]] = {"identity": "virtual tokens change the output from the start"}

    length: int = 20
    init: Literal["random", "vocabulary", "text"] = "vocabulary"
    text: str = ""
    shared_with: str = ""

    def __post_init__(self) -> None:
        known = ("random", "vocabulary", "text")
        self.require(
            (self.length >= 1, f"length is {self.length}, expected at least 1"),
            (self.init in known, f"init is {self.init!r}, expected one of {known}"),
            ((self.init == "text") == bool(self.text), "init='text' and a `text` go together"),
        )

    def build(self, view: ModelView, layers: tuple[int, ...] | None) -> TokenPrompt:
        if layers is not None:
            raise ConfigError("method 'multitask-prompt' acts at the input, so it takes no `layers`")
        return TaskPrompt(view, self)

    @classmethod
    def examples(cls) -> list[MultitaskPromptTuning]:
        return [cls(length=3, init="random"), cls(length=5)]


class CommonPrompt(Shared):
    """P*, held by every task's prompt."""

    def __init__(self, view: ModelView, method: MultitaskPromptTuning) -> None:
        super().__init__("prompt")
        self.method = method
        self.vectors = nn.Parameter(empty(view, method.length, table(view).shape[1]))  # (length, hidden)

    def initialise(self, view: ModelView) -> None:
        if self.method.init == "random":
            nn.init.uniform_(self.vectors, -0.5, 0.5)
            return
        ids = common_words(view, self.method.length) if self.method.init == "vocabulary" else None
        self.vectors.copy_(embedded(view, ids or repeated(words(view, self.method.text), self.method.length)))


class TaskPrompt(TokenPrompt):
    """P* ∘ (u vᵀ)."""

    def __init__(self, view: ModelView, method: MultitaskPromptTuning) -> None:
        super().__init__()
        self.method, self.length = method, method.length
        partner = _partner(view, method)
        self.alone = partner is None
        self.common = partner or CommonPrompt(view, method)
        self.columns = nn.Parameter(empty(view, method.length, 1))  # u (length, 1)
        self.rows = nn.Parameter(empty(view, 1, table(view).shape[1]))  # v (1, hidden)

    def embeddings(self) -> Tensor:
        return self.common.vectors * (self.columns * self.rows)

    def initialise(self, view: ModelView) -> None:
        if self.method.shared_with and self.alone:
            raise ConfigError(
                f"shared_with={self.method.shared_with!r} names no attached adapter of method 'multitask-prompt' with "
                f"{self.length} virtual tokens; attach that one first, or leave shared_with out"
            )
        nn.init.ones_(self.columns)
        nn.init.ones_(self.rows)


def _partner(view: ModelView, method: MultitaskPromptTuning) -> CommonPrompt | None:
    """P* of the adapter that `shared_with` names, if it is attached and has the same length."""
    roster = find_roster(view.model)
    adapter = None if roster is None else roster.adapters.get(method.shared_with)
    for prompt in () if adapter is None else adapter.modules():
        if isinstance(prompt, TaskPrompt) and prompt.length == method.length:
            return prompt.common
    return None
