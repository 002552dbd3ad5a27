"""Ladder side tuning against a side network written out by hand on the bare model's hooks, and what it saves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import inlay
from inlay import LadderSideTuning, Stack
from inlay.core.adapted_modules import hosts_of
from inlay.core.errors import ConfigError, SelectionError, UnsupportedError
from inlay.testing.check import check_law
from inlay.testing.laws import LAWS
from inlay.testing.models import ZOO
from inlay.testing.specimen import randomise
from tests.golden.hand import agree, close, inputs, numbers, shake, zoo_model

# Blocks of the stack, and the norm behind it or None.
STACKS: dict[str, tuple[str, str | None]] = {
    "llama": ("model.layers", "model.norm"),
    "mixtral": ("model.layers", "model.norm"),
    "gpt2": ("transformer.h", "transformer.ln_f"),
    "gpt-neox": ("gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "opt": ("model.decoder.layers", "model.decoder.final_layer_norm"),
    "bloom": ("transformer.h", "transformer.ln_f"),
    "t5": ("decoder.block", "decoder.final_layer_norm"),
    "vit": ("vit.layers", "vit.layernorm"),
    "bart": ("model.decoder.layers", None),
    "bert": ("bert.encoder.layer", None),
    "distilbert": ("distilbert.transformer.layer", None),
    "deberta-v2": ("deberta.encoder.layer", None),
}


def attached(name: str, method: LadderSideTuning, layers: list[int] | None = None) -> tuple[Any, inlay.Adapter]:
    torch.manual_seed(0)
    model = zoo_model(name)
    return model, shake(inlay.attach(model, method, layers=layers))


def of_block(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[no-any-return]


HEADS = 4
ENCODERS = ("bert", "distilbert", "vit")  # whose side blocks attend


def attention(s: Tensor, n: dict[str, Tensor], i: int, mask: Tensor | None) -> Tensor:
    """Softmax attention of every token to the row's real ones, head by head."""
    size, out = s.shape[-1] // HEADS, []
    for head in range(HEADS):
        own = slice(head * size, (head + 1) * size)
        q, k, v = (s @ n[name][i][own].T for name in ("query", "key", "value"))
        scores = q @ k.mT / size**0.5
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, :] == 0, float("-inf"))
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        out.append(weights @ v)
    return torch.cat(out, -1) @ n["out"][i].T


def side_network(
    states: list[Tensor], base: Tensor, n: dict[str, Tensor], method: LadderSideTuning, mask: Tensor | None
) -> Tensor:
    """Section 3.2: `states` are the first block's input and the outputs of the blocks with a rung."""
    activation = {"relu": torch.relu, "gelu": nn.functional.gelu}[method.nonlinearity]

    def norm(s: Tensor, weight: Tensor) -> Tensor:
        return s / (s.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    mu = 1 / (1 + (-n["gates"] / method.temperature).exp())
    s = states[0] @ n["down"][0].T + n["down_bias"][0]
    for i, h in enumerate(states[1:]):
        s = mu[i] * s + (1 - mu[i]) * (h @ n["down"][i + 1].T + n["down_bias"][i + 1])
        if "query" in n:
            s = s + attention(norm(s, n["attention_norms"][i]), n, i, mask)
        s = s + activation(norm(s, n["norms"][i]) @ n["inner"][i].T) @ n["outer"][i].T
    out = norm(s, n["norms"][len(states) - 1]) @ n["up"].T + n["up_bias"]
    return out if method.output == "side" else mu[-1] * out + (1 - mu[-1]) * base


def by_hand(
    name: str, leaves: dict[str, Tensor], method: LadderSideTuning, layers: list[int], mask: Tensor | None = None
) -> Any:
    """The bare model, its last hidden state exchanged for the side network's."""
    bare: Any = zoo_model(name)
    bare.requires_grad_(False)
    stack, norm = STACKS[name]
    blocks = bare.get_submodule(stack)
    own = {key.rpartition("/")[2]: value for key, value in leaves.items()}
    seen: dict[int, Tensor] = {}

    def entering(_: nn.Module, args: Any, kwargs: Any) -> None:
        seen[-1] = args[0] if args else kwargs["hidden_states"]

    def last(module: nn.Module, _: Any, output: Any) -> Any:
        if module is blocks[-1]:
            seen[len(blocks) - 1] = of_block(output)
        states = [seen[i] for i in (-1, *layers)]
        new = side_network(states, of_block(output), own, method, mask)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    blocks[0].register_forward_pre_hook(entering, with_kwargs=True)
    for i, block in enumerate(blocks if norm else blocks[:-1]):
        block.register_forward_hook(lambda _m, _a, output, i=i: seen.update({i: of_block(output)}))
    (bare.get_submodule(norm) if norm else blocks[-1]).register_forward_hook(last)
    return bare


@pytest.mark.parametrize("layers", [[0, 1], [0], [1]])
@pytest.mark.parametrize("output", ["side", "both"])
@pytest.mark.parametrize("name", STACKS)
def test_forward_and_gradients(name: str, output: Any, layers: list[int]) -> None:
    method = LadderSideTuning(reduction=4, expansion=3, nonlinearity="gelu", temperature=0.5, output=output)
    batch = inputs(name, ragged=name != "vit")
    model, adapter = attached(name, method, None if layers == [0, 1] else layers)
    leaves, mask = numbers(adapter), batch.get("attention_mask")
    assert any(key.endswith("/query") for key in leaves) == (name in ENCODERS)
    agree(adapter, model(**batch).logits, by_hand(name, leaves, method, layers, mask)(**batch).logits, leaves)


def tagger() -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 16}
    torch.manual_seed(0)
    model = transformers.BertForTokenClassification(transformers.BertConfig(vocab_size=97, **sizes))
    randomise(model, "tagger")
    return model.eval()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen(side: str) -> None:
    model = tagger()
    shake(inlay.attach(model, LadderSideTuning(reduction=4)))
    batch = inputs("bert", ragged=True, side=side)
    mask = batch["attention_mask"]
    batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        padded = model(**batch).logits
        for row, real in enumerate(mask.bool()):
            close(model(input_ids=batch["input_ids"][row, real][None]).logits[0], padded[row, real])
        batch["input_ids"][mask == 0] = 77
        assert torch.equal(model(**batch).logits[mask.bool()], padded[mask.bool()])


def test_tags_do_not_hide_the_tokens_they_are_for() -> None:
    """Where labels begin a decoder's prompt ends; a tagger's labels are beside their tokens."""
    model = tagger()
    ids, labels = torch.arange(3, 9)[None], torch.tensor([[-100, 1, 0, 1, 0, 1]])
    for method in (LadderSideTuning(reduction=4), inlay.LoReFT(rank=2, prefix=2, suffix=2)):
        shake(inlay.attach(model, method, name=method.name))
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids, labels=labels).logits, model(input_ids=ids).logits)


def test_side_attention_where_it_is_not_exact() -> None:
    for name in ("llama", "llama-classifier", "t5", "deberta-v2", "bloom"):
        with pytest.raises(UnsupportedError, match="known to be bidirectional"):
            inlay.attach(zoo_model(name), LadderSideTuning(attention=True))
    alone = inlay.attach(ZOO["bert"].build(), LadderSideTuning(reduction=4, attention=False))
    assert not any(key.endswith("/query") for key in alone.tensors())


def test_the_start() -> None:
    torch.manual_seed(0)
    adapter = inlay.attach(ZOO["llama"].build(), LadderSideTuning(reduction=4, output="both"))
    n = {key.rpartition("/")[2]: value for key, value in adapter.tensors().items()}
    assert torch.equal(n["gates"], torch.zeros(3)) and torch.equal(n["norms"], torch.ones(3, 8))
    for down, fan in (("down", 32), ("down_bias", 32), ("up", 8), ("up_bias", 8)):
        assert 0.7 < float(n[down].abs().max()) * fan**0.5 <= 1
    assert abs(float(n["inner"].std()) * 8**0.5 - 1) < 0.15 and abs(float(n["outer"].std()) * 32**0.5 - 1) < 0.15


def test_count() -> None:
    d, s, rungs = 32, 8, 2
    adapter = inlay.attach(ZOO["llama"].build(), LadderSideTuning(reduction=4))
    assert adapter.count == (rungs + 2) * d * s + (rungs + 1) * s + d + rungs * (1 + 8 * s * s) + (rungs + 1) * s


def test_count_with_attention() -> None:
    d, s, rungs = 32, 8, 2
    adapter = inlay.attach(ZOO["bert"].build(), LadderSideTuning(reduction=4, attention=True))
    feed_forwards = (rungs + 2) * d * s + (rungs + 1) * s + d + rungs * (1 + 8 * s * s) + (rungs + 1) * s
    assert adapter.count == feed_forwards + rungs * (4 * s * s + s)
    n = {key.rpartition("/")[2]: value for key, value in adapter.tensors().items()}
    assert torch.equal(n["attention_norms"], torch.ones(rungs, s))
    assert all(abs(float(n[key].std()) * s**0.5 - 1) < 0.25 for key in ("query", "key", "value", "out"))


# -- no gradient through the base -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_nothing_is_recorded_while_the_base_runs(name: str) -> None:
    model, adapter = attached(name, LadderSideTuning(reduction=4))
    model.train()
    inside: list[bool] = []
    recorded: list[bool] = []
    saved: list[bool] = []

    def enter(*_: Any) -> None:
        inside.append(True)

    def leave(_module: nn.Module, _args: Any, output: Any) -> None:
        inside.pop()
        recorded.append(of_block(output).requires_grad)

    for block in model.get_submodule(STACKS[name][0]):
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(bool(inside)), t)[1], lambda t: t):
        logits = model(**inputs(name, rows=2)).logits
    assert recorded == [False, False]
    assert saved and not any(saved)
    logits.square().mean().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_nothing_is_kept_from_one_forward_to_the_next() -> None:
    """What entered the blocks is let go, also where another adapter or the base answers."""
    model, _ = attached("llama", LadderSideTuning(reduction=4))
    inlay.attach(model, inlay.LoRA(rank=2), name="other")
    for choice in ("default", "other", None, ["default", "other"], ["other", None]):
        with inlay.use(model, choice):
            model(**inputs("llama", rows=2))
        assert not any(h.captured.get(t) for h in hosts_of(model) for t in h.captured)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_recomputed_layers_leave_nothing_behind(name: str, reentrant: bool) -> None:
    """Beside LoRA in the base the blocks are checkpointed; their inputs are captured twice and used once."""
    check_law(
        ZOO[name], Stack(inlay.LoRA(rank=2), LadderSideTuning(reduction=4)), "checkpointing", LAWS["checkpointing"]
    )
    model: Any = zoo_model(name).train()
    inlay.attach(model, Stack(inlay.LoRA(rank=2), LadderSideTuning(reduction=4)))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model(**ZOO[name].batch(2, 0)).loss.backward()
    assert not any(any(h.captured.values()) for h in hosts_of(model))


@pytest.mark.parametrize("output", ["side", "both"])
def test_what_is_trained_before_it_gets_its_gradient(output: Any) -> None:
    method = LadderSideTuning(reduction=4, output=output)
    model, adapter = attached("llama", method)
    rows = [torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    for embeds, network in zip(rows, (model, by_hand("llama", numbers(adapter), method, [0, 1])), strict=True):
        (network(inputs_embeds=embeds).logits ** 2).sum().backward()
    assert rows[0].grad is not None and rows[1].grad is not None
    close(rows[0].grad, rows[1].grad)


def test_threads_do_not_share_what_they_read() -> None:
    model, _ = attached("llama", LadderSideTuning(reduction=4))
    batches = [inputs("llama", rows=n) for n in (1, 2, 3, 4)]
    with torch.no_grad():
        alone = [model(**batch).logits for batch in batches]

    def work(index: int) -> bool:
        with torch.no_grad():
            return all(torch.equal(model(**batches[index]).logits, alone[index]) for _ in range(8))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


SIZES = {"vocab_size": 17, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6,
         "num_attention_heads": 4}  # fmt: skip


def saved_bytes(method: Any, *, encoder: bool = False, **where: Any) -> int:
    """What one forward keeps for its backward, weights of the model and the head's part aside."""
    torch.manual_seed(0)
    model: Any = (
        transformers.BertForMaskedLM(transformers.BertConfig(**SIZES)).train()
        if encoder
        else transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).train()
    )
    inlay.attach(model, method, **where)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        ids = torch.zeros((2, 64), dtype=torch.long)
        out = model(input_ids=ids).logits if encoder else model.model(input_ids=ids).last_hidden_state
    assert out.requires_grad
    return sum(kept.values())


def test_it_keeps_a_fraction_of_what_lora_keeps() -> None:
    """The paper saves 2.7 times more memory than other methods: LoRA's activations span the whole base."""
    assert saved_bytes(LadderSideTuning()) < 0.2 * saved_bytes(inlay.LoRA(rank=2))
    side, lora = (saved_bytes(m, encoder=True) for m in (LadderSideTuning(attention=True), inlay.LoRA(rank=2)))
    assert side < 0.3 * lora, side / lora


# -- refusals -------------------------------------------------------------------------------------------


def test_what_cannot_be_chosen() -> None:
    for wrong in ({"reduction": 0}, {"temperature": 0.0}, {"output": "base"}, {"nonlinearity": "step"}, {"dropout": 1}):
        with pytest.raises(ConfigError):
            LadderSideTuning(**wrong)  # type: ignore[arg-type]
    for where in ({"where": ["q_proj"]}, {"layers": [2]}, {"layers": []}):
        with pytest.raises(SelectionError):
            inlay.attach(ZOO["llama"].build(), LadderSideTuning(), **where)  # type: ignore[arg-type]


def test_layers_that_are_used_again_are_refused() -> None:
    config = transformers.AlbertConfig(
        vocab_size=17, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=16
    )
    with pytest.raises(UnsupportedError, match="more than once"):
        inlay.attach(transformers.AlbertModel(config), LadderSideTuning())


def test_several_stacks_are_refused() -> None:
    config = transformers.CLIPConfig(
        text_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    )
    with torch.device("meta"):
        model = transformers.CLIPModel(config)
    with pytest.raises(UnsupportedError, match="2 stacks"):
        inlay.attach(model, LadderSideTuning())
