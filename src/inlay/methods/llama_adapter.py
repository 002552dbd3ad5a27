"""LLaMA-Adapter: adaption prompts in the top layers' attention, multiplied by a gate that starts at zero.

Zhang et al. 2023, "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention",
arXiv:2303.16199, equations 4–7.

    P (length, hidden), one a layer ~ N(0, 1)     K_P = P W_k + b_k, V_P = P W_v + b_v    the layer's own, frozen
    out = softmax(q K_textᵀ / √d) V_text + g · softmax(q K_Pᵀ / √d) V_P                   g one a head, zero at first

The two softmaxes are separate, so a fresh adapter changes nothing. Queries carry their rotary positions, the
prompts' keys none; a norm on the keys (Qwen3, Gemma 3), a cap on the scores (Gemma 2) and attention dropout act on
the prompts as on the text.

The gate: equation 7 and the authors' inference code multiply by g, their training code, which made the published
weights, by tanh(g), and their later code does so in both. So ``tanh`` is the default; PEFT trains with ``raw``.

Places: self-attention, 30 of LLaMA's 32 layers; here all but the first two of each stack, and at least the last.
The paper has no encoder–decoder; cross-attention is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.authoring import (
    AttentionPlace,
    KeyValuePrompt,
    KeyValues,
    ModelView,
    PromptMethod,
    Recipe,
    SelectionError,
    Site,
    UnsupportedError,
    cast,
)

KEY_NORMS = ("k_norm", "key_norm", "k_layernorm", "key_layernorm")
QUERY_NORMS = ("q_norm", "query_norm", "q_layernorm", "query_layernorm")


@dataclass(frozen=True, kw_only=True)
class LLaMAAdapter(PromptMethod):
    """Adaption prompts with zero-init attention.

    Attributes:
        length: prompts in each layer.
        depth: number of layers, counted from the top; None means all but the first two.
        gate: factor on the prompts' attention: tanh(g), or g itself (``raw``).
    """

    name: ClassVar[str] = "llama-adapter"
    paper: ClassVar[str] = "arXiv:2303.16199"
    family: ClassVar[str] = "soft prompt"
    table_order: ClassVar[int] = 50
    # Tuned rate (docs/quality.md; the authors' 9e-3 is for 256 rows); warm-up over 2 of 5 epochs as in finetuning.sh.
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-2, schedule="cosine", warmup=0.4, weight_decay=0.02)
    default_where: ClassVar[str] = "attention"

    length: int = 10
    depth: int | None = None
    gate: Literal["tanh", "raw"] = "tanh"

    def __post_init__(self) -> None:
        self.require(
            (self.length >= 1, f"length is {self.length}, expected at least 1"),
            (self.depth is None or self.depth >= 1, f"depth is {self.depth}, expected None or at least 1"),
            (self.gate in ("tanh", "raw"), f"gate is {self.gate!r}, expected 'tanh' or 'raw'"),
        )

    def build(self, view: ModelView, layers: tuple[int, ...] | None) -> KeyValuePrompt:
        own = [p for p in view.attention_places() if not p.cross]
        if layers is not None and self.depth is not None:
            raise SelectionError("`depth` and `layers` both choose the layers; give only one of them")
        counts = {p.stack: 1 + p.layer for p in own}
        lowest = {s: n - (max(n - 2, 1) if self.depth is None else self.depth) for s, n in counts.items()}
        chosen = [p for p in own if (p.layer >= lowest[p.stack] if layers is None else p.layer in layers)]
        if not chosen:
            raise SelectionError(f"layers {layers} have no self-attention to put prompts beside")
        keys, values = ({s.path.rpartition(".")[0]: s for s in view.by_role(role)} for role in ("key", "value"))
        missing = [p.path for p in chosen if p.path not in keys or p.path not in values]
        if missing:
            raise UnsupportedError(f"{missing[0]} has no key and value projections for prompts; use prefix-tuning")
        return AdaptionPrompt([_Place(p, keys[p.path], values[p.path], _key_norm(view, p)) for p in chosen], self)

    @classmethod
    def examples(cls) -> list[LLaMAAdapter]:
        return [cls(length=3), cls(length=2, depth=2, gate="raw")]


@dataclass(frozen=True, eq=False)
class _Place:
    attention: AttentionPlace
    key: Site
    value: Site
    key_norm: Site | None


class AdaptionPrompt(KeyValuePrompt):
    """The prompts and gates of all layers, by attention module."""

    gated: ClassVar[bool] = True

    def __init__(self, places: list[_Place], method: LLaMAAdapter) -> None:
        super().__init__()
        self.length, self.tanh = method.length, method.gate == "tanh"
        self.places = {p.attention.path.replace(".", "_"): p for p in places}
        self.prompts = nn.ParameterDict(
            {n: nn.Parameter(p.key.empty(self.length, p.key.in_features)) for n, p in self.places.items()}
        )  # (length, hidden)
        self.gates = nn.ParameterDict({n: nn.Parameter(p.key.empty(p.attention.heads)) for n, p in self.places.items()})

    def initialise(self, view: ModelView) -> None:
        for name in self.places:
            nn.init.normal_(self.prompts[name])
            nn.init.zeros_(self.gates[name])

    def keys_values(self) -> KeyValues:
        found: KeyValues = {}
        for name, place in self.places.items():
            heads = (self.length, place.attention.key_heads, place.attention.head_dim)
            keys, values = (_projected(site, self.prompts[name]).view(heads) for site in (place.key, place.value))
            keys = _normalised(place.key_norm, keys)
            gates = torch.tanh(self.gates[name]) if self.tanh else self.gates[name]
            found[place.attention.path] = (keys.transpose(0, 1), values.transpose(0, 1), gates)
        return found


def _projected(site: Site, prompts: Tensor) -> Tensor:
    weight, bias = site.read_weight()
    return F.linear(cast(prompts, weight), weight, bias)  # (length, key heads * head size)


def _key_norm(view: ModelView, place: AttentionPlace) -> Site | None:
    """The norm that the attention module applies to its keys; anything else it does to them is refused."""
    inside = {p.removeprefix(place.path + "."): m for p, m in view.modules.items() if p.startswith(place.path + ".")}
    norms = [n for n, m in inside.items() if "norm" in type(m).__name__.lower() and n not in QUERY_NORMS]
    site = view.layers.get(f"{place.path}.{norms[0]}") if len(norms) == 1 and norms[0] in KEY_NORMS else None
    fits = site is not None and site.out_features in (place.head_dim, place.key_heads * place.head_dim)
    if getattr(view.text_config, "clip_qkv", None) is not None or (norms and not fits):
        raise UnsupportedError(
            f"{place.path} ({type(place.module).__name__}) changes its keys by {', '.join(norms) or 'clip_qkv'}, which "
            "inlay cannot apply to the keys of adaption prompts; use prefix-tuning instead"
        )
    return site


def _normalised(norm: Site | None, keys: Tensor) -> Tensor:
    """Keys (length, key heads, head size) after the frozen norm, applied to each head or to all at once."""
    if norm is None:
        return keys
    whole = keys if norm.out_features == keys.shape[-1] else keys.flatten(1)
    return norm.compute(whole).view_as(keys)
