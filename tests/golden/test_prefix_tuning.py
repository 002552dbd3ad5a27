"""Prefix tuning against the bare base: a cache that is filled beforehand, or attention written out by hand.

The hand-made attention registers a function that concatenates keys and values and takes one softmax.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

import inlay
from inlay.core.errors import ConfigError
from inlay.testing.models import ZOO
from tests import tiny
from tests.golden.hand import agree, close, inputs, numbers, shake, zoo_model

LENGTH = 4
LAYERS = 2
# Stack → (key heads, head size) of the zoo's decoders.
DECODERS = {
    "llama": ("model_layers", 2, 8),
    "qwen3": ("model_layers", 2, 12),
    "gpt2": ("transformer_h", 4, 8),
    "gpt-neox": ("gpt_neox_layers", 4, 8),
    "opt": ("model_decoder_layers", 4, 8),
    "mixtral": ("model_layers", 2, 8),
    "phi3": ("model_layers", 2, 8),
}


def attached(name: str, projection: int | None) -> tuple[Any, inlay.Adapter]:
    model = zoo_model(name)
    return model, shake(inlay.attach(model, inlay.PrefixTuning(length=LENGTH, projection=projection)))


def pairs(leaves: dict[str, Tensor], stack: str, key_heads: int, head_dim: int) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) of each layer, (key heads, length, head size), by the paper's two equations."""
    part = f"prompt/prompt/parts.{stack}."
    flat = leaves[part + "table"]
    if part + "inner.weight" in leaves:
        hidden = torch.tanh(flat @ leaves[part + "inner.weight"].t() + leaves[part + "inner.bias"])
        flat = hidden @ leaves[part + "outer.weight"].t() + leaves[part + "outer.bias"]
    each = flat.reshape(LENGTH, LAYERS, 2, key_heads, head_dim)
    return [(each[:, i, 0].transpose(0, 1), each[:, i, 1].transpose(0, 1)) for i in range(LAYERS)]


def filled_cache(prefix: list[tuple[Tensor, Tensor]], rows: int) -> DynamicCache:
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(prefix):
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
    return cache


@pytest.mark.parametrize("projection", [None, 6])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoder(name: str, side: str, projection: int | None) -> None:
    batch = inputs(name, ragged=True, side=side)
    model, adapter = attached(name, projection)
    leaves = numbers(adapter)
    bare: Any = zoo_model(name)
    rows, tokens = batch["input_ids"].shape
    positions = batch.get("position_ids", torch.arange(tokens).expand(rows, tokens))
    cache = filled_cache(pairs(leaves, *DECODERS[name]), rows)
    mask = torch.cat([torch.ones((rows, LENGTH), dtype=torch.long), batch["attention_mask"]], dim=1)
    expected = bare(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=positions + LENGTH,
        past_key_values=cache,
    ).logits
    real = batch["attention_mask"].bool()
    agree(adapter, model(**batch).logits[real], expected[real], leaves)


def test_some_layers_only() -> None:
    batch = inputs("llama")
    model = ZOO["llama"].build()
    adapter = shake(inlay.attach(model, inlay.PrefixTuning(length=LENGTH, projection=None), layers=[1]))
    leaves = numbers(adapter)
    flat = leaves["prompt/prompt/parts.model_layers.table"].reshape(LENGTH, 2, 2, 8)
    prefix = [None, (flat[:, 0].transpose(0, 1), flat[:, 1].transpose(0, 1))]
    bare: Any = ZOO["llama"].build()
    rows, tokens = batch["input_ids"].shape
    with by_hand(bare, {"model.layers.1.self_attn": prefix[1]}):
        expected = bare(**batch, position_ids=torch.arange(LENGTH, LENGTH + tokens).expand(rows, tokens)).logits
    agree(adapter, model(**batch).logits, expected, leaves)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox", "opt"])
def test_greedy_generation(name: str, beams: int) -> None:
    """Token by token through the filled cache; beams are checked against generation without a cache."""
    batch = ZOO[name].prompts(3, 2, ragged=True)
    model, adapter = attached(name, None)
    settings: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    actual = model.generate(**batch, **settings)
    assert actual.tolist() == model.generate(**batch, **settings, use_cache=False).tolist()
    if beams > 1:
        return
    bare: Any = zoo_model(name)
    rows = batch["input_ids"].shape[0]
    cache = filled_cache(pairs(numbers(adapter), *DECODERS[name]), rows)
    mask = torch.cat([torch.ones((rows, LENGTH), dtype=torch.long), batch["attention_mask"]], dim=1)
    ids, chosen = batch["input_ids"], []
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0) + LENGTH
    for _ in range(4):
        with torch.no_grad():
            out = bare(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        ids = out.logits[:, -1].argmax(-1, keepdim=True)
        chosen.append(ids)
        mask = torch.cat([mask, torch.ones((rows, 1), dtype=torch.long)], dim=1)
        positions = positions[:, -1:] + 1
    assert actual[:, batch["input_ids"].shape[1] :].tolist() == torch.cat(chosen, dim=1).tolist()


# -- models whose attention is written out by hand ---------------------------------------------------


def concatenated(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    prefix = module.__dict__.get("hand_made_prefix")
    scale = kwargs["scaling"] if kwargs.get("scaling") is not None else query.shape[-1] ** -0.5
    groups = query.shape[1] // key.shape[1]
    bias = torch.zeros(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if mask is not None:
        bias = bias + mask
    if kwargs.get("position_bias") is not None:
        bias = bias + kwargs["position_bias"]
    if prefix is not None:
        rows = key.shape[0]
        key = torch.cat([prefix[0].expand(rows, -1, -1, -1), key], dim=2)
        value = torch.cat([prefix[1].expand(rows, -1, -1, -1), value], dim=2)
        bias = torch.cat([torch.zeros(*bias.shape[:3], prefix[0].shape[1]), bias], dim=3)
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    shares = (query @ key.mT * scale + bias).softmax(-1)
    return (shares @ value).transpose(1, 2), None


AttentionInterface.register("hand_made", concatenated)
AttentionMaskInterface.register("hand_made", AttentionMaskInterface()["eager"])


@contextmanager
def by_hand(bare: Any, prefixes: dict[str, Any]) -> Iterator[None]:
    """The bare model under hand-made attention, with (keys, values) at some attention modules."""
    bare.set_attn_implementation("hand_made")
    for path, prefix in prefixes.items():
        bare.get_submodule(path).__dict__["hand_made_prefix"] = prefix
    yield


OTHERS = {
    "bert": {"bert_encoder_layer": "bert.encoder.layer.{}.attention.self"},
    "roberta": {"roberta_encoder_layer": "roberta.encoder.layer.{}.attention.self"},
    "distilbert": {"distilbert_transformer_layer": "distilbert.transformer.layer.{}.attention"},
    "vit": {"vit_layers": "vit.layers.{}.attention"},
    "t5": {
        "encoder_block": "encoder.block.{}.layer.0.SelfAttention",
        "decoder_block": "decoder.block.{}.layer.0.SelfAttention",
        "decoder_block_cross": "decoder.block.{}.layer.1.EncDecAttention",
    },
    "bart": {
        "model_encoder_layers": "model.encoder.layers.{}.self_attn",
        "model_decoder_layers": "model.decoder.layers.{}.self_attn",
        "model_decoder_layers_cross": "model.decoder.layers.{}.encoder_attn",
    },
}


@pytest.mark.parametrize("projection", [None, 6])
@pytest.mark.parametrize("name", OTHERS)
def test_encoder_or_encoder_decoder(name: str, projection: int | None) -> None:
    batch = inputs(name, ragged=name != "vit")
    model, adapter = attached(name, projection)
    leaves = numbers(adapter)
    bare: Any = zoo_model(name)
    prefixes = {}
    for stack, pattern in OTHERS[name].items():
        for layer, pair in enumerate(pairs(leaves, stack, 4, 8)):
            prefixes[pattern.format(layer)] = pair
    with by_hand(bare, prefixes):
        if name == "bart":
            _move_decoder_positions(bare)
        expected = bare(**batch).logits
    agree(adapter, model(**batch).logits, expected, leaves)


def _move_decoder_positions(bare: Any) -> None:
    """In a decoder the text's learned positions begin behind the prefix."""
    table = bare.model.decoder.embed_positions
    table.weight = nn.Parameter(table.weight.detach().roll(-LENGTH, dims=0), requires_grad=False)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_eager_and_sdpa_bases_agree(name: str) -> None:
    batch = inputs(name, ragged=True)
    outputs = []
    for implementation in ("eager", "sdpa"):
        model: Any = zoo_model(name)
        model.set_attn_implementation(implementation)
        torch.manual_seed(0)
        shake(inlay.attach(model, inlay.PrefixTuning(length=LENGTH, projection=None)))
        outputs.append(model(**batch).logits)
    close(outputs[0], outputs[1])


# -- initialisation from words -----------------------------------------------------------------------

TEXT = "the red bird sang"


def words_of(folder: Path, count: int) -> Tensor:
    """The text's tokens, from the start again behind its end, (1, count)."""
    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False)["input_ids"]
    return torch.tensor([(ids * count)[:count]])


@pytest.mark.parametrize("length", [3, 40])
@pytest.mark.parametrize("beside", [False, True])
def test_a_prefix_of_words_is_the_text_itself(tmp_path: Path, length: int, beside: bool) -> None:
    """Grouped key heads, rotary positions: a fresh prefix does what the words in front of the input do."""
    tiny.llama(tmp_path)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    if beside:
        shake(inlay.attach(model, inlay.LoRA(rank=2), name="other"))
        shake(inlay.attach(model, inlay.PrefixTuning(length=2, projection=None), name="third"))
        model.train()
    implementation = model.config._attn_implementation
    inlay.attach(model, inlay.PrefixTuning(length=length, projection=None, init="text", text=TEXT), name="one")
    assert model.training == beside
    assert model.config._attn_implementation.removeprefix("inlay_") == implementation.removeprefix("inlay_")
    bare: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[5, 9, 30, 22, 41], [6, 7, 8, 9, 10]])
    whole = torch.cat([words_of(tmp_path, length).expand(2, -1), ids], dim=1)
    with torch.no_grad():
        close(model.eval()(input_ids=ids).logits, bare.eval()(input_ids=whole).logits[:, length:])


def test_words_in_an_encoder_decoder(tmp_path: Path) -> None:
    """Each attention's keys and values are its projections of the words' states there."""
    tiny.t5(tmp_path)
    model: Any = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    ids = words_of(tmp_path, LENGTH)
    seen: dict[str, Tensor] = {}
    paths = [p for patterns in (OTHERS["t5"],) for pattern in patterns.values() for p in map(pattern.format, (0, 1))]
    hooks = [
        model.get_submodule(f"{path}.{kind}").register_forward_hook(
            lambda m, a, out, key=f"{path}.{kind}": seen.__setitem__(key, out[0])
        )
        for path in paths
        for kind in "kv"
    ]
    with torch.no_grad():
        model(input_ids=ids, decoder_input_ids=ids)
    for hook in hooks:
        hook.remove()
    adapter = inlay.attach(model, inlay.PrefixTuning(length=LENGTH, projection=None, init="text", text=TEXT))
    for stack, pattern in OTHERS["t5"].items():
        for layer, pair in enumerate(pairs(dict(adapter.tensors()), stack, 4, 4)):
            for kind, value in zip("kv", pair, strict=True):
                expected = seen[f"{pattern.format(layer)}.{kind}"].view(LENGTH, 4, 4).transpose(0, 1)
                close(value, expected, 1e-6)


def test_words_need_a_prefix_of_their_own() -> None:
    with pytest.raises(ConfigError, match="projection=None"):
        inlay.PrefixTuning(init="text", text=TEXT, projection=8)
    with pytest.raises(ConfigError, match="go together"):
        inlay.PrefixTuning(init="text", projection=None)
    with pytest.raises(ConfigError, match="tokenizer"):
        inlay.attach(ZOO["llama"].build(), inlay.PrefixTuning(init="text", text=TEXT, projection=None))
