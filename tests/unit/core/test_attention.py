"""Attention behind prefixes: `naive` against a loop over rows, `fused` against `naive`, both ways."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import inlay
from inlay.core.prompts.prefix_attention import fused, fusible, naive
from inlay.testing.models import ZOO


@dataclass(frozen=True)
class Case:
    """One call of the attention function."""

    rows: int
    tokens: int
    keys: int  # more than tokens where a cache stands in front
    key_heads: int
    groups: int
    size: int
    owners: tuple[int | None, ...]  # the adapter of each row, None without a prefix
    lengths: tuple[int, ...]  # of the adapters' prefixes
    mask: str
    biased: bool
    scaled: bool
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows = draw(st.integers(1, 4))
    tokens = draw(st.integers(1, 7))
    mask = draw(st.sampled_from(["none", "causal", "ragged", "ragged causal", "bool", "whole row"]))
    cached = draw(st.integers(0, 3)) if mask not in ("none", "causal") else 0
    lengths = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    owner = st.none() | st.integers(0, len(lengths) - 1)
    same = draw(st.booleans())
    owners = [0] * rows if same else draw(st.lists(owner, min_size=rows, max_size=rows))
    return Case(
        rows, tokens, tokens + cached, draw(st.integers(1, 3)), draw(st.integers(1, 3)),
        draw(st.sampled_from([4, 8])), tuple(owners), tuple(lengths), mask,
        draw(st.booleans()) and mask != "causal", draw(st.booleans()), draw(st.integers(0, 999)),
    )  # fmt: skip


class Drawn:
    """The tensors of a case; leaves require gradients."""

    def __init__(self, case: Case) -> None:
        self.case = case
        generator = torch.Generator().manual_seed(case.seed)

        def leaf(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).requires_grad_()

        self.query = leaf(case.rows, case.key_heads * case.groups, case.tokens, case.size)
        self.key = leaf(case.rows, case.key_heads, case.keys, case.size)
        self.value = leaf(case.rows, case.key_heads, case.keys, case.size)
        self.pairs = [(leaf(case.key_heads, n, case.size), leaf(case.key_heads, n, case.size)) for n in case.lengths]
        self.module = nn.Module()
        self.module.is_causal = case.mask == "causal"  # type: ignore[assignment]
        self.kwargs: dict[str, Any] = {"scaling": 0.3 if case.scaled else None}
        if case.biased:
            bias = torch.randn(1, case.key_heads * case.groups, case.tokens, case.keys, generator=generator)
            self.kwargs["position_bias"] = bias
        self.allowed, self.mask = self._mask(generator)
        self.weights = torch.randn(case.rows, case.tokens, case.key_heads * case.groups, case.size)

    def _mask(self, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """What may be seen, (rows, 1, tokens, keys), and the mask as transformers would pass it."""
        case = self.case
        allowed = torch.ones(case.rows, 1, case.tokens, case.keys, dtype=torch.bool)
        if case.mask == "none":
            return allowed, None
        if "causal" in case.mask:
            allowed = allowed.tril(case.keys - case.tokens)
            if case.mask == "causal":
                return allowed, None
        lengths = torch.randint(1, case.keys + 1, (case.rows,), generator=generator)
        allowed = allowed & (torch.arange(case.keys) < lengths[:, None])[:, None, None]
        if case.mask == "whole row":
            allowed[0] = False  # a row of padding only: it sees its prefix
        if case.mask == "bool":
            return allowed, allowed
        return allowed, torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)

    def prefixes(self) -> list[tuple[Tensor | None, Tensor, Tensor, None]]:
        if len(set(self.case.owners)) == 1 and self.case.owners[0] is not None:
            return [(None, *self.pairs[self.case.owners[0]], None)]
        return [
            (torch.tensor([r for r, o in enumerate(self.case.owners) if o == i]), *pair, None)
            for i, pair in enumerate(self.pairs)
            if i in self.case.owners
        ]

    def leaves(self) -> list[Tensor]:
        used = [t for i, pair in enumerate(self.pairs) if i in self.case.owners for t in pair]
        return [self.query, self.key, self.value, *used]

    def by_hand(self) -> Tensor:
        """One row and one head after another, in float64, (rows, tokens, heads, size)."""
        case, out = self.case, []
        scale = 0.3 if case.scaled else 1 / math.sqrt(case.size)
        for row in range(case.rows):
            heads = []
            for head in range(case.key_heads * case.groups):
                group = head // case.groups
                keys, values = self.key[row, group].double(), self.value[row, group].double()
                scores = self.query[row, head].double() @ keys.t() * scale
                if case.biased:
                    scores = scores + self.kwargs["position_bias"][0, head].double()
                scores = scores.masked_fill(~self.allowed[row, 0], -torch.inf)
                owner = case.owners[row]
                if owner is not None:
                    k, v = (t[group].double() for t in self.pairs[owner])
                    scores = torch.cat([self.query[row, head].double() @ k.t() * scale, scores], dim=1)
                    values = torch.cat([v, values])
                heads.append(scores.softmax(-1) @ values)
            out.append(torch.stack(heads, dim=1))
        return torch.stack(out)

    def gradients(self, out: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad((out * self.weights).sum(), self.leaves(), retain_graph=True))

    def seen(self) -> Tensor:
        """Rows whose attention is defined: something is visible to every token."""
        anything = self.allowed.any(-1).all(-1)[:, 0]
        return anything | torch.tensor([o is not None for o in self.case.owners])


def _near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    actual, expected = actual.detach().double(), expected.detach().double()
    error = float((actual - expected).abs().max())
    assert error <= tolerance * max(1.0, float(expected.abs().max())), error


@given(cases())
def test_naive_is_one_softmax_over_prefix_and_text(case: Case) -> None:
    drawn = Drawn(case)
    out, _ = naive(drawn.module, drawn.query, drawn.key, drawn.value, drawn.mask, drawn.prefixes(), **drawn.kwargs)
    seen = drawn.seen()
    _near(out[seen], drawn.by_hand()[seen])


@given(cases())
def test_fused_is_naive_forward_and_backward(case: Case) -> None:
    drawn = Drawn(case)
    drawn.weights = drawn.weights * drawn.seen()[:, None, None, None]
    seen = drawn.seen()
    arguments = (drawn.module, drawn.query, drawn.key, drawn.value, drawn.mask, drawn.prefixes())
    if not arguments[-1]:
        return
    assert fusible(drawn.query, drawn.value, drawn.prefixes(), drawn.kwargs)
    expected, _ = naive(*arguments, **drawn.kwargs)
    actual = fused(*arguments, **drawn.kwargs)
    _near(actual[seen], expected[seen])
    for got, wanted in zip(drawn.gradients(actual), drawn.gradients(expected), strict=True):
        _near(got, wanted)


def _case(**changes: Any) -> Case:
    values: dict[str, Any] = {
        "rows": 3, "tokens": 5, "keys": 5, "key_heads": 2, "groups": 2, "size": 8, "owners": (0, None, 1),
        "lengths": (2, 4), "mask": "ragged causal", "biased": False, "scaled": False, "seed": 1, **changes,
    }  # fmt: skip
    return Case(**values)


def test_a_row_without_a_prefix_is_plain_attention() -> None:
    drawn = Drawn(_case())
    out = fused(drawn.module, drawn.query, drawn.key, drawn.value, drawn.mask, drawn.prefixes())
    repeated = [t.repeat_interleave(2, dim=1) for t in (drawn.key, drawn.value)]
    plain = nn.functional.scaled_dot_product_attention(drawn.query, *repeated, attn_mask=drawn.mask)
    _near(out[1], plain.transpose(1, 2)[1])


def test_soft_capping_is_applied_to_prefix_and_text() -> None:
    drawn = Drawn(_case(owners=(0, 0, 0), mask="none", key_heads=1, groups=1))
    kwargs = {"softcap": 0.7}
    assert not fusible(drawn.query, drawn.value, drawn.prefixes(), kwargs)
    out, _ = naive(drawn.module, drawn.query, drawn.key, drawn.value, None, drawn.prefixes(), **kwargs)
    k, v = drawn.pairs[0]
    key, value = (
        torch.cat([k.expand(3, 1, 2, 8), drawn.key], 2),
        torch.cat([v.expand(3, 1, 2, 8), drawn.value], 2),
    )
    scores = 0.7 * torch.tanh(drawn.query @ key.mT / math.sqrt(8) / 0.7)
    _near(out, (scores.softmax(-1) @ value).transpose(1, 2))


def test_dropout_in_training_takes_the_naive_road() -> None:
    drawn = Drawn(_case())
    assert not fusible(drawn.query, drawn.value, drawn.prefixes(), {"dropout": 0.1})
    assert not fusible(drawn.query.double(), drawn.value.double(), drawn.prefixes(), {})


def test_second_order_gradients_are_refused() -> None:
    drawn = Drawn(_case())
    out = fused(drawn.module, drawn.query, drawn.key, drawn.value, drawn.mask, drawn.prefixes())
    first = torch.autograd.grad(out.square().sum(), drawn.query, create_graph=True)[0]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first.square().sum(), drawn.key)


def test_bfloat16_stays_near_float32() -> None:
    drawn = Drawn(_case())
    exact, _ = naive(drawn.module, drawn.query, drawn.key, drawn.value, drawn.mask, drawn.prefixes())
    assert drawn.mask is not None
    low = [t.detach().bfloat16() for t in (drawn.query, drawn.key, drawn.value)]
    pairs = [(rows, k.detach().bfloat16(), v.detach().bfloat16(), None) for rows, k, v, _ in drawn.prefixes()]
    mask = drawn.mask.clamp(min=torch.finfo(torch.bfloat16).min).bfloat16()
    out = fused(drawn.module, *low, mask, pairs)
    assert out.dtype == torch.bfloat16
    _near(out.float(), exact, tolerance=3e-2)


def test_attention_sinks_are_refused() -> None:
    """GPT-OSS puts a learnt sink into the softmax, which a second segment would not know of."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_local_experts=2, num_experts_per_tok=1, sliding_window=64,
        attn_implementation="eager", pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    inlay.attach(model, inlay.PrefixTuning(length=2, projection=None))
    with pytest.raises(inlay.UserError, match="sinks"):
        model(input_ids=torch.ones((1, 3), dtype=torch.long))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3", "gpt2", "t5"])
def test_prefixes_under_autocast(name: str, cached: bool) -> None:
    """Where a rotary embedding widens queries and keys but not values, `fused` is as exact as `naive`."""
    specimen = ZOO[name]
    batch = specimen.batch(rows=2, seed=0)

    def computed(*, fast: bool, casts: bool) -> list[Tensor]:
        model: Any = specimen.build()
        torch.manual_seed(0)
        adapter = inlay.attach(model, inlay.PrefixTuning(length=3))
        with inlay.fast_paths(fast), torch.autocast("cpu", torch.bfloat16, enabled=casts):
            out = model(**batch, use_cache=cached)
        out.loss.backward()
        return [out.logits.detach().float(), *(p.grad for p in adapter.parameters() if p.grad is not None)]

    exact = computed(fast=False, casts=False)
    assert len(exact) > 1
    for one, other, true in zip(computed(fast=True, casts=True), computed(fast=False, casts=True), exact, strict=True):
        assert float((one - true).norm()) <= 1.5 * float((other - true).norm()) + 1e-3 * float(true.norm())


@torch.no_grad()
def test_a_delta_at_a_table_of_positions_sees_the_moved_ones() -> None:
    """A prompt in front of the text moves what is looked up there, whatever else stands at the table."""
    specimen = ZOO["gpt2"]
    batch = {k: v for k, v in specimen.batch(rows=2, seed=0).items() if k != "labels"}
    table = "transformer.wpe"

    def attach(model: Any, *names: str) -> Any:
        for name in names:
            torch.manual_seed(0)
            method = inlay.LoRA(rank=2) if name == "delta" else inlay.PromptTuning(length=3)
            adapter = inlay.attach(model, method, where=[table] if name == "delta" else None, name=name)
            for parameter in adapter.parameters():
                parameter.normal_(0, 0.1)
        return model

    alone = {name: attach(specimen.build(), name)(**batch).logits for name in ("delta", "prompt")}
    model = attach(specimen.build(), "delta", "prompt")
    for name, expected in alone.items():
        with inlay.use(model, name):
            torch.testing.assert_close(model(**batch).logits, expected)
