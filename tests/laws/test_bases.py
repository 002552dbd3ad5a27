"""The laws for every method on every kind of quantised base: what holds on dense weights holds on packed ones.

One example of each method on a tiny Llama whose sizes are multiples of 64. Eight-bit layers of bitsandbytes are in
training mode, where a CPU computes with the dequantised weight; in evaluation mode they round what enters them, too.
"""

from __future__ import annotations

import copy
import logging
import traceback
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import inlay
from inlay.bases import trial
from inlay.bases.loading import LIBRARIES, read_quantised
from inlay.core.contracts.method import Method, SubsetMethod
from inlay.core.errors import UnsupportedError
from inlay.core.model.fingerprint import fingerprint
from inlay.core.model.layer import read_weight, store_of
from inlay.methods import registry
from inlay.testing import LAWS
from inlay.testing.check import check_law
from inlay.testing.laws import refusal
from inlay.testing.laws.scaffold import close, forward, same, train
from inlay.testing.specimen import VOCABULARY, Specimen

# Trained whole: weights of 4 or 8 bits take no small steps. LoftQ quantises by itself, so it needs the files' weights.
REFUSED = {key for key, cls in registry().items() if issubclass(cls, SubsetMethod)} | {"loftq"}
LAWS_HERE = (
    "identity", "silence", "views_agree", "storage", "only_the_adapter_learns", "rows_are_independent",
    "checkpointing", "detach_restores", "copying",
)  # fmt: skip
# The formats differ in what they store, which these laws ask about; the others are asked once.
LAWS_OF_EACH = ("identity", "views_agree", "only_the_adapter_learns", "detach_restores", "copying")
# Draws a rank in training mode, which eight-bit layers are looked at in.
NOT_HERE = {("dylora", "int8"): {"views_agree"}}


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        attention_bias=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


MADE: dict[str, Any] = {
    "kind": "decoder", "task": "causal", "factory": _llama, "supports_generate": True, "takes_positions": True,
}  # fmt: skip
DENSE = Specimen(name="llama-64", **MADE)


@dataclass(frozen=True, kw_only=True)
class Quantised(Specimen):
    """The dense one, quantised."""

    quantisation: str = "nf4"

    def build(self, *, dtype: torch.dtype = torch.float32) -> nn.Module:
        model = copy.deepcopy(_quantised(self.quantisation))
        return model.train(self.quantisation == "int8")


@cache
def _quantised(name: str) -> nn.Module:
    from transformers.utils import logging as notices

    notices.disable_progress_bar()
    logging.getLogger("torchao").setLevel(logging.ERROR)
    dense: Any = DENSE.build()
    tensors = dict(dense.state_dict())
    return read_quantised(AutoModelForCausalLM, dense.config, tensors, name, torch.float32)[0]


def specimen(name: str) -> Quantised:
    return Quantised(name=f"llama-{name}", quantisation=name, **MADE)


def example(key: str) -> Method:
    return next(e for e in registry()[key].examples() if not getattr(e, "dropout", 0))


@pytest.fixture(params=LIBRARIES)
def name(request: pytest.FixtureRequest) -> str:
    """Each quantisation; torchao's where it is installed, because the extra dev does not bring it."""
    if LIBRARIES[request.param] == "torchao" and find_spec("torchao") is None:
        pytest.skip("torchao is not installed; the extra quant brings it")
    return str(request.param)


@pytest.mark.parametrize("key", registry())
def test_laws(key: str, name: str) -> None:
    method, base = example(key), specimen(name)
    reason = refusal(base, method)
    assert (reason is not None) == (key in REFUSED), reason or f"{key} was attached to {name}"
    if reason is not None:
        assert len(reason) > 40, "a refusal says what to do"
        return
    broken = []
    for law in LAWS_HERE if name == "nf4" else LAWS_OF_EACH:
        if law in NOT_HERE.get((key, name), ()):
            continue
        try:
            check_law(base, method, law, LAWS[law])
        except Exception:  # all that do not hold are said at once
            broken.append(f"{law}: {traceback.format_exc(limit=-4)}")
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("key", registry())
def test_the_table_says_what_the_laws_see(key: str) -> None:
    assert (trial.refusal(example(key), "nf4") is not None) == (key in REFUSED)


def test_loftq_reads_the_files_of_a_quantised_base() -> None:
    assert "no safetensors file" in str(trial.refusal(example("loftq"), "nf4"))
    assert trial.refusal(example("loftq"), "nf4", files=True) is None
    assert trial.refusal(example("full"), "nf4", files=True) is not None


def test_the_layers_of_the_blocks_are_quantised_and_nothing_else(name: str) -> None:
    model = specimen(name).build()
    formats = {path: store.name for path, m in model.named_modules() if (store := store_of(m)) is not None}
    assert set(formats.values()) == {name}
    assert len(formats) == 14 and all(path.startswith("model.layers.") for path in formats)


def test_a_layer_computes_with_the_weight_that_is_read(name: str) -> None:
    """Output and gradient of an attached layer are those of a dense one of the dequantised weight."""
    model: Any = specimen(name).build()
    inlay.attach(model, inlay.LoRA(rank=2), where="all-linear")
    layer = model.model.layers[0].self_attn.q_proj
    weight, bias = read_weight(layer)
    dense = DENSE.build().model.layers[0].self_attn.q_proj.weight  # type: ignore[union-attr]
    worst = float((weight - dense.detach()).abs().max() / dense.detach().abs().max())
    assert 0 < worst < (0.01 if "int8" in name else 0.2), "the weight is not the base's, quantised"
    x = torch.randn(2, 5, 64, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(gradient, 2 * y @ weight, rtol=1e-4, atol=1e-4)


def test_eight_bits_in_evaluation_round_what_enters_them() -> None:
    model: Any = specimen("int8").build()
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    with torch.no_grad():
        model.train()
        exact = layer(x)
        model.eval()
        rounded = layer(x)
    assert 0 < float((rounded - exact).abs().max() / exact.abs().max()) < 0.02


def test_double_quantisation_takes_about_half_a_byte_a_weight() -> None:
    """Blocks of 64 with constants of 8 bits in blocks of 256: 4.127 bits a weight, and a table of 256 levels."""
    store = store_of(specimen("nf4").build().model.layers[0].mlp.up_proj)  # type: ignore[union-attr, operator]
    assert store is not None
    packed, constants, blocks, levels, offset = store.tensors
    assert packed.numel() == 128 * 64 // 2 and constants.numel() == 128 and constants.dtype == torch.uint8
    assert blocks.numel() == 1 and levels.numel() == 256 and offset.numel() == 1


def test_merging_requantised_says_what_it_costs(name: str) -> None:
    base = specimen(name)
    model, batch = base.build(), base.batch(2, 1)
    adapter = inlay.attach(model, inlay.LoRA(rank=2), name="one", where="all-linear")
    train(adapter)
    expected, kept = forward(base, model, batch), store_of(model.model.layers[0].mlp.up_proj)  # type: ignore[union-attr]
    report = inlay.merge(model, "one")
    close(forward(base, model, batch), expected, "dense: merged weights compute something else")
    assert report.worst == 0 and max(report.lost.values()) == 0
    inlay.unmerge(model)
    report = inlay.merge(model, "one", requantize=True)
    layer = model.model.layers[0].mlp.up_proj  # type: ignore[union-attr]
    again = store_of(layer)
    assert again is not None and kept is not None and again.name == kept.name
    assert report.worst > 0
    # What was rounded is what the layer holds now: measured again, from the base's weight and the adapter's.
    site, delta = next((p.site, p.delta) for p in adapter.pieces if p.site.module is layer)  # type: ignore[union-attr]
    merged, _ = read_weight(layer)
    inlay.unmerge(model)
    exact, _ = delta.weight(*site.read_weight())
    assert report.layers[site.path] == pytest.approx(float((merged - exact).abs().max()), rel=1e-5)
    change = float((exact - site.read_weight()[0]).norm())
    assert report.lost[site.path] == pytest.approx(float((merged - exact).norm()) / change, rel=1e-4)
    now = store_of(layer)
    assert now is not None and all(torch.equal(a, b) for a, b in zip(now.tensors, kept.tensors, strict=True))
    same(forward(base, model, batch), expected, "unmerging did not restore the outputs")


def test_fingerprints_tell_bases_and_formats_apart() -> None:
    four, again, eight = (fingerprint(specimen(n).build()) for n in ("nf4", "nf4", "int8"))
    dense = fingerprint(DENSE.build())
    assert four == again and four != eight and four.structure == dense.structure
    assert four.quantised is not None and four.quantised.startswith("nf4 ")
    assert dense.quantised is None and four.matrices is None
    # Another precision of the same base is no mismatch; another base is, also where only its packed weights differ.
    assert four.differences(dense) == dense.differences(four) == four.differences(eight) == []
    other: Any = specimen("nf4").build()
    with torch.no_grad():
        store_of(other.model.layers[0].mlp.up_proj).tensors[0].add_(1)  # type: ignore[union-attr]
    assert "quantised weights" in four.differences(fingerprint(other))[0]


def test_a_quantised_base_is_the_same_on_every_machine(name: str) -> None:
    """The codes of a weight depend on what it was rounded to before, so that must not depend on what is computed in."""
    dense: Any = DENSE.build()
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        options: dict[str, Any] = {"read_in": torch.bfloat16}
        model = read_quantised(AutoModelForCausalLM, dense.config, dense.state_dict(), name, dtype, **options)[0]
        layer = model.model.layers[0].mlp.up_proj
        if name in ("nf4", "fp4"):
            assert layer.compute_dtype == layer.weight.quant_state.dtype == dtype
        assert model.lm_head.weight.dtype == model.config.dtype == dtype
        found.append(fingerprint(model))
        train(inlay.attach(model, inlay.LoRA(rank=2), where="all-linear"))
        model.train()
        assert model(input_ids=torch.tensor([[3, 4, 5]])).logits.dtype == dtype
        merged = inlay.merge(model, "default")
        assert merged.layers and model(input_ids=torch.tensor([[3, 4, 5]])).logits.dtype == dtype
    assert found[0].quantised is not None and {f.quantised for f in found} == {found[0].quantised}
    assert all(f.differences(found[0]) == found[0].differences(f) == [] for f in found)


def test_an_adapter_of_a_quantised_base_fits_the_dense_one(tmp_path: Any) -> None:
    model = specimen("nf4").build()
    train(inlay.attach(model, inlay.LoRA(rank=2), name="one"))
    inlay.save(model, "one", tmp_path)
    assert inlay.load(DENSE.build(), tmp_path).digest == inlay.adapters(model)["one"].digest


def test_a_four_bit_base_is_not_repacked_between_steps() -> None:
    """bitsandbytes would round its constants in the first evaluation, and stop gradients from then on."""
    model: Any = specimen("nf4").build()
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = True  # as others load it, on a CPU of that kind
    adapter = inlay.attach(model, inlay.LoRA(rank=2), where="all-linear", layers=[0])
    base = specimen("nf4")
    before = read_weight(model.model.layers[1].mlp.up_proj)[0]
    forward(base, model.eval(), base.batch(2, 0))
    assert torch.equal(read_weight(model.model.layers[1].mlp.up_proj)[0], before)
    model.train()(**base.batch(2, 0)).loss.backward()
    assert all(p.grad is not None for p in adapter.parameters())
    inlay.detach(model, "default")
    assert model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu


@pytest.mark.parametrize("where", ["up_proj", "layers.0"])
def test_a_quantised_module_is_not_copied(where: str) -> None:
    model = specimen("nf4").build()
    with pytest.raises(UnsupportedError, match="is quantised"):
        inlay.attach(model, inlay.LoRA(rank=2), where=["q_proj"], layers=[1], modules_to_save=[where])


def test_rows_that_the_library_computes_wrongly_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 4-bit base that somebody else has loaded, with rows that blocks of 64 do not divide, on a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from inlay.bases import bitsandbytes as room

    if room.exact(96, "nf4", 64):
        pytest.skip("this bitsandbytes computes them right")
    assert room.exact(64, "nf4", 64) and room.exact(704, "fp4", 64)
    sizes = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, vocab_size=64)
    with monkeypatch.context() as patched:
        patched.setattr(room, "exact", lambda *_: True)
        tensors = dict(LlamaForCausalLM(config).state_dict())
        model = read_quantised(AutoModelForCausalLM, config, tensors, "nf4", torch.float32)[0]
    with pytest.raises(UnsupportedError, match="rows of 96 numbers wrongly on the CPU"):
        inlay.attach(model, inlay.LoRA(rank=2))
    assert not inlay.adapters(model)
