"""What a layer is for, read from its path: the core's only table of facts about models.

Papers say "the value projections" or "after the feed-forward"; models call these `v_proj`, `value`, `v_lin`.
A role is found by the end of a module's path, never by the model's type, so a new architecture that keeps
the field's usual names needs no entry. Patterns are tried in order; the first that matches wins.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ROLES: tuple[tuple[str, str], ...] = (
    ("query", r"(q_proj|query|q_lin|query_proj|(SelfAttention|EncDecAttention)\.q)"),
    ("key", r"(k_proj|key|k_lin|key_proj|(SelfAttention|EncDecAttention)\.k)"),
    ("value", r"(v_proj|value|v_lin|value_proj|(SelfAttention|EncDecAttention)\.v)"),
    ("qkv", r"(attn\.c_attn|query_key_value|qkv_proj|Wqkv)"),
    ("attention_output", r"(o_proj|[^.]*(attn|attention)\.out_proj|out_lin|attention\.output\.dense"
                         r"|attn\.c_proj|attn\.Wo|(attention|self_attention)\.dense|(SelfAttention|EncDecAttention)\.o)"),
    ("gate", r"(gate_proj|DenseReluDense\.wi_0)"),
    ("up", r"(up_proj|gate_up_proj|fc1|intermediate\.dense|mlp\.c_fc|dense_h_to_4h|ffn\.lin1|mlp\.Wi"
           r"|DenseReluDense\.(wi|wi_1))"),
    ("down", r"(down_proj|fc2|output\.dense|mlp\.c_proj|dense_4h_to_h|ffn\.lin2|mlp\.Wo|DenseReluDense\.wo)"),
    ("experts", r"(mlp|block_sparse_moe|feed_forward)"),
)  # fmt: skip
_COMPILED = tuple((role, re.compile(rf"(?:^|.*\.){pattern}")) for role, pattern in ROLES)

ATTENTION = ("query", "key", "value", "qkv", "attention_output")
MLP = ("gate", "up", "down")

# The module whose output is the sublayer's, if it is not the projection itself but a dropout behind it.
SUBLAYER_DROPOUT = re.compile(
    r".*\.(attention\.output\.dropout|\d+\.output\.dropout|attn\.resid_dropout|mlp\.dropout|ffn\.dropout)"
)

LEARNED_POSITIONS = re.compile(r"(?:^|.*\.)(wpe|embed_positions|position_embeddings)")
FINAL_NORM = re.compile(r"(norm|ln_f|norm_f|layer_?norm|final_layer_?norm|final_norm)")  # beside the numbered layers
EXPERT = re.compile(r".*\bexperts?\..*")
CROSS_ATTENTION = re.compile(r".*(encoder_attn|crossattention|cross_attn|EncDecAttention)")


@dataclass(frozen=True)
class Fused:
    """How the outputs of a fused query-key-value matrix are laid out."""

    interleaved: bool


FUSED = {
    "c_attn": Fused(interleaved=False),
    "qkv_proj": Fused(interleaved=False),
    "Wqkv": Fused(interleaved=False),
    "query_key_value": Fused(interleaved=True),
}


def role_of(path: str) -> str | None:
    """The role of the module at `path`, or None."""
    return next((role for role, pattern in _COMPILED if pattern.fullmatch(path)), None)


def layer_of(path: str) -> tuple[str, int] | None:
    """The stack and the number of the layer that `path` lies in: ``model.layers.3.mlp`` → (``model.layers``, 3)."""
    words = path.split(".")
    for i, word in enumerate(words):
        if word.isdigit():
            return ".".join(words[:i]), int(word)
    return None
