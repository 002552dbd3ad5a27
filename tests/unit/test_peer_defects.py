"""What goes wrong in Hugging Face PEFT 0.21.2, reproduced there one by one, and what happens here instead.

Each docstring names the action in PEFT and its result.
"""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import inlay
from inlay.arithmetic import combine
from inlay.core.contracts.pieces import PromptPiece
from inlay.core.errors import (
    AdapterFileError,
    AdapterNameError,
    BaseMismatchError,
    RouteError,
    SelectionError,
    UnsupportedError,
)
from inlay.testing.models import ZOO
from inlay.testing.specimen import randomise

TYPED = {"where": ["q_proj", "v_proj"]}


def fresh(name: str = "llama") -> Any:
    return ZOO[name].build()


def shaken(model: Any, method: Any, name: str = "default", *, seed: int = 1, **options: Any) -> inlay.Adapter:
    """An adapter with random numbers on top of its initialisation."""
    adapter = inlay.attach(model, method, name=name, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.2)
    return adapter


def batch(rows: int = 2, name: str = "llama") -> dict[str, Tensor]:
    found = ZOO[name].batch(rows=rows, seed=0)
    found.pop("labels", None)
    return found


@torch.no_grad()
def logits(model: Any, rows: int = 2, name: str = "llama") -> Tensor:
    return ZOO[name].logits(model(**batch(rows, name)))


# The table of reproduced defects, row by row.


def test_a_target_that_matches_nothing() -> None:
    """`target_modules=["q_proj", "v_prj"]`: no warning, half of the adapter is missing."""
    model = fresh()
    with pytest.raises(SelectionError, match=r"'v_prj' matches no module; did you mean 'v_proj'"):
        inlay.attach(model, inlay.LoRA(), where=["q_proj", "v_prj"])
    assert not inlay.adapters(model)


MISFITS = ["fewer layers", "extra key", "missing key"]
# Only our own files say which values their base has.
FITS = [("native", "other base"), *((format, what) for format in ("native", "peft") for what in MISFITS)]


@pytest.mark.parametrize(("format", "what"), FITS)
def test_a_file_that_does_not_fit(tmp_path: Path, format: str, what: str) -> None:
    """Loading on another base, on one with fewer layers, or with keys too many: no warning."""
    from safetensors.torch import load_file, save_file

    model = fresh()
    shaken(model, inlay.LoRA(rank=2), **TYPED)
    inlay.save(model, "default", tmp_path, format=format)
    target = fresh()
    file = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    with torch.no_grad():
        match what:
            case "other base":
                target.model.layers[0].mlp.up_proj.weight.add_(1.0)
            case "fewer layers":
                del target.model.layers[1]
            case "extra key":
                tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 32)
            case "missing key":
                tensors.pop(next(iter(tensors)))
    if "key" in what:
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            save_file(tensors, file, metadata=opened.metadata())
    with pytest.raises((AdapterFileError, BaseMismatchError, SelectionError)):
        inlay.load(target, tmp_path)
    assert not inlay.adapters(target) and set(target.state_dict()) <= set(fresh().state_dict())


def test_an_exception_in_a_mixed_batch_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception inside a call with `adapter_names`: hooks leak, later calls use the stale names."""
    model = fresh()
    for seed, name in enumerate(("a", "b")):
        shaken(model, inlay.LoRA(rank=2), name, seed=seed)
    expected = logits(model)
    with monkeypatch.context() as patch:

        def fail(*_: Any, **__: Any) -> Any:
            raise RuntimeError("inside")

        patch.setattr(model.model.layers[1].mlp, "forward", fail)
        with pytest.raises(RuntimeError, match="inside"), inlay.use(model, ["a", None]):
            model(**batch())
    assert torch.equal(logits(model), expected)
    with inlay.use(model, None):
        assert torch.equal(logits(model), logits(fresh()))


def test_the_base_is_asked_without_waking_a_frozen_adapter() -> None:
    """`with disable_adapter()` on a frozen adapter: the adapter becomes trainable."""
    model = fresh()
    adapter = shaken(model, inlay.LoRA(rank=2))
    adapter.trainable = False
    with inlay.use(model, None):
        logits(model)
        assert not adapter.trainable
    assert not adapter.trainable and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", [inlay.PiSSA(rank=2, niter=2), inlay.PiSSA(rank=2), inlay.OLoRA(rank=2)])
def test_randomised_initialisation_is_stored(tmp_path: Path, method: Any) -> None:
    """`pissa_niter_2`, save and reload: an error of 0.052 against an effect of 0.031."""
    model = fresh()
    shaken(model, method)
    expected = logits(model)
    inlay.save(model, "default", tmp_path)
    again = fresh()
    torch.manual_seed(99)
    inlay.load(again, tmp_path)
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("method", [inlay.PiSSA(rank=2), inlay.OLoRA(rank=2)])
def test_without_the_adapter_there_is_the_base(method: Any) -> None:
    """PiSSA or OLoRA and `disable_adapter`: not the base model, whose weights were changed."""
    model, expected = fresh(), logits(fresh())
    before = {n: t.clone() for n, t in model.state_dict().items()}
    shaken(model, method)
    with inlay.use(model, None):
        assert torch.equal(logits(model), expected)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())


def test_unmerge_gives_the_very_bits_back() -> None:
    """bfloat16, merge and unmerge: 57 % of the weights changed."""
    model = fresh().to(torch.bfloat16)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    shaken(model, inlay.LoRA(rank=4), where="all-linear")
    expected = logits(model)
    inlay.merge(model, "default")
    assert any(not torch.equal(model.state_dict()[n], t) for n, t in before.items())
    inlay.unmerge(model)
    assert torch.equal(logits(model), expected)
    inlay.detach(model, "default")
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())


def test_there_is_one_merge_and_it_rounds_once() -> None:
    """`safe_merge` and the default, bfloat16: 30 % of the weights differ."""
    model = fresh().to(torch.bfloat16)
    adapter = shaken(model, inlay.LoRA(rank=4), **TYPED)
    path = "model.layers.0.self_attn.q_proj"
    delta = next(p.delta for p in adapter.pieces if p.key == path)  # type: ignore[union-attr]
    base: Any = model.get_submodule(path).weight.detach().clone()
    wide = base.float() + delta.scale * (delta.b @ delta.a).detach()  # type: ignore[union-attr]
    report = inlay.merge(model, "default")
    assert torch.equal(model.get_submodule(path).weight, wide.bfloat16())
    assert report.layers[path] == pytest.approx(float((wide.bfloat16().float() - wide).abs().max()))


def test_layers_that_share_their_weights_are_merged_apart() -> None:
    """Merging with `layer_replication`: wrong, as its guard never fires.

    In float64: in float32 a product and its update round to 5e-5 of one another.
    """
    model = fresh().double()
    first, last = model.model.layers
    twin = copy.deepcopy(first)
    for one, other in zip(first.modules(), twin.modules(), strict=True):
        other._parameters.update(one._parameters)
    model.model.layers = torch.nn.ModuleList([first, twin, last])
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = number
    model.config.num_hidden_layers = 3
    before = {n: t.clone() for n, t in model.state_dict().items()}
    shaken(model, inlay.LoRA(rank=2), where="all-linear")
    expected = logits(model)
    inlay.merge(model, "default")
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-10)
    inlay.unmerge(model)
    inlay.detach(model, "default")
    assert first.mlp.up_proj.weight is twin.mlp.up_proj.weight
    assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items())


def in_four_bits() -> Any:
    """A tiny Llama in NF4, its biases as they were."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from inlay.bases.loading import read_quantised

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    dense: Any = LlamaForCausalLM(LlamaConfig(vocab_size=97, attention_bias=True, **sizes))
    randomise(dense, "four bits")
    made: Any = read_quantised(AutoModelForCausalLM, dense.config, dense.state_dict(), "nf4", torch.float32)[0]
    return made.eval()


def merged_as_computed(model: Any, method: Any, **options: Any) -> None:
    """The merged model computes what the adapter did, which was something else than the base; and the way back."""
    base = logits(model)
    shaken(model, method, **options)
    expected = logits(model)
    assert (expected - base).abs().max() > 1e-2, method
    inlay.merge(model, "default")
    assert torch.allclose(logits(model), expected, atol=1e-4 * max(1.0, float(expected.abs().max()))), method
    inlay.unmerge(model)
    assert torch.equal(logits(model), expected)
    inlay.detach(model, "default")
    assert torch.equal(logits(model), base)


def test_a_bias_is_merged_with_its_scale_into_four_bits() -> None:
    """bitsandbytes 4-bit with `lora_bias`, merged: the bias is not scaled (1.0 for 4.0); `safe_merge` crashes."""
    merged_as_computed(in_four_bits(), inlay.Stack(inlay.LoRA(rank=2, alpha=8.0), inlay.BitFit()))


def test_every_method_that_merges_merges_into_four_bits() -> None:
    """RandLoRA merged into a bitsandbytes 4-bit base: the adapter is lost."""
    model, tried = in_four_bits(), []
    for key, cls in inlay.methods().items():
        if cls.needs_data or cls.family not in ("low rank", "orthogonal", "rescaling") or key == "loftq":
            continue  # loftq quantises by itself
        merged_as_computed(model, cls.examples()[0])
        tried.append(key)
    assert len(tried) >= 14, tried


def test_a_tied_head_keeps_its_own_weights_when_merged() -> None:
    """Merging at a tied `lm_head`: the logits are off by 3.5, with a warning only."""
    for where in (["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"]):
        model = fresh("qwen3")
        assert model.lm_head.weight is model.model.embed_tokens.weight
        shaken(model, inlay.LoRA(rank=2), where=where)
        expected = logits(model, name="qwen3")
        report = inlay.merge(model, "default")
        assert report.untied and not model.config.tie_word_embeddings
        assert (logits(model, name="qwen3") - expected).abs().max() < 1e-4 * expected.abs().max()
        inlay.unmerge(model)
        assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings


def test_half_of_each_is_half_of_each() -> None:
    """`add_weighted_adapter(..., "linear")` with 0.5 and 0.5: 99 % relative error."""
    model = fresh()
    adapters = [shaken(model, inlay.LoRA(rank=4), name, seed=seed, **TYPED) for seed, name in enumerate("ab")]
    assert combine(model, {"a": 0.5, "b": 0.5}, name="half").worst == 0
    for one, two, both in zip(*(a.pieces for a in (*adapters, inlay.adapters(model)["half"])), strict=True):
        zero = torch.zeros(one.site.out_features, one.site.in_features)
        parts = [piece.delta.weight(zero, None)[0] for piece in (one, two, both)]
        assert torch.allclose(parts[2], 0.5 * parts[0] + 0.5 * parts[1], atol=1e-6)


def test_combining_under_a_name_in_use() -> None:
    """`add_weighted_adapter` with an existing name: nothing happens, nothing is said."""
    model = fresh()
    digests = {name: shaken(model, inlay.LoRA(rank=2), name, seed=s).digest for s, name in enumerate("ab")}
    with pytest.raises(AdapterNameError, match="'b' is already on this model"):
        combine(model, {"a": 1.0}, name="b")
    assert {name: a.digest for name, a in inlay.adapters(model).items()} == digests


def prompts() -> list[Any]:
    found = []
    for cls in inlay.methods().values():
        for method in cls.examples()[:1]:
            if cls.family == "soft prompt" and not cls.needs_data:
                found.append(pytest.param(method, id=cls.name))
    return found


@pytest.mark.parametrize("method", prompts())
def test_a_loaded_prompt_can_be_trained_on(tmp_path: Path, method: Any) -> None:
    """`is_trainable=True` for prompt learning: ValueError; the encoder of P-tuning and prefix tuning is thrown away."""
    model = fresh()
    adapter = shaken(model, method)
    assert any(isinstance(piece, PromptPiece) for piece in adapter.pieces)
    inlay.save(model, "default", tmp_path)
    again = fresh()
    loaded = inlay.load(again, tmp_path, trainable=True)
    assert loaded.trainable and loaded.digest == adapter.digest
    assert {n for n, _ in adapter.tensors().items()} == {n for n, _ in loaded.tensors().items()}
    before = loaded.digest
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    ZOO["llama"].logits(again.train()(**batch())).square().mean().backward()
    optimizer.step()
    assert loaded.digest != before


@pytest.mark.parametrize("key", list(inlay.methods()))
def test_hyper_parameters_are_never_changed(key: str) -> None:
    """Using a configuration twice: it was mutated in place by the first use."""
    for method in inlay.methods()[key].examples():
        before = json.dumps(method.to_dict(), default=str)
        for specimen in ("llama", "bert"):
            model = fresh(specimen)
            try:
                inlay.attach(model, method, data=[ZOO[specimen].batch(rows=2, seed=0)] if method.needs_data else None)
            except (SelectionError, UnsupportedError):
                continue
        assert json.dumps(method.to_dict(), default=str) == before
        with pytest.raises((AttributeError, TypeError)):
            method.rank = 3


# Other traps that the notes list.


@pytest.mark.parametrize("key", ["ia3", "loha", "lokr", "vera", "oft", "dora"])
def test_no_method_ignores_whom_a_row_belongs_to(key: str) -> None:
    """`adapter_names` with (IA)³, LoHa, LoKr, VeRA, OFT: ignored in silence, every row gets the active adapter."""
    model = fresh()
    method = inlay.methods()[key].examples()[0]
    for seed, name in enumerate("ab"):
        shaken(model, method, name, seed=seed)
    alone = {}
    for choice in ("a", "b", None):
        with inlay.use(model, choice):
            alone[choice] = logits(model, rows=3)
    with inlay.use(model, ["b", None, "a"]):
        mixed = logits(model, rows=3)
    for row, choice in enumerate(("b", None, "a")):
        assert torch.allclose(mixed[row], alone[choice][row], atol=1e-5)
    assert not torch.allclose(alone["a"], alone["b"], atol=1e-3)


def test_names_that_do_not_fit_the_batch() -> None:
    """A wrong number of `adapter_names`, or an unknown one, must not fall back to the base."""
    model = fresh()
    shaken(model, inlay.LoRA(rank=2), "a")
    with pytest.raises(AdapterNameError, match="no adapter 'aa'"), inlay.use(model, ["a", "aa"]):
        pass
    with pytest.raises(RouteError), inlay.use(model, ["a", None, "a"]):
        logits(model, rows=2)


def test_choosing_an_adapter_is_not_training_it() -> None:
    """`set_adapter` also switches gradients: activation and trainability are one thing (#1374, #2759, #3447)."""
    model = fresh()
    one, two = (shaken(model, inlay.LoRA(rank=2), name) for name in "ab")
    one.trainable = False
    for choice in ("a", "b", None):
        with inlay.use(model, choice):
            assert (one.trainable, two.trainable) == (False, True)


def test_each_thread_has_its_own_choice() -> None:
    """Switching adapters in one thread changes what another thread's call computes (#2283)."""
    model = fresh()
    for seed, name in enumerate("ab"):
        shaken(model, inlay.LoRA(rank=2), name, seed=seed)
    expected, found = {}, {}
    for name in "ab":
        with inlay.use(model, name):
            expected[name] = logits(model)
    inside = threading.Barrier(2, timeout=30)

    def ask(name: str) -> None:
        with inlay.use(model, name):
            inside.wait()
            found[name] = logits(model)
            inside.wait()

    threads = [threading.Thread(target=ask, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[name], expected[name]) for name in "ab")


def test_a_resized_vocabulary_is_said(tmp_path: Path) -> None:
    """A size mismatch at load (#1457, #1300): a raw torch error, or a base that is silently another."""
    model = fresh()
    shaken(model, inlay.LoRA(rank=2), where=["embed_tokens", "q_proj"])
    inlay.save(model, "default", tmp_path)
    larger = fresh()
    larger.resize_token_embeddings(larger.config.vocab_size + 3)
    with pytest.raises((AdapterFileError, BaseMismatchError), match="shape"):
        inlay.load(larger, tmp_path)
    assert not inlay.adapters(larger)


def test_gradient_checkpointing_needs_no_extra_call() -> None:
    """Gradient checkpointing: "does not require grad" until `enable_input_require_grads` is called (#137)."""
    for reentrant in (False, True):
        model = fresh()
        adapter = shaken(model, inlay.LoRA(rank=2))
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        ZOO["llama"].logits(model(**batch())).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())


def test_an_unknown_key_of_a_peft_file_is_said(tmp_path: Path) -> None:
    """Unknown keys of a configuration are dropped with a warning, whatever they would change (#1979)."""
    model = fresh()
    shaken(model, inlay.LoRA(rank=2), **TYPED)
    inlay.save(model, "default", tmp_path, format="peft")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_fancy_scaling": True}))
    with pytest.raises(AdapterFileError, match="use_fancy_scaling"):
        inlay.load(fresh(), tmp_path)
