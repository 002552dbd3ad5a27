"""P-tuning: virtual tokens computed by an encoder over all of them, with words between them.

Liu et al. 2021, "GPT Understands, Too", arXiv:2103.10385, section 3.

    h = MLP(BiLSTM(E))         E (length, d) ── BiLSTM, 2 layers, d/2 each way ── Linear d ── ReLU ── Linear d
    [h_0 … h_i ; e("capital of") ; h_i+1 … h_m ; text]         anchors e are the base's embeddings, frozen

Sizes and initialisation are the official code's: E starts standard normal. A later revision of the paper allows an
MLP or nothing instead of the LSTM: ``mlp`` is the three linear layers of Hugging Face PEFT's default; with ``none`` E
starts as embeddings of common words. Unlike in PEFT, E and the encoder are stored, so that training can continue after
loading. The base stays frozen (for SuperGLUE the paper trains it too); the whole template stands in front of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from inlay.authoring import ConfigError, ModelView, PromptMethod, Recipe, TokenPrompt, widened
from inlay.methods._soft import common_words, embedded, empty, table, words

Template = tuple[int | str | tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class PTuning(PromptMethod):
    """Virtual tokens behind a prompt encoder.

    Attributes:
        length: virtual tokens.
        encoder: ``lstm``, ``mlp`` or ``none``.
        projection: inner size of each direction of the LSTM (None is d / 2), or of the MLP (None is d).
        template: the order of virtual tokens and anchors, such as ``(3, "capital of", 3)``: a number stands for that
            many virtual tokens, a text or a tuple of token ids for itself. Empty means virtual tokens only.
    """

    name: ClassVar[str] = "p-tuning"
    paper: ClassVar[str] = "arXiv:2103.10385"
    family: ClassVar[str] = "soft prompt"
    table_order: ClassVar[int] = 20
    # The official code's 1e-5 is for its 1,000 epochs of a few sentences; PEFT's examples use 1e-3.
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3)
    default_where: ClassVar[str] = "input"
    expected_failures: ClassVar[dict[str, str]] = {"identity": "virtual tokens change the output from the start"}

    length: int = 20
    encoder: Literal["lstm", "mlp", "none"] = "lstm"
    projection: int | None = None
    template: Template = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "template", tuple(tuple(t) if isinstance(t, list) else t for t in self.template))
        virtual = sum(t for t in self.template if isinstance(t, int))
        known = ("lstm", "mlp", "none")
        self.require(
            (self.length >= 1, f"length is {self.length}, expected at least 1"),
            (self.encoder in known, f"encoder is {self.encoder!r}, expected one of {known}"),
            (self.projection is None or self.projection >= 1, f"projection is {self.projection}, expected a size"),
            (
                self.projection is None or self.encoder != "none",
                "projection is the size of an encoder, but encoder is 'none'",
            ),
            (all(bool(t) for t in self.template), "template has an empty entry"),
            (virtual == self.length or not self.template, f"template has {virtual} virtual tokens, not {self.length}"),
        )

    def build(self, view: ModelView, layers: tuple[int, ...] | None) -> TokenPrompt:
        if layers is not None:
            raise ConfigError("method 'p-tuning' acts at the input, so it takes no `layers`")
        return EncodedPrompt(view, self)

    @classmethod
    def examples(cls) -> list[PTuning]:
        between: Template = (1, (5, 9), 2, (7,))
        return [cls(length=3, template=between), cls(length=4, encoder="mlp"), cls(length=3, encoder="none")]


class EncodedPrompt(TokenPrompt):
    """Virtual tokens and anchors, in the order of the template."""

    anchors: Tensor

    def __init__(self, view: ModelView, method: PTuning) -> None:
        super().__init__()
        self.method, hidden = method, table(view).shape[1]
        parts = [words(view, t) if isinstance(t, str) else t for t in method.template or (method.length,)]
        self.ids = [i for part in parts if not isinstance(part, int) for i in part]
        virtual, anchored = iter(range(method.length)), iter(range(method.length, method.length + len(self.ids)))
        counts = [(virtual, p) if isinstance(p, int) else (anchored, len(p)) for p in parts]
        self.order = [next(slot) for slot, count in counts for _ in range(count)]
        self.length = len(self.order)
        self.vectors = nn.Parameter(empty(view, method.length, hidden))  # (virtual tokens, hidden)
        if self.ids:  # stored with the adapter, so that they do not depend on the tokenizer at hand
            self.register_buffer("anchors", empty(view, len(self.ids), hidden))
        self.encoder = _encoder(method, hidden, self.vectors)

    def embeddings(self) -> Tensor:
        made: Tensor = self.vectors if self.encoder is None else self.encoder(self.vectors)
        return torch.cat([made, self.anchors.to(made.dtype)])[self.order] if self.ids else made

    def initialise(self, view: ModelView) -> None:
        if self.ids:
            self.anchors.copy_(embedded(view, self.ids))
        nn.init.normal_(self.vectors)
        if self.encoder is None:
            self.vectors.copy_(embedded(view, common_words(view, len(self.vectors))))
        for module in () if self.encoder is None else self.encoder.modules():
            if isinstance(module, (nn.Linear, _Recurrent)):
                module.reset_parameters()


class _Recurrent(nn.Module):
    """A bidirectional LSTM of two layers and an MLP of two. No `nn.LSTM`, because that cannot be compiled."""

    def __init__(self, hidden: int, inner: int, like: Tensor) -> None:
        super().__init__()
        self.inner = inner
        sizes = [s for width in (hidden, 2 * inner) for _ in (0, 1) for s in ((width,), (inner,), (), ())]
        self.lstm = nn.ParameterList(nn.Parameter(like.new_empty(4 * inner, *s)) for s in sizes)
        self.head = _linears((2 * inner, 2 * inner, hidden), like)

    def reset_parameters(self) -> None:
        for value in self.lstm:
            nn.init.uniform_(value, -(self.inner**-0.5), self.inner**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """In float32, also under autocast: processors without bfloat16 have no LSTM of it either."""
        values = [widened(value) for value in self.lstm]
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):  # plans are made without values
            wide = widened(x)[:, None]
            start = wide.new_zeros(4, 1, self.inner)  # (layers * directions, 1, inner)
            states = torch.lstm(wide, (start, start), values, True, 2, 0.0, self.training, True, False)[0]
        return cast(Tensor, self.head(states[:, 0].to(x.dtype)))


def _encoder(method: PTuning, hidden: int, like: Tensor) -> nn.Module | None:
    if method.encoder == "none":
        return None
    if method.encoder == "mlp":
        inner = method.projection or hidden
        return _linears((hidden, inner, inner, hidden), like)
    if method.projection is None and hidden % 2:
        raise ConfigError(f"hidden size {hidden} is odd and cannot be halved for two directions: give a projection")
    return _Recurrent(hidden, method.projection or hidden // 2, like)


def _linears(sizes: tuple[int, ...], like: Tensor) -> nn.Sequential:
    """Linear layers with a ReLU between each two."""
    layers = [nn.Linear(a, b, device=like.device, dtype=like.dtype) for a, b in pairwise(sizes)]
    return nn.Sequential(*[module for layer in layers for module in (nn.ReLU(), layer)][1:])
