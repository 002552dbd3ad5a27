"""Packed texts give what padded ones give: loss, gradients and scores, and no text sees another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

import inlay
from inlay.core.errors import UnsupportedError
from inlay.kernels import packed
from inlay.testing.models import ZOO

DECODERS = [n for n, s in ZOO.items() if s.task == "causal"]
PACKED = [n for n in DECODERS if n != "bloom"]  # its attention passes by transformers' interface


def attached(name: str) -> tuple[Any, Any, dict[str, Tensor], dict[str, Tensor]]:
    specimen = ZOO[name]
    model = specimen.build()
    torch.manual_seed(0)
    adapter = inlay.attach(model, inlay.LoRA(rank=2))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.config.use_cache = False
    batch = specimen.batch(4, 1, ragged=True)
    order = [0, 1, 1, 2, 3]  # two neighbours of one length
    padded = {key: value[order] for key, value in batch.items()}
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(padded["input_ids"], padded["attention_mask"], strict=True)]
    labels = [lab[mask.bool()].tolist() for lab, mask in zip(padded["labels"], padded["attention_mask"], strict=True)]
    together = packed.pack(rows) | {"labels": torch.tensor([[t for r in labels for t in (-100, *r[1:])]])}
    return model, adapter, padded, together


@pytest.fixture
def prepared() -> Iterator[Any]:
    undone = []

    def prepare(model: Any) -> None:
        undone.append(packed.prepare(model))

    yield prepare
    for undo in undone:
        undo()


def step(model: Any, adapter: Any, batch: dict[str, Tensor]) -> tuple[Any, list[Tensor]]:
    for parameter in adapter.parameters():
        parameter.grad = None
    with packed.serving(batch) as given:
        out = model(**given)
        out.loss.backward()
    return out, [p.grad.clone() for p in adapter.parameters()]


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", PACKED)
def test_loss_and_gradients(name: str, checkpointed: bool, prepared: Any) -> None:
    model, adapter, padded, together = attached(name)
    expected, gradients = step(model, adapter, padded)
    if checkpointed:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    prepared(model)
    ours, own = step(model, adapter, together)
    assert torch.allclose(ours.loss, expected.loss, rtol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(own, gradients, strict=True))
    scores = torch.cat([s[m.bool()] for s, m in zip(expected.logits + 0, padded["attention_mask"], strict=True)])
    assert torch.allclose(ours.logits[0] + 0, scores, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", PACKED)
def test_no_text_sees_another(name: str, prepared: Any) -> None:
    model, _, padded, _ = attached(name)
    texts = [ids[mask.bool()].tolist() for ids, mask in zip(padded["input_ids"], padded["attention_mask"], strict=True)]
    prepared(model)
    with torch.no_grad():
        assert packed.isolates(model, texts, 1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_model_that_mixes_texts_is_found_out(name: str) -> None:
    """Without the attention that takes texts apart, and without positions that say where they begin."""
    model, _, padded, _ = attached(name)
    texts = [ids[mask.bool()].tolist() for ids, mask in zip(padded["input_ids"], padded["attention_mask"], strict=True)]
    joined = model.forward

    def mixing(**given: Any) -> Any:
        return joined(**{**given, "position_ids": None})

    model.forward = mixing
    with torch.no_grad():
        assert not packed.isolates(model, texts, 1e-4)


def test_unpacked_calls_are_as_before(prepared: Any) -> None:
    model, adapter, padded, _ = attached("gemma3")
    expected, gradients = step(model, adapter, padded)
    before = model.config._attn_implementation
    undo = packed.prepare(model)
    ours, own = step(model, adapter, padded)
    assert torch.equal(ours.loss, expected.loss)
    assert all(torch.equal(a, b) for a, b in zip(own, gradients, strict=True))
    undo()
    assert model.config._attn_implementation == before


def test_attention_outside_the_interface_is_refused() -> None:
    with pytest.raises(UnsupportedError):
        packed.prepare(ZOO["bloom"].build())


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_the_kernel_for_all_texts_is_told_what_they_are(
    name: str, prepared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel itself runs on a GPU only; here stands what it is documented to compute."""
    model, adapter, padded, together = attached(name)
    expected, gradients = step(model, adapter, padded)
    calls = []

    def documented(
        q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, longest: int, _: int, *,
        scale: float | None, window_size: tuple[int, int], enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        """(tokens, heads, size) each; a token sees `window_size` to its left and right in its own text."""
        calls.append(longest)
        assert starts.dtype == torch.int32 and starts[0] == 0 and starts[-1] == len(q)
        assert longest == int(starts.diff().max())
        at = torch.arange(len(q))
        text = torch.bucketize(at, starts[1:], right=True)
        back = at[:, None] - at[None, :]
        left, right = window_size
        seen = (text[:, None] == text[None, :]) & (-back <= right) & ((back <= left) if left >= 0 else True)
        rows = [t.transpose(0, 1)[None] for t in (q, k, v)]
        out = torch.nn.functional.scaled_dot_product_attention(
            *rows, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        return out[0].transpose(0, 1)

    monkeypatch.setattr(packed, "_takes_all", lambda *_: True)
    monkeypatch.setattr(varlen, "varlen_attn", documented)
    prepared(model)
    ours, own = step(model, adapter, together)
    assert calls
    assert torch.allclose(ours.loss, expected.loss, rtol=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(own, gradients, strict=True))
