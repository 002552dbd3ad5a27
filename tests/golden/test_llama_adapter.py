"""LLaMA-Adapter against attention written out by hand from equations 4-7, and against PEFT's adaption prompts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

import inlay
from inlay import LLaMAAdapter
from inlay.core.errors import ConfigError, SelectionError, UnsupportedError
from inlay.testing.models import ZOO
from tests.golden.hand import agree, close, inputs, numbers, shake, zoo_model

LENGTH = 3
WIDTH = 32

ATTENTION = {
    "llama": ["model.layers.{}.self_attn"],
    "llama-classifier": ["model.layers.{}.self_attn"],  # with biases
    "qwen3": ["model.layers.{}.self_attn"],  # with a norm on the keys
    "gemma2": ["model.layers.{}.self_attn"],  # with capped scores
    "gemma3": ["model.layers.{}.self_attn"],
    "gpt2": ["transformer.h.{}.attn"],
    "gpt-neox": ["gpt_neox.layers.{}.attention"],
    "phi3": ["model.layers.{}.self_attn"],
    "opt": ["model.decoder.layers.{}.self_attn"],
    "bert": ["bert.encoder.layer.{}.attention.self"],
    "distilbert": ["distilbert.transformer.layer.{}.attention"],
    "t5": ["encoder.block.{}.layer.0.SelfAttention", "decoder.block.{}.layer.0.SelfAttention"],
    "bart": ["model.encoder.layers.{}.self_attn", "model.decoder.layers.{}.self_attn"],
}


def projected(module: Any, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the prompts, (length, width each), from the bare module's own matrices."""
    if hasattr(module, "c_attn"):
        return module.c_attn(prompts).split(WIDTH, -1)[1:]  # type: ignore[no-any-return]
    if hasattr(module, "qkv_proj"):
        return module.qkv_proj(prompts).split([WIDTH, WIDTH // 2, WIDTH // 2], -1)[1:]  # type: ignore[no-any-return]
    if hasattr(module, "query_key_value"):
        heads = module.query_key_value(prompts).view(LENGTH, 4, 3, 8)
        return heads[:, :, 1].flatten(1), heads[:, :, 2].flatten(1)
    for names in (("k_proj", "v_proj"), ("key", "value"), ("k_lin", "v_lin"), ("k", "v")):
        if hasattr(module, names[0]):
            return getattr(module, names[0])(prompts), getattr(module, names[1])(prompts)
    raise AssertionError(f"no projections in {type(module).__name__}")


def zero_init(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Two softmaxes, one over the text and one over the prompts."""
    scale = kwargs["scaling"] if kwargs.get("scaling") is not None else query.shape[-1] ** -0.5
    cap = kwargs.get("softcap")
    groups = query.shape[1] // key.shape[1]

    def scores(keys: Tensor) -> Tensor:
        raw = query @ keys.repeat_interleave(groups, dim=1).mT * scale
        return raw if cap is None else cap * (raw / cap).tanh()

    text = scores(key)
    for added in (mask, kwargs.get("position_bias")):
        text = text if added is None else text + added
    out = text.softmax(-1) @ value.repeat_interleave(groups, dim=1)
    own = module.__dict__.get("hand_made_prompts")
    if own is not None:
        prompts, gates = own
        k, v = projected(module, prompts)
        if hasattr(module, "k_norm") and module.k_norm.weight.numel() == k.shape[-1]:  # type: ignore[union-attr,operator]
            k = module.k_norm(k)  # type: ignore[operator]
        k, v = (t.view(1, LENGTH, -1, key.shape[-1]).transpose(1, 2) for t in (k, v))
        if hasattr(module, "k_norm") and module.k_norm.weight.numel() == k.shape[-1]:  # type: ignore[union-attr,operator]
            k = module.k_norm(k)  # type: ignore[operator]
        out = out + gates[None, :, None, None] * (scores(k).softmax(-1) @ v.repeat_interleave(groups, dim=1))
    return out.transpose(1, 2), None


AttentionInterface.register("zero_init", zero_init)
AttentionMaskInterface.register("zero_init", AttentionMaskInterface()["eager"])


def attached(name: str, method: LLaMAAdapter) -> tuple[Any, inlay.Adapter]:
    torch.manual_seed(0)
    model = zoo_model(name)
    return model, shake(inlay.attach(model, method))


@pytest.mark.parametrize("gate", ["tanh", "raw"])
@pytest.mark.parametrize("name", ATTENTION)
def test_forward_and_gradients(name: str, gate: Any) -> None:
    batch = inputs(name, ragged=True)
    model, adapter = attached(name, LLaMAAdapter(length=LENGTH, depth=2, gate=gate))
    leaves = numbers(adapter)
    assert len(leaves) == 4 * len(ATTENTION[name])
    bare: Any = zoo_model(name)
    bare.set_attn_implementation("zero_init")
    for path in [p.format(layer) for p in ATTENTION[name] for layer in range(2)]:
        stored = path.replace(".", "_")
        gates = leaves[f"prompt/prompt/gates.{stored}"]
        prompts = leaves[f"prompt/prompt/prompts.{stored}"]
        bare.get_submodule(path).__dict__["hand_made_prompts"] = (prompts, gates.tanh() if gate == "tanh" else gates)
    expected, actual = bare(**batch).logits, model(**batch).logits
    if actual.shape[:2] == batch["input_ids"].shape:
        real = batch["attention_mask"].bool()
        actual, expected = actual[real], expected[real]
    agree(adapter, actual, expected, leaves)


def test_a_norm_over_all_heads() -> None:
    """OLMo 2 normalises keys before they are cut into heads."""
    config = transformers.Olmo2Config(
        vocab_size=17, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="eager", pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.Olmo2ForCausalLM(config).eval()
    bare = copy.deepcopy(model)
    adapter = shake(inlay.attach(model, LLaMAAdapter(length=LENGTH)))
    leaves = numbers(adapter)
    stored = "model_layers_0_self_attn"
    prompts, gates = leaves[f"prompt/prompt/prompts.{stored}"], leaves[f"prompt/prompt/gates.{stored}"]
    bare.set_attn_implementation("zero_init")
    bare.model.layers[0].self_attn.__dict__["hand_made_prompts"] = (prompts, gates.tanh())
    ids = torch.arange(8)[None]
    agree(adapter, model(input_ids=ids).logits, bare(input_ids=ids).logits, leaves)


@pytest.mark.parametrize("name", ATTENTION)
def test_a_fresh_adapter_changes_no_bit(name: str) -> None:
    batch, model = inputs(name, ragged=True), zoo_model(name)
    model.requires_grad_(False)  # as attaching does; attention kernels differ with the flag
    before = model(**batch).logits
    adapter = inlay.attach(model, LLaMAAdapter())
    assert torch.equal(model(**batch).logits, before)
    fresh = adapter.tensors()
    assert all(bool((t == 0).all()) for n, t in fresh.items() if "/gates." in n)
    drawn = torch.cat([t.flatten() for n, t in fresh.items() if "/prompts." in n])
    assert abs(float(drawn.mean())) < 0.2 and abs(float(drawn.std()) - 1) < 0.2


def test_the_papers_count() -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig())  # 7B
    adapter = inlay.attach(model, LLaMAAdapter())
    assert adapter.count == 30 * 10 * 4096 + 30 * 32 == 1_229_760
    layers = {n.split("layers_")[1].split("_")[0] for n in adapter.tensors()}
    assert layers == {str(i) for i in range(2, 32)}


def test_layers_or_depth() -> None:
    adapter = inlay.attach(ZOO["llama"].build(), LLaMAAdapter(), layers=[0])
    assert {n.rpartition(".")[2] for n in adapter.tensors()} == {"model_layers_0_self_attn"}
    with pytest.raises(SelectionError, match="depth"):
        inlay.attach(ZOO["llama"].build(), LLaMAAdapter(depth=1), layers=[0])
    with pytest.raises(SelectionError, match="7"):
        inlay.attach(ZOO["llama"].build(), LLaMAAdapter(), layers=[7])
    for wrong in ({"length": 0}, {"depth": 0}, {"gate": "sigmoid"}):
        with pytest.raises(ConfigError):
            LLaMAAdapter(**wrong)  # type: ignore[arg-type]


def test_what_is_done_to_keys_is_known_or_refused() -> None:
    model = ZOO["qwen3"].build()
    layer = model.model.layers[1].self_attn  # type: ignore[union-attr,index]
    layer.k_norm_too = nn.LayerNorm(12)  # type: ignore[union-attr,assignment]
    with pytest.raises(UnsupportedError, match="k_norm_too"):
        inlay.attach(model, LLaMAAdapter())


def test_attention_dropout_reaches_the_prompts() -> None:
    """When every share is dropped, prompts and text alike add nothing."""
    batch = inputs("llama")
    model, _ = attached("llama", LLaMAAdapter(length=LENGTH, depth=2))
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 1.0
    model.set_attn_implementation("inlay_eager")
    model.train()
    with inlay.use(model, None):
        nothing = model(**batch).logits
    assert torch.equal(model(**batch).logits, nothing)
    model.eval()
    assert not torch.equal(model(**batch).logits, nothing)


@pytest.mark.parametrize("depth", [1, 2])
def test_peft(depth: int) -> None:
    """PEFT's layers have one gate for all heads, and no tanh."""
    import peft

    model, adapter = attached("llama", LLaMAAdapter(length=LENGTH, depth=depth, gate="raw"))
    config = peft.AdaptionPromptConfig(adapter_len=LENGTH, adapter_layers=depth, task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(ZOO["llama"].build(), config).eval()
    stored = {n[n.index("layers.") :]: p for n, p in theirs.named_parameters() if "adaption_" in n}
    with torch.no_grad():
        for name, tensor in adapter.tensors().items():
            layer = name.split("layers_")[1].split("_")[0]
            base = f"layers.{layer}.self_attn.adaption_"
            if "/gates." in name:
                tensor.fill_(0.3 + int(layer))
                stored[base + "gate"].copy_(tensor[:1])
            else:
                stored[base + "prompt"].copy_(tensor[None])
    batch = inputs("llama", ragged=True)
    real = batch["attention_mask"].bool()
    close(model(**batch).logits[real], theirs(**batch).logits[real])
