"""UniPELT against its figure: attention written out by hand, hooks for the adapter, changed projections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inlay
from inlay import Parallel, PrefixTuning, UniPELT
from inlay.core.errors import ConfigError, SelectionError
from inlay.testing.models import ZOO
from tests.golden.hand import agree, close, inputs, numbers, shake, zoo_model
from tests.golden.places import PLACES

LENGTH, RANK = 3, 2
METHOD = UniPELT(reduction=8, length=LENGTH, projection=None, rank=RANK)
# Attention modules, feed-forward outputs, key heads, stack.
MODELS = {
    "llama": ("model.layers.{}.self_attn", "model.layers.{}.mlp.down_proj", 2, "model_layers"),
    "bert": ("bert.encoder.layer.{}.attention.self", "bert.encoder.layer.{}.output.dropout", 4, "bert_encoder_layer"),
}


def gate(leaves: dict[str, Tensor], site: str, h: Tensor) -> Tensor:
    return torch.sigmoid(h @ leaves[f"delta/{site}/gate"].t() + leaves[f"delta/{site}/gate_bias"])


def hooked(bare: nn.Module, name: str, leaves: dict[str, Tensor], layer: int) -> None:
    """LoRA at query and value, the adapter behind the feed-forward."""
    for role in ("query", "value"):
        path = PLACES[name][role][0].format(layer)

        def low_rank(_: Any, args: Any, y: Tensor, path: str = path) -> Tensor:
            a, b = (leaves[f"delta/{path}/inner.{n}"] for n in "ab")
            return y + gate(leaves, path, args[0]) * (args[0] @ a.t() @ b.t())

        bare.get_submodule(path).register_forward_hook(low_rank)
    path = MODELS[name][1].format(layer)

    def adapter(_: Any, __: Any, y: Tensor) -> Tensor:
        down, down_bias, up, up_bias = (
            leaves[f"delta/{path}/inner.{n}"] for n in ("down", "down_bias", "up", "up_bias")
        )
        return y + gate(leaves, path, y) * (F.relu(y @ down.t() + down_bias) @ up.t() + up_bias)

    bare.get_submodule(path).register_forward_hook(adapter)


def by_token(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, pair: tuple[Tensor, Tensor], shares: Tensor
) -> Tensor:
    """Attention, a token at a time, over pairs that are multiplied by the token's gate beforehand."""
    rows, heads, tokens, size = query.shape
    repeat = heads // key.shape[1]
    out = torch.zeros(rows, tokens, heads, size)
    for t in range(tokens):
        scaled = shares[:, t].reshape(rows, 1, 1, 1)
        keys = torch.cat([scaled * pair[0], key], 2).repeat_interleave(repeat, 1)
        values = torch.cat([scaled * pair[1], value], 2).repeat_interleave(repeat, 1)
        scores = (query[:, :, t : t + 1] @ keys.transpose(2, 3)) / size**0.5
        scores = scores + F.pad(bias[:, :, t : t + 1], (LENGTH, 0))
        out[:, t] = (scores.softmax(-1) @ values)[:, :, 0]
    return out


def bare_with(name: str, leaves: dict[str, Tensor], mask: Tensor) -> Any:
    """The bare base whose attention function, and nothing else of it, is replaced."""
    from transformers import AttentionInterface, AttentionMaskInterface

    bare: Any = zoo_model(name)
    attention, _, key_heads, stack = MODELS[name]
    table = leaves[f"prompt/prompt/prefix.parts.{stack}.table"].reshape(LENGTH, 2, 2, key_heads, 8)
    entered: dict[int, Tensor] = {}
    number = {}
    for layer in range(2):
        hooked(bare, name, leaves, layer)
        module = bare.get_submodule(attention.format(layer))
        number[module] = layer

        def remember(_: Any, args: Any, kwargs: Any, layer: int = layer) -> None:
            entered[layer] = args[0] if args else kwargs["hidden_states"]

        module.register_forward_pre_hook(remember, with_kwargs=True)
    allowed = mask[:, None, None, :].bool()
    if ZOO[name].task == "causal":
        allowed = allowed & torch.ones(mask.shape[1], mask.shape[1]).tril().bool()
    lowest = torch.zeros(allowed.shape).masked_fill(~allowed, -1e9)
    lowest = lowest.expand(-1, -1, mask.shape[1], -1)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, **__: Any) -> tuple[Tensor, None]:
        layer = number[module]
        weight, bias = leaves["prompt/prompt/gate"][layer], leaves["prompt/prompt/gate_bias"][layer]
        shares = torch.sigmoid(entered[layer] @ weight + bias)  # (rows, tokens)
        pair = (table[:, layer, 0].transpose(0, 1), table[:, layer, 1].transpose(0, 1))
        return by_token(query, key, value, lowest, pair, shares), None

    AttentionInterface.register("by_token", attend)
    AttentionMaskInterface.register("by_token", AttentionMaskInterface._global_mapping["sdpa"])
    bare.config._attn_implementation = "by_token"
    return bare


@pytest.mark.parametrize("name", MODELS)
def test_output_and_gradients(name: str) -> None:
    batch = inputs(name, ragged=True)
    model = zoo_model(name)
    adapter = shake(inlay.attach(model, METHOD))
    leaves = numbers(adapter)
    bare = bare_with(name, leaves, batch["attention_mask"])
    given = dict(batch)
    if name == "llama":  # the text's positions stand behind the prefix
        tokens = batch["input_ids"].shape[1]
        given["position_ids"] = torch.arange(LENGTH, LENGTH + tokens).expand(len(batch["input_ids"]), -1)
    actual, expected = model(**batch).logits, bare(**given).logits
    if name == "llama":
        real = batch["attention_mask"].bool()
        actual, expected = actual[real], expected[real]
    agree(adapter, actual, expected, leaves, tolerance=2e-5)


def test_what_it_starts_as() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=2, vocab_size=99))
    tensors = inlay.attach(model, UniPELT()).tensors()
    limit = 768**-0.5
    lora, adapter = "delta/encoder.layer.1.attention.self.query/", "delta/encoder.layer.1.output.dropout/"
    for weight in (tensors[lora + "gate"], tensors["prompt/prompt/gate"]):
        assert limit * 0.95 < float(weight.abs().max()) <= limit
    for bias in (tensors[lora + "gate_bias"], tensors["prompt/prompt/gate_bias"]):
        assert bias.any() and float(bias.abs().max()) <= limit
    assert 0.018 < float(tensors[adapter + "gate"].std()) < 0.022 and not tensors[adapter + "gate_bias"].any()
    assert not tensors[lora + "inner.b"].any() and tensors[lora + "inner.a"].any()


def test_count() -> None:
    """BERT-base: the three parts as alone, and a gate of 769 for each of 4 places a layer."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig())
    count = inlay.attach(model, UniPELT(projection=None)).count
    adapter, lora, prefix = 2 * 768 * 48 + 48 + 768, 2 * 2 * 8 * 768, 2 * 10 * 768
    assert count == 12 * (adapter + lora + prefix + 4 * 769)


def test_open_gates_leave_a_plain_prefix_beside_the_others() -> None:
    """A gate far in saturation is one: the prefix then is the one of prefix tuning."""
    batch = inputs("llama", ragged=True)
    model, other = ZOO["llama"].build(), ZOO["llama"].build()
    adapter = inlay.attach(model, METHOD)
    prefix = shake(inlay.attach(other, PrefixTuning(length=LENGTH, projection=None)))
    with torch.no_grad():
        for name, tensor in adapter.tensors().items():
            if name.endswith(("inner.b", "inner.up", "inner.up_bias", "/gate")):
                tensor.zero_()
            elif name.endswith("gate_bias"):
                tensor.fill_(40.0)
            elif name.endswith("table"):
                tensor.copy_(prefix.tensors()["prompt/prompt/parts.model_layers.table"])
    close(model(**batch).logits, other(**batch).logits)


def test_a_weighed_prefix_and_a_plain_one() -> None:
    """Behind one another in one adapter: open gates make the two one prefix."""
    batch = inputs("llama", ragged=True)
    model, other = ZOO["llama"].build(), ZOO["llama"].build()
    adapter = shake(inlay.attach(model, Parallel(METHOD, PrefixTuning(length=2, projection=None))))
    long = inlay.attach(other, PrefixTuning(length=LENGTH + 2, projection=None))
    tensors = adapter.tensors()
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name.endswith(("inner.b", "inner.up", "inner.up_bias", "/gate")):
                tensor.zero_()
            elif name.endswith("gate_bias"):
                tensor.fill_(40.0)
        tables = [t for n, t in tensors.items() if n.endswith("table")]
        long.tensors()["prompt/prompt/parts.model_layers.table"].copy_(torch.cat(tables))
    close(model(**batch).logits, other(**batch).logits)


def test_some_layers_only(tmp_path: Path) -> None:
    batch = inputs("llama")
    model = ZOO["llama"].build()
    adapter = shake(inlay.attach(model, METHOD, layers=[1]))
    assert tuple(adapter.tensors()["prompt/prompt/gate"].shape) == (1, 32)
    assert all("layers.1." in p.key for p in adapter.pieces if p.key != "prompt")
    model(**batch).logits.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    inlay.save(model, "default", tmp_path)
    fresh = ZOO["llama"].build()
    inlay.load(fresh, tmp_path)
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)


def test_refusals_say_what_to_do() -> None:
    with pytest.raises(SelectionError, match="layers"):
        inlay.attach(ZOO["llama"].build(), METHOD, where=["q_proj"])
    with pytest.raises(ConfigError, match="rank"):
        UniPELT(rank=0)
    with pytest.raises(ConfigError, match="length"):
        UniPELT(length=0)
