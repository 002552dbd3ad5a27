"""LoReFT against the bare model with hooks behind its blocks, written from the paper's equation 2."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import inlay
from inlay.core.errors import ConfigError, SelectionError
from inlay.testing.models import ZOO
from tests.golden.hand import agree, close, inputs, numbers, shake, zoo_model

BLOCKS = {
    "llama": ["model.layers.{}"],
    "gpt2": ["transformer.h.{}"],
    "opt": ["model.decoder.layers.{}"],
    "gemma3": ["model.layers.{}"],
    "bert": ["bert.encoder.layer.{}"],
    "distilbert": ["distilbert.transformer.layer.{}"],
    "vit": ["vit.layers.{}"],
    "t5": ["encoder.block.{}", "decoder.block.{}"],
    "bart": ["model.encoder.layers.{}", "model.decoder.layers.{}"],
}


def orthonormal(free: Tensor) -> Tensor:
    """Gram and Schmidt: rows of R, (rank, d)."""
    rows: list[Tensor] = []
    for column in free.t():
        for row in rows:
            column = column - (column @ row) * row
        rows.append(column / column.norm())
    return torch.stack(rows)


def edit(h: Tensor, leaves: dict[str, Tensor], path: str, which: int) -> Tensor:
    stem = f"delta/{path}/edits.{which}."
    r, w, b = orthonormal(leaves[stem + "free"]), leaves[stem + "source"], leaves[stem + "bias"]
    return h + (h @ w.t() + b - h @ r.t()) @ r


def chosen(length: int, first: int, behind: int, prefix: int, suffix: int) -> tuple[list[int], list[int]]:
    half = (behind - first) // 2
    early = list(range(first, first + min(prefix, half)))
    late = list(range(behind - min(suffix, half), behind))
    assert not set(early) & set(late) and all(0 <= i < length for i in early + late)
    return early, late


def hooked(model: Any, paths: list[str], leaves: dict[str, Tensor], spans: Any, method: inlay.LoReFT) -> Any:
    """Edits one row and position at a time. `spans`: a (first, behind) for each row, or None for all positions."""

    def hook(path: str) -> Any:
        def after(module: Any, args: Any, out: Any) -> Any:
            h = out[0] if isinstance(out, tuple) else out
            rows = []
            for i, row in enumerate(h):
                states = list(row)
                if spans is None:
                    states = list(edit(row, leaves, path, 0))
                else:
                    early, late = chosen(len(states), *spans[i], method.prefix or 0, method.suffix or 0)
                    for at in early + late:
                        which = 0 if method.tied or at in early else 1
                        states[at] = edit(states[at], leaves, path, which)
                rows.append(torch.stack(states))
            new = torch.stack(rows)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        return after

    for path in paths:
        model.get_submodule(path).register_forward_hook(hook(path))
    return model


def spans_of(name: str, batch: dict[str, Tensor]) -> list[tuple[int, int]]:
    if name == "vit":
        return [(0, 5)] * batch["pixel_values"].shape[0]
    return [(int(m.nonzero()[0]), int(m.nonzero()[-1]) + 1) for m in batch["attention_mask"]]


METHODS = [
    inlay.LoReFT(rank=3, prefix=2, suffix=3),
    inlay.LoReFT(rank=2, prefix=7, suffix=7, tied=False),
    inlay.LoReFT(rank=2, prefix=0, suffix=1),
    inlay.LoReFT(rank=4, prefix=None, suffix=None),
]


@pytest.mark.parametrize("method", METHODS, ids=["tied", "untied-long", "last", "all"])
@pytest.mark.parametrize("name", BLOCKS)
def test_equals_the_equation(name: str, method: inlay.LoReFT) -> None:
    side = "left" if name in ("llama", "gpt2") else "right"
    batch = inputs(name, ragged=name != "vit", side=side)
    model = zoo_model(name)
    torch.manual_seed(0)
    adapter = shake(inlay.attach(model, method), 0.1)
    leaves = numbers(adapter)
    patterns = BLOCKS[name] if method.prefix is None else BLOCKS[name][:1]
    paths = [p.format(i) for p in patterns for i in range(2)]
    assert {n.split("/")[1] for n in leaves} == set(paths)
    spans = None if method.prefix is None else spans_of(name, batch)
    expected = hooked(zoo_model(name), paths, leaves, spans, method)(**batch).logits
    actual = model(**batch).logits
    if actual.shape[:2] == batch.get("attention_mask", torch.zeros(0)).shape:
        real = batch["attention_mask"].bool()
        actual, expected = actual[real], expected[real]
    agree(adapter, actual, expected, leaves, tolerance=2e-5)


def test_in_training_the_prompt_ends_where_the_labels_begin() -> None:
    method = METHODS[0]
    batch = ZOO["llama"].batch(3, 3, True, "left")
    starts = []
    for row, mask in enumerate(batch["attention_mask"]):
        first = int(mask.nonzero()[0])
        answer = first + (0, 3, 2)[row]  # the first row is all answer: the whole of it counts
        batch["labels"][row, :answer] = -100
        starts.append((first, answer if row else len(mask)))
    model = ZOO["llama"].build()
    adapter = shake(inlay.attach(model, method), 0.1)
    leaves = numbers(adapter)
    paths = [f"model.layers.{i}" for i in range(2)]
    bare = hooked(ZOO["llama"].build(), paths, leaves, starts, method)
    real = batch["attention_mask"].bool()
    agree(adapter, model(**batch).logits[real], bare(**batch).logits[real], leaves)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bart"])
def test_generation_edits_the_prompt_only(name: str) -> None:
    """Greedy, by hand: all tokens again at every step, edits where the prompt is."""
    method = METHODS[0]
    batch = ZOO[name].prompts(3, 2, ragged=True)
    model: Any = zoo_model(name)
    adapter = shake(inlay.attach(model, method), 0.3)
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    actual = model.generate(**batch, **settings)
    assert actual.tolist() == model.generate(**batch, **settings, use_cache=False).tolist()
    paths = [BLOCKS[name][0].format(i) for i in range(2)]
    bare = hooked(zoo_model(name), paths, numbers(adapter), spans_of(name, batch), method)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    if ZOO[name].kind == "seq2seq":
        decoded = torch.full((3, 1), bare.config.decoder_start_token_id)
        for _ in range(5):
            logits = bare(**batch, decoder_input_ids=decoded).logits[:, -1]
            decoded = torch.cat([decoded, logits.argmax(-1, keepdim=True)], 1)
        assert actual.tolist() == decoded.tolist()
        return
    for _ in range(5):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = bare(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    assert actual.tolist() == ids.tolist()


def test_initialisation() -> None:
    model = ZOO["llama"].build()
    torch.manual_seed(0)
    adapter = inlay.attach(model, inlay.LoReFT(rank=4, prefix=1, suffix=1))
    for name, value in adapter.tensors().items():
        if name.endswith("free"):
            close(value.t() @ value, torch.eye(4), 1e-6)
            close(orthonormal(value), value.t(), 1e-6)
        else:
            assert float(value.abs().max()) <= 1 / math.sqrt(32)
            assert float(value.abs().max()) > 0.5 / math.sqrt(32)


def test_stays_orthonormal_and_comes_back_bit_for_bit(tmp_path: Any) -> None:
    model, batch = ZOO["llama"].build(), ZOO["llama"].batch(2, 0)
    adapter = inlay.attach(model, inlay.LoReFT(rank=4))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    with torch.no_grad():
        expected = model(**batch).logits
    assert torch.isfinite(expected).all()
    inlay.save(model, "default", tmp_path)
    again = ZOO["llama"].build()
    inlay.load(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, expected)


@pytest.mark.parametrize(("hidden", "layers", "count"), [(4096, 32, 2_097_408), (5120, 40, 3_277_120)])
def test_counts(hidden: int, layers: int, count: int) -> None:
    """0.031% of LLaMA 7B and 0.025% of LLaMA 13B: the paper's commonsense runs, rank 8, one edit a layer."""
    config = transformers.LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 128, num_key_value_heads=None,
        intermediate_size={4096: 11008, 5120: 13824}[hidden], vocab_size=32000,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    total = sum(p.numel() for p in model.parameters())
    adapter = inlay.attach(model, inlay.LoReFT(rank=8))
    assert adapter.count == count
    assert f"{adapter.count / total:.3%}" == {4096: "0.031%", 5120: "0.025%"}[hidden]


def test_layers_and_refusals() -> None:
    adapter = inlay.attach(ZOO["llama"].build(), inlay.LoReFT(rank=2), layers=[1])
    assert {n.split("/")[1] for n in adapter.tensors()} == {"model.layers.1"}
    with pytest.raises(ConfigError, match="both"):
        inlay.LoReFT(prefix=None)
    with pytest.raises(ConfigError, match="leave no position"):
        inlay.LoReFT(prefix=0, suffix=0)
    with pytest.raises(ConfigError, match="untied"):
        inlay.LoReFT(prefix=3, suffix=0, tied=False)
    with pytest.raises(SelectionError, match="rank"):
        inlay.attach(ZOO["llama"].build(), inlay.LoReFT(rank=64))
