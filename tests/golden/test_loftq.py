"""LoftQ against algorithm 1 of its paper, written out, and its 4-bit codes against bitsandbytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.special import ndtri

import inlay
from inlay import LoftQ
from inlay.core.errors import UserError
from inlay.kernels.normal_float import LEVELS, dequantise, quantise
from inlay.testing.models import ZOO
from tests.golden.hand import close, inputs, shake

SITE = "model.layers.0.self_attn.q_proj"


def levels(bits: int) -> Tensor:
    """Quantiles of the normal distribution with an exact zero, as in the papers' code."""
    last, half = 0.9677083, 2 ** (bits - 1)
    low = ndtri(torch.linspace(last, 0.5, half + 1, dtype=torch.float64)[:-1])
    high = -ndtri(torch.linspace(last, 0.5, half, dtype=torch.float64)[:-1])
    values = torch.cat([low, torch.zeros(1, dtype=torch.float64), high]).sort().values
    return values / values.max()


def rounded(weight: Tensor, bits: int) -> Tensor:
    """q(W) by comparing every number with every level."""
    flat = weight.reshape(-1)
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % 64)).reshape(-1, 64)
    most = blocks.abs().amax(1, keepdim=True)
    known = torch.tensor(LEVELS[bits])
    nearest = (blocks / most.clamp(min=1e-30)).unsqueeze(-1).sub(known).abs().argmin(-1)
    return (known[nearest] * most).reshape(-1)[: len(flat)].reshape(weight.shape)


def alternated(weight: Tensor, rank: int, bits: int, steps: int) -> tuple[Tensor, Tensor, float]:
    """The algorithm with s = 1: Q and the product of the iterate that is nearest to W, and its distance."""
    product, best = torch.zeros_like(weight), (weight, weight, float("inf"))
    for _ in range(steps):
        q = rounded(weight - product, bits)
        u, s, vh = torch.linalg.svd(weight - q)
        product = u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]
        error = float((weight - q - product).norm())
        best = min(best, (q, product, error), key=lambda found: found[2])
    return best


@pytest.mark.parametrize("bits", [2, 4])
def test_levels(bits: int) -> None:
    torch.testing.assert_close(torch.tensor(LEVELS[bits], dtype=torch.float64), levels(bits), atol=2e-7, rtol=0)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("shape", [(6, 64), (5, 33), (3, 7), (2, 64, 3)])
def test_codes(bits: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight.view(-1)[: 64 if weight.numel() > 64 else 1] = 0  # a block of zeros stays one
    codes, constants = quantise(weight, bits)
    blocks = -(-weight.numel() // 64)
    assert (codes.dtype, codes.numel(), constants.numel()) == (torch.uint8, blocks * 8 * bits, blocks)
    close(dequantise(codes, constants, bits, shape), rounded(weight, bits))


@pytest.mark.parametrize("shape", [(96, 64), (33, 50), (256, 128)])
def test_bit_for_bit_bitsandbytes(shape: tuple[int, int]) -> None:
    from bitsandbytes import functional

    torch.manual_seed(1)
    weight = torch.randn(shape) * 0.05
    codes, constants = quantise(weight, 4)
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=False)
    assert torch.equal(codes[: theirs.numel()], theirs.view(-1)) and torch.equal(constants, state.absmax)
    assert torch.equal(dequantise(codes, constants, 4, shape), functional.dequantize_4bit(theirs, state))


@pytest.mark.parametrize(
    ("method", "bits"),
    [
        (LoftQ(rank=3, bits=2, iterations=1), 2),
        (LoftQ(rank=3, bits=2, iterations=5), 2),
        (LoftQ(rank=4, alpha=1.0, iterations=5), 4),
        (LoftQ(rank=4, alpha=32.0, bits_pattern={"self_attn": 2}, iterations=3), 2),
        (LoftQ(rank=4, bits=2, bits_pattern={"layers.0": 2, "layers.0.self_attn": 4}, iterations=3), 4),
    ],
)
def test_start(method: LoftQ, bits: int) -> None:
    """Q + s B A is the algorithm's, whatever alpha is; the errors are those of that start."""
    torch.manual_seed(0)
    model = ZOO["llama"].build()
    weight = model.get_submodule(SITE).weight.detach().clone()
    adapter = inlay.attach(model, method)
    q, product, error = alternated(weight, method.rank, bits, method.iterations)
    found = adapter.tensors()
    own = dequantise(found[f"delta/{SITE}/codes"], found[f"delta/{SITE}/constants"], bits, tuple(weight.shape))
    scale = 1.0 if method.alpha is None else method.alpha / method.rank
    a, b = found[f"delta/{SITE}/a"], found[f"delta/{SITE}/b"]
    close(own, q)
    close(scale * (b @ a), product)
    close(a.norm(dim=1), b.norm(dim=0))  # √σ on either side
    told = method.account(found)["reconstruction"]
    plain = float((weight - rounded(weight, bits)).norm() / weight.norm())
    assert told[SITE] == pytest.approx({"plain": plain, "start": error / float(weight.norm())}, rel=1e-3)
    assert all(layer["start"] < layer["plain"] for layer in told.values()) and len(told) == 14


def test_plain_quantisation_beside_loras_start() -> None:
    torch.manual_seed(0)
    model = ZOO["llama"].build()
    weight = model.get_submodule(SITE).weight.detach().clone()
    adapter = inlay.attach(model, LoftQ(rank=2, bits=2, iterations=0))
    found = adapter.tensors()
    own = dequantise(found[f"delta/{SITE}/codes"], found[f"delta/{SITE}/constants"], 2, tuple(weight.shape))
    close(own, rounded(weight, 2))
    assert not found[f"delta/{SITE}/b"].any() and found[f"delta/{SITE}/a"].any()
    plain, start = found[f"delta/{SITE}/errors"]
    assert plain == start > 0.3


def test_forward_and_gradients() -> None:
    """The attached model computes what a model with Q + s B A in place of W computes, and so do its gradients."""
    torch.manual_seed(0)
    model, twin = ZOO["llama"].build(), ZOO["llama"].build()
    twin.load_state_dict(model.state_dict())
    adapter = shake(inlay.attach(model, LoftQ(rank=2, alpha=3.0, bits=2, iterations=2), where=["q_proj", "down_proj"]))
    found = adapter.tensors()
    leaves: dict[str, Tensor] = {}
    parametrised: dict[str, Any] = {}
    for path in [n.split("/")[1] for n in found if n.endswith("/codes")]:
        layer = twin.get_submodule(path)
        for name in "ab":
            leaves[f"delta/{path}/{name}"] = found[f"delta/{path}/{name}"].detach().clone().requires_grad_()
        q = dequantise(found[f"delta/{path}/codes"], found[f"delta/{path}/constants"], 2, tuple(layer.weight.shape))
        product = leaves[f"delta/{path}/b"] @ leaves[f"delta/{path}/a"]
        parametrised[f"{path}.weight"] = q + 1.5 * product
    batch = inputs("llama")
    batch.pop("labels", None)
    expected = torch.func.functional_call(twin, parametrised, kwargs=batch).logits
    actual = model(**batch).logits
    close(actual, expected)
    expected.square().mean().backward()
    actual.square().mean().backward()
    for piece in adapter.pieces:
        for name in "ab":
            gradient = getattr(piece.delta, name).grad  # type: ignore[union-attr]
            close(gradient, leaves[f"delta/{piece.key}/{name}"].grad)
    with inlay.use(model, None), torch.no_grad():
        assert torch.equal(model(**batch).logits, twin(**batch).logits)


def test_no_full_matrix_is_kept() -> None:
    """For the backward pass, of the backbone only codes are there, and they are not copied."""
    torch.manual_seed(0)
    model = ZOO["llama"].build()
    inlay.attach(model, LoftQ(rank=2), where="mlp")
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    batch = inputs("llama")
    base = {p.data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**batch).logits.sum()
    wide = {tuple(m.weight.shape) for n, m in model.named_modules() if n.endswith(("gate_proj", "down_proj"))}
    wide |= {shape[::-1] for shape in wide}
    assert not [t.shape for t in kept if tuple(t.shape) in wide and t.data_ptr() not in base]


@pytest.fixture
def quantised(tmp_path: Path) -> Any:
    """A Llama in NF4 by bitsandbytes on the CPU, and the folder it comes from."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    # At least a block wide: bitsandbytes 0.50 dequantises narrower float32 matrices wrongly on the CPU.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=97, **sizes)).save_pretrained(tmp_path)
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    return AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=four, dtype=torch.float32)


def test_the_codes_of_a_quantised_base(quantised: Any, tmp_path: Path) -> None:
    """bits None: A and B are the best of the rest that the base's own codes leave out; nothing else is stored."""
    from safetensors.torch import load_file

    adapter = inlay.attach(quantised, LoftQ(rank=3, bits=None, alpha=6.0))
    found = adapter.tensors()
    assert {n.rsplit("/")[-1] for n in found} == {"a", "b", "errors"}
    weight = load_file(tmp_path / "model.safetensors")[f"{SITE}.weight"]
    piece = next(p for p in adapter.pieces if p.key == SITE)
    rest = weight - piece.site.read_weight()[0]  # type: ignore[union-attr]
    u, s, vh = torch.linalg.svd(rest)
    close(2.0 * found[f"delta/{SITE}/b"] @ found[f"delta/{SITE}/a"], u[:, :3] @ torch.diag(s[:3]) @ vh[:3])
    told = adapter.method.account(found)["reconstruction"]
    assert all(layer["start"] < layer["plain"] < 0.2 for layer in told.values())


def test_two_bits_beside_a_quantised_base(quantised: Any, tmp_path: Path) -> None:
    """The files' weights decide, so base and store may differ: the same adapter as on the full base, and as exact."""
    from transformers import AutoModelForCausalLM

    full = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    method = LoftQ(rank=3, bits=2, iterations=2)
    ours, theirs = inlay.attach(quantised, method).tensors(), inlay.attach(full, method).tensors()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    batch = inputs("llama")
    with torch.no_grad():
        close(quantised(**batch).logits, full(**batch).logits)


def test_originals_that_are_gone_or_others(quantised: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = tmp_path / "model.safetensors"
    values = load_file(file)
    save_file({n: torch.randn_like(t) for n, t in values.items()}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="quantised from another weight"):
        inlay.attach(quantised, LoftQ(rank=2))
    file.unlink()
    with pytest.raises(UserError, match="no safetensors file"):
        inlay.attach(quantised, LoftQ(rank=2))
    assert not inlay.adapters(quantised)


def test_refusals() -> None:
    model = ZOO["llama"].build()
    for method, words in (
        (LoftQ(bits=None), "not quantised"),
        (LoftQ(rank=4000), "larger than a side"),
        (LoftQ(bits_pattern={"no.such": 2}), "fits none"),
    ):
        with pytest.raises(UserError, match=words):
            inlay.attach(model, method)
    with pytest.raises(UserError, match="expected 4 or 2"):
        LoftQ(bits=3)
    with pytest.raises(UserError, match="iterations is -1"):
        LoftQ(iterations=-1)


def test_inspect_tells_the_errors(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from inlay.cli.main import app

    model = ZOO["llama"].build()
    inlay.attach(model, LoftQ(rank=2, bits=2, iterations=1), where=["q_proj"])
    inlay.save(model, "default", tmp_path)
    told = json.loads(CliRunner().invoke(app, ["inspect", str(tmp_path), "--json"]).stdout)
    layers = told["reconstruction"]
    assert SITE in layers and all(0 < layer["start"] < layer["plain"] < 1 for layer in layers.values())
