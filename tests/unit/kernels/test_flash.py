"""Attention's own backward pass against torch's, and where it is not taken."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import inlay
from inlay.kernels import flash
from inlay.kernels.dropout import Dropout
from inlay.kernels.flash import FasterBackward
from inlay.testing.models import ZOO


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def attended(tokens: int, keys: int, mask: Tensor | None, causal: bool) -> list[Tensor]:
    """Output and gradients of queries, keys and values that are views, as models make them."""
    sizes = (tokens, keys, keys)
    leaves = [drawn(2, n, 3, 16, seed=i).requires_grad_() for i, n in enumerate(sizes)]
    q, k, v = (t.transpose(1, 2) for t in leaves)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=0.3)
    grads: Any = torch.autograd.grad(out, leaves, drawn(2, 3, tokens, 16, seed=9))
    return [out, *grads]


def padded(tokens: int) -> Tensor:
    mask = torch.ones(2, 1, tokens, tokens, dtype=torch.bool).tril()
    mask[1, :, 5:, :5] = False
    return mask


@pytest.mark.parametrize("block", [4, 128])
@pytest.mark.parametrize(
    ("tokens", "keys", "mask", "causal"),
    [
        (11, 11, None, True),
        (11, 11, None, False),
        (7, 11, None, False),
        (11, 11, padded(11), False),
        (11, 11, torch.zeros(1, 1, 11, 11).bfloat16().masked_fill_(~padded(11)[:1], -1e4), False),
        (11, 11, drawn(2, 3, 11, 11, seed=5), False),
        (11, 11, drawn(1, 3, 11, 11, seed=5).float(), False),
        (11, 11, drawn(2, 1, 1, 11, seed=5), False),
        (11, 11, padded(11)[:1, :, -1:], False),
    ],
)
def test_the_same_gradients(
    tokens: int, keys: int, mask: Tensor | None, causal: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "BLOCK", block)
    theirs = attended(tokens, keys, mask, causal)
    with FasterBackward():
        ours = attended(tokens, keys, mask, causal)
    assert torch.equal(ours[0], theirs[0])  # the very kernel
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        assert one.dtype == other.dtype
        assert float((one - other).float().norm()) <= 0.015 * float(other.float().norm())


def test_a_row_that_sees_nothing_gets_no_gradient_that_is_not_a_number() -> None:
    mask = padded(6)
    mask[0, :, 2] = False
    with FasterBackward():
        ours = attended(6, 6, mask, False)
    theirs = attended(6, 6, mask, False)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert float((one - other).detach().float().norm()) <= 0.015 * float(other.detach().float().norm())


def test_what_is_finite_in_a_wider_mask_stays_so() -> None:
    """float32's lowest number is infinite in bfloat16; a query that sees such keys alone sees all of them alike."""
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(2, 1, 6, 6).masked_fill(~padded(6), lowest)
    mask[0, :, 2], mask[0, :, 4] = lowest, float("-inf")
    narrow = mask.bfloat16().nan_to_num(neginf=torch.finfo(torch.bfloat16).min)
    narrow[0, :, 4] = float("-inf")
    found = []
    for given in (mask, narrow):
        with FasterBackward():
            found.append(attended(6, 6, given, False)[1:])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_beside_a_float32_mask() -> None:
    """T5's bias by position stays float32 where queries are cast."""
    specimen = ZOO["t5"]
    model, batch = specimen.build(), specimen.batch(2, 0)
    parameters = list(inlay.attach(model, inlay.LoRA(rank=2)).parameters())
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(loss, parameters))


@pytest.mark.parametrize(("rows", "at_once"), [(5, 2 * 3 * 11 * 11), (2, 1)])
def test_some_rows_at_a_time(rows: int, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows, two, one; and one by one where a row is more than the room."""
    monkeypatch.setattr(flash, "AT_ONCE", at_once)
    leaves = [drawn(rows, 11, 3, 16, seed=i).requires_grad_() for i in range(3)]
    found: list[Any] = []
    for way in (FasterBackward(), contextlib.nullcontext()):
        with way:
            out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in leaves), is_causal=True)
        found.append(torch.autograd.grad(out, leaves, drawn(rows, 3, 11, 16, seed=9)))
    for one, other in zip(*found, strict=True):
        assert float((one - other).float().norm()) <= 0.015 * float(other.float().norm())


@pytest.mark.parametrize("mask", [None, padded(11)])
def test_grouped_queries(mask: Tensor | None) -> None:
    """Six heads of queries share two of keys and values: the gradients of the shared are sums, the output the same."""
    sizes = (6, 2, 2)
    leaves = [drawn(2, 11, heads, 16, seed=i).requires_grad_() for i, heads in enumerate(sizes)]
    found: list[Any] = []
    for way in (FasterBackward(), contextlib.nullcontext()):
        with way:
            q, k, v = (t.transpose(1, 2) for t in leaves)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        assert (type(out.grad_fn).__name__ == "BlockedBackwardBackward") == isinstance(way, FasterBackward)
        found.append([out, *torch.autograd.grad(out, leaves, drawn(2, 6, 11, 16, seed=9))])
    assert torch.equal(found[0][0], found[1][0])
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        assert float((one - other).float().norm()) <= 0.015 * float(other.float().norm())


@pytest.mark.parametrize(
    "given",
    [{"dropout_p": 0.1}, {"is_causal": True, "dropout_p": 0.5}, {"attn_mask": torch.zeros(5, 5)}, {"scale": 0.0}],
)
def test_what_is_left_to_torch(given: dict[str, Any]) -> None:
    q = drawn(1, 2, 5, 16, seed=0).requires_grad_()
    assert not flash.applies(q, q, q, **given)
    assert flash.applies(q, q, q)
    assert not flash.applies(q.float(), q.float(), q.float())
    assert not flash.applies(q.detach(), q.detach(), q.detach())


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"is_causal": True},
        {"attn_mask": padded(11)},
        {"attn_mask": drawn(2, 3, 11, 11, seed=5).float()},
        {"scale": 0.3},
        {"enable_gqa": True},
    ],
)
def test_attention_with_dropout_is_torchs_formula(given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing dropped, so that torch's kernel without dropout is the oracle."""
    monkeypatch.setattr(Dropout, "apply", lambda shares, share, seed: shares)
    found = []
    for way, share in ((contextlib.nullcontext(), 0.0), (FasterBackward(), 0.1)):
        heads = (3, 1, 1) if "enable_gqa" in given else (3, 3, 3)
        leaves = [drawn(2, n, 11, 16, seed=i).float().requires_grad_() for i, n in enumerate(heads)]
        with way:
            out = F.scaled_dot_product_attention(*leaves, dropout_p=share, **given)
        found.append([out, *torch.autograd.grad(out, leaves, drawn(2, 3, 11, 16, seed=9).float())])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_attention_with_dropout_is_as_exact_as_torchs_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dropout, "apply", lambda shares, share, seed: shares)
    given = [3 * drawn(8, 4, 32, 32, seed=i) for i in range(3)]
    exact = F.scaled_dot_product_attention(*(t.double() for t in given))
    ours, theirs = (
        float((F.scaled_dot_product_attention(*given) if share == 0 else flash.with_dropout(*given, dropout_p=share))
              .double().sub(exact).norm()) for share in (0.1, 0.0)
    )  # fmt: skip
    assert ours <= 1.5 * theirs


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_what_is_dropped_in_attention(share: float) -> None:
    """Values of ones and zeros show the shares themselves."""
    q, k = (drawn(4, 2, 64, 16, seed=i).float().requires_grad_() for i in (0, 1))
    v = torch.eye(64).expand(4, 2, 64, 64)
    with FasterBackward():
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=share)
    kept = out != 0
    assert abs(float((~kept).float().mean()) - share) < 0.02
    expected = F.scaled_dot_product_attention(q, k, v) * kept / (1 - share)
    assert torch.allclose(out, expected, atol=1e-5)
    grads = drawn(4, 2, 64, 64, seed=3).float()
    ours, theirs = (torch.autograd.grad(t, (q, k), grads) for t in (out, expected))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpointed_layer_drops_the_same_twice(reentrant: bool) -> None:
    specimen = ZOO["bert"]
    found = []
    for checkpointed in (False, True):
        model = specimen.build()
        model.config._attn_implementation = "sdpa"
        for module in model.modules():
            if type(module).__name__.endswith("SelfAttention"):
                module.dropout = torch.nn.Dropout(0.5)
        torch.manual_seed(0)
        adapter = inlay.attach(model, inlay.LoRA(rank=2))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        torch.manual_seed(1)
        model(**specimen.batch(3, 1, ragged=True)).loss.backward()
        found.append([p.grad.clone() for p in adapter.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*found, strict=True))
