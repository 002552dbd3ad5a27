"""Prefix tuning: trained keys and values in front of those of every attention module.

Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", arXiv:2101.00190, equations 2–3.

    h_i = P_θ[i, :] for i in the prefix, at every layer; P_θ = MLP(P'), the MLP reparameterises training
    Embedding(length, d) ── Linear(d, projection) ── tanh ── Linear(projection, 2 · layers · key size)

In the paper's text P' is as wide as the MLP; the official code, which produced its results, embeds in the
hidden size first. We follow the code. On an encoder–decoder the encoder's self-attention, the decoder's
self-attention and its cross-attention have a prefix and an MLP each, as in the authors' BART model. In a
decoder the text's positions shift by the length, as they do there. Initialisation: a random P', or (section 7.4,
where data is scarce) the keys and values that the base computes for real words, repeated to the length; on an
encoder–decoder both halves read them. The words are the prefix itself, so they need it without the MLP.

The paper trains through the MLP (`projection=512`), since at its rates the prefix itself was unstable (section 7.2).
With AdamW at 3e-2 the prefix itself is stable, and learns faster: on held-out questions of TREC (MiniLM-L6, 120 steps)
0.36 nats against 1.19 at the MLP's best rate, 1e-3. So the MLP is an option here, as it is in its successors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from inlay.authoring import (
    AttentionPlace,
    KeyValuePrompt,
    KeyValues,
    ModelView,
    PromptMethod,
    Recipe,
    SelectionError,
    keys_values,
)
from inlay.methods._soft import repeated, table, words


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(PromptMethod):
    """Key/value prefixes.

    Attributes:
        length: positions; the paper uses 10 for table-to-text and 200 for summarisation.
        projection: inner size of the reparameterising MLP (512 or 800 in the paper), which has its own learning rate;
            None trains the prefix itself.
        init: ``random`` or ``text``.
        text: the text for ``init="text"``.
    """

    name: ClassVar[str] = "prefix-tuning"
    paper: ClassVar[str] = "arXiv:2101.00190"
    family: ClassVar[str] = "soft prompt"
    table_order: ClassVar[int] = 40
    recipe: ClassVar[Recipe] = Recipe(learning_rate=3e-2)
    default_where: ClassVar[str] = "attention"
    expected_failures: ClassVar[dict[str, str]] = {"identity": "a prefix changes the output from the start"}

    length: int = 20
    projection: int | None = None
    init: Literal["random", "text"] = "random"
    text: str = ""

    def __post_init__(self) -> None:
        if self.projection is not None:
            object.__setattr__(self, "recipe", Recipe(learning_rate=1e-3))
        self.require(
            (self.length >= 1, f"length is {self.length}, expected at least 1"),
            (
                self.projection is None or self.projection >= 1,
                f"projection is {self.projection}, expected None or a size",
            ),
            (self.init in ("random", "text"), f"init is {self.init!r}, expected 'random' or 'text'"),
            ((self.init == "text") == bool(self.text), "init='text' and a `text` go together"),
            (self.init == "random" or self.projection is None, "init='text' needs projection=None"),
        )

    def build(self, view: ModelView, layers: tuple[int, ...] | None) -> KeyValuePrompt:
        places = [p for p in view.attention_places() if layers is None or p.layer in layers]
        if not places:
            raise SelectionError(f"layers {layers} have no attention to put a prefix in front of")
        return Prefix(places, self, view.hidden_size)

    @classmethod
    def examples(cls) -> list[PrefixTuning]:
        return [cls(length=3, projection=6), cls(length=4, projection=None)]


class Prefix(KeyValuePrompt):
    """One prefix for each kind of attention: the encoder's, the decoder's, and cross-attention."""

    def __init__(self, places: list[AttentionPlace], method: PrefixTuning, hidden: int) -> None:
        super().__init__()
        self.method, self.length = method, method.length
        self.groups: dict[str, list[AttentionPlace]] = {}
        for place in places:
            self.groups.setdefault(f"{place.stack}{'.cross' if place.cross else ''}".replace(".", "_"), []).append(
                place
            )
        self.parts = nn.ModuleDict({key: _Part(group, method, hidden) for key, group in self.groups.items()})

    def initialise(self, view: ModelView) -> None:
        seen = self._words(view) if self.method.init == "text" else {}
        for key, group in self.groups.items():
            part: Any = self.parts[key]
            part.initialise()
            if seen:
                pairs = torch.stack([torch.stack(seen[p.path]) for p in group])  # (layers, 2, key heads, length, size)
                part.table.copy_(pairs.permute(3, 0, 1, 2, 4).reshape(part.table.shape))

    def _words(self, view: ModelView) -> KeyValues:
        device = table(view).device
        ids = torch.tensor([repeated(words(view, self.method.text), self.length)], device=device)  # (1, length)
        decoded = {"decoder_input_ids": ids} if getattr(view.config, "is_encoder_decoder", False) else {}
        return keys_values(view, [p for group in self.groups.values() for p in group], input_ids=ids, **decoded)

    def keys_values(self) -> KeyValues:
        found: KeyValues = {}
        for key, group in self.groups.items():
            first = group[0]
            flat = self.parts[key]()  # (length, layers * 2 * key heads * head size)
            shaped = flat.view(self.length, len(group), 2, first.key_heads, first.head_dim).permute(1, 2, 3, 0, 4)
            for place, pair in zip(group, shaped, strict=True):
                found[place.path] = (pair[0], pair[1])  # (key heads, length, head size)
        return found


class _Part(nn.Module):
    """(length, layers * 2 * key size): trained directly, or through the MLP."""

    def __init__(self, group: list[AttentionPlace], method: PrefixTuning, hidden: int) -> None:
        super().__init__()
        first = group[0]
        width = len(group) * 2 * first.key_heads * first.head_dim
        dtype = first.dtype if first.dtype == torch.float64 else torch.float32
        mid, length = method.projection, method.length
        self.table = nn.Parameter(
            torch.empty(length, width if mid is None else hidden, device=first.device, dtype=dtype)
        )
        self.inner = None if mid is None else nn.Linear(hidden, mid, device=first.device, dtype=dtype)
        self.outer = None if mid is None else nn.Linear(mid, width, device=first.device, dtype=dtype)

    def initialise(self) -> None:
        nn.init.normal_(self.table, std=0.02 if self.inner is None else 1.0)
        for linear in (self.inner, self.outer):
            if linear is not None:
                linear.reset_parameters()

    def forward(self) -> Tensor:
        if self.inner is None or self.outer is None:
            return self.table
        out: Tensor = self.outer(torch.tanh(self.inner(self.table)))
        return out
