"""P-tuning's encoder against PyTorch's own LSTM and linear layers, and the prompt against prompt tuning's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import inlay
from inlay.core.errors import ConfigError
from inlay.testing.models import ZOO
from tests import tiny
from tests.golden.hand import agree, close, inputs, numbers, shake, zoo_model

P = "prompt/prompt/"
LSTM = [
    f"{kind}_l{layer}{way}"
    for layer in (0, 1)
    for way in ("", "_reverse")
    for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
]


def encoded(leaves: dict[str, Tensor], encoder: str) -> Tensor:
    """The virtual tokens, (length, hidden), from the stored numbers."""
    vectors = leaves[P + "vectors"]
    linear = nn.functional.linear
    if encoder == "none":
        return vectors
    if encoder == "mlp":
        for i in (0, 2, 4):
            vectors = linear(vectors, leaves[f"{P}encoder.{i}.weight"], leaves[f"{P}encoder.{i}.bias"])
            vectors = vectors.relu() if i < 4 else vectors
        return vectors
    weights = {name: leaves[f"{P}encoder.lstm.{i}"] for i, name in enumerate(LSTM)}
    inner = weights["weight_hh_l0"].shape[1]
    lstm = nn.LSTM(vectors.shape[1], inner, num_layers=2, bidirectional=True, batch_first=True)
    states = torch.func.functional_call(lstm, weights, (vectors[None],))[0][0]
    first = linear(states, leaves[P + "encoder.head.0.weight"], leaves[P + "encoder.head.0.bias"]).relu()
    return linear(first, leaves[P + "encoder.head.2.weight"], leaves[P + "encoder.head.2.bias"])


def before(name: str, virtual: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The bare model's logits with embeddings in front of the text, unpadded rows."""
    model: Any = zoo_model(name)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    whole = torch.cat([virtual.expand(embeds.shape[0], -1, -1), embeds], dim=1)
    rest = {k: v for k, v in batch.items() if k == "decoder_input_ids"}
    logits: Tensor = model(inputs_embeds=whole, **rest).logits
    return logits if rest else logits[:, virtual.shape[0] :]


@pytest.mark.parametrize("projection", [None, 6])
@pytest.mark.parametrize("encoder", ["lstm", "mlp", "none"])
@pytest.mark.parametrize("name", ["llama", "gpt-neox", "t5"])
def test_equals_the_encoder_by_hand(name: str, encoder: Any, projection: int | None) -> None:
    if encoder == "none" and projection:
        return
    batch, model = inputs(name), zoo_model(name)
    torch.manual_seed(0)
    method = inlay.PTuning(length=4, encoder=encoder, projection=projection)
    adapter = shake(inlay.attach(model, method), 0.1)
    leaves = numbers(adapter)
    expected = before(name, encoded(leaves, encoder), batch)
    agree(adapter, model(**batch).logits, expected, leaves, tolerance=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt-neox"])
def test_anchors_stand_between_virtual_tokens(name: str) -> None:
    batch, model = inputs(name), zoo_model(name)
    adapter = shake(inlay.attach(model, inlay.PTuning(length=3, template=((8,), 2, (5, 9), 1))), 0.1)
    table = zoo_model(name).get_input_embeddings().weight.detach()  # type: ignore[operator]
    leaves = numbers(adapter)
    del leaves[P + "anchors"]
    made = encoded(leaves, "lstm")
    virtual = torch.cat([table[[8]], made[:2], table[[5, 9]], made[2:]])
    actual, expected = model(**batch).logits, before(name, virtual, batch)
    close(actual, expected, 2e-5)
    actual.square().sum().backward()
    expected.square().sum().backward()
    stored = {v.data_ptr(): k for k, v in adapter.tensors().items()}
    for parameter in adapter.parameters():
        assert parameter.grad is not None
        close(parameter.grad, leaves[stored[parameter.data_ptr()]].grad, 2e-4)  # type: ignore[arg-type]
    assert len(list(adapter.parameters())) == len(leaves), "anchors are frozen"


def test_anchors_are_scaled_as_the_base_scales_words() -> None:
    model: Any = ZOO["bart"].build()
    adapter = inlay.attach(model, inlay.PTuning(length=2, template=(1, (5, 9), 1)))
    assert torch.equal(adapter.tensors()[P + "anchors"], model.get_input_embeddings()(torch.tensor([5, 9])))


@pytest.mark.parametrize("method", [inlay.PTuning(length=1, template=((5, 9), 1)), inlay.PromptTuning(length=2)])
def test_embeddings_come_from_the_base_and_not_from_the_active_adapter(method: Any) -> None:
    model: Any = ZOO["llama"].build()
    table = model.get_input_embeddings().weight.detach().clone()
    shake(inlay.attach(model, inlay.TrainableTokens(tokens=tuple(range(97))), name="tokens"))
    adapter = inlay.attach(model, method, name="prompt")
    found = next(t for t in adapter.tensors().values() if t.shape == (2, 32))
    assert all(bool((row == table).all(1).any()) for row in found)


def test_words_as_anchors(tmp_path: Path) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tiny.llama(tmp_path))
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("the cat", add_special_tokens=False)["input_ids"]
    adapter = inlay.attach(model, inlay.PTuning(length=4, template=(3, "the cat", 1)))
    assert torch.equal(adapter.tensors()[P + "anchors"], model.get_input_embeddings().weight[ids])
    inlay.save(model, "default", tmp_path / "out")
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = inlay.load(again, tmp_path / "out", trainable=True)
    assert loaded.digest == adapter.digest
    assert {id(p) for p in loaded.parameters() if p.requires_grad} == {id(p) for p in loaded.parameters()}
    assert loaded.count == adapter.count == sum(t.numel() for n, t in adapter.tensors().items() if "anchors" not in n)


def test_count() -> None:
    """14 d² + 18 d + n d: 8,271,360 + 768 n for d = 768."""
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config())
    assert inlay.attach(model, inlay.PTuning(length=9)).count == 8_271_360 + 768 * 9


def test_peft_mlp_count_and_values() -> None:
    """PEFT 0.21's default encoder, with the same numbers, gives the same virtual tokens."""
    import peft

    model: Any = ZOO["llama"].build()
    adapter = shake(inlay.attach(model, inlay.PTuning(length=4, encoder="mlp", projection=6)), 0.1)
    config = peft.PromptEncoderConfig(
        num_virtual_tokens=4, token_dim=32, encoder_hidden_size=6, num_transformer_submodules=1, num_layers=2
    )
    theirs = peft.PromptEncoder(config)
    assert sum(p.numel() for p in theirs.parameters()) == adapter.count
    values = {n.removeprefix(P).removeprefix("encoder."): t for n, t in adapter.tensors().items()}
    theirs.load_state_dict(
        {f"mlp_head.{n}": t for n, t in values.items() if n != "vectors"} | {"embedding.weight": values["vectors"]}
    )
    close(encoded(dict(adapter.tensors()), "mlp"), theirs(torch.arange(4)))


def test_initialisation() -> None:
    torch.manual_seed(0)
    adapter = inlay.attach(ZOO["llama"].build(), inlay.PTuning(length=50))
    tensors = adapter.tensors()
    assert 0.9 < float(tensors[P + "vectors"].std()) < 1.1
    for name, value in tensors.items():
        if "lstm" in name:
            assert 0.2 < float(value.abs().max()) <= 0.25, name  # uniform within 1 / √inner, inner = 16
        assert torch.isfinite(value).all()


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="template has 4"):
        inlay.PTuning(length=3, template=(4,))
    with pytest.raises(ConfigError, match="encoder"):
        inlay.PTuning(encoder="gru")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="layers"):
        inlay.attach(ZOO["llama"].build(), inlay.PTuning(), layers=[0])
    with pytest.raises(ConfigError, match="tokenizer"):
        inlay.attach(ZOO["llama"].build(), inlay.PTuning(length=2, template=(1, "of", 1)))
