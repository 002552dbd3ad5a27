"""Files of loralib and t-few: published ones by shape and count, small ones by what they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import inlay
from inlay.core.errors import AdapterFileError, ConfigError
from inlay.testing.models import ZOO
from tests.formats.peft_hand import logits


def roberta() -> Any:
    """RoBERTa-base with a head for MNLI, without its weights."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    with torch.device("meta"):
        return RobertaForSequenceClassification(
            RobertaConfig(vocab_size=50_265, type_vocab_size=1, max_position_embeddings=514, num_labels=3)
        )


def t5_3b() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.device("meta"):
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=32_128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32,
                feed_forward_proj="gated-gelu", tie_word_embeddings=False,
            )
        )  # fmt: skip


def test_a_published_lora(shared: Path) -> None:
    path = shared / "weights/lora_roberta_base_mnli/roberta_base_lora_mnli.bin"
    model = roberta()
    with pytest.raises(AdapterFileError, match="pickle"):
        inlay.load(model, path, alpha=16)
    with pytest.raises(ConfigError, match="alpha"):
        inlay.load(model, path, allow_pickle=True)
    assert not inlay.adapters(model)
    adapter = inlay.load(model, path, allow_pickle=True, alpha=16)
    assert adapter.count == 294_912
    assert adapter.count_copied == 768 * 768 + 768 + 3 * 768 + 3
    assert adapter.modules_to_save == ("classifier.dense", "classifier.out_proj")
    assert adapter.method == inlay.LoRA(rank=8, alpha=16)
    assert len(adapter.pieces) == 24


def test_a_published_ia3(shared: Path) -> None:
    path = shared / "weights/ia3_t0_3b/t03b_ia3_finish.pt"
    adapter = inlay.load(t5_3b(), path, allow_pickle=True)
    assert adapter.count == 540_672
    assert len(adapter.pieces) == 192
    assert {type(p.delta).__name__ for p in adapter.pieces} == {"OutputDelta"}  # type: ignore[union-attr]


def test_a_published_lora_on_another_base(shared: Path) -> None:
    """A model of another width: every tensor is named, and nothing is attached."""
    model = ZOO["roberta"].build()
    with pytest.raises(AdapterFileError, match=r"\(\d+ problems\)") as said:
        inlay.load(
            model, shared / "weights/lora_roberta_base_mnli/roberta_base_lora_mnli.bin", allow_pickle=True, alpha=16
        )
    assert "layer.0.attention.self.query.lora_A has shape (8, 768), expected (8, 32)" in str(said.value)
    assert "layer.11.attention.self.value.lora_B is stored, but nothing here takes it" in str(said.value)
    assert not inlay.adapters(model)


def random(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


QUERIES = [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]


def with_weights(change: Callable[[dict[str, Tensor]], None]) -> Tensor:
    model = ZOO["bert"].build()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    change(state)
    model.load_state_dict(state)
    return logits("bert", model)


@pytest.mark.parametrize("ending", [".safetensors", ".pt"])
def test_what_lora_computes(ending: str, tmp_path: Path) -> None:
    """W + alpha / r · B A and a new head, by hand."""
    shapes = {f"{q}.lora_A": (2 + i, 32) for i, q in enumerate(QUERIES)}  # ranks that differ
    shapes |= {f"{q}.lora_B": (32, 2 + i) for i, q in enumerate(QUERIES)}
    tensors = random({**shapes, "classifier.weight": (5, 32), "classifier.bias": (5,)})
    path = tmp_path / f"lora{ending}"
    torch.save(tensors, path) if ending == ".pt" else save_file(tensors, path)

    def change(state: dict[str, Tensor]) -> None:
        for query in QUERIES:
            a, b = tensors[f"{query}.lora_A"], tensors[f"{query}.lora_B"]
            state[f"{query}.weight"] += 6.0 / a.shape[0] * b @ a
        state |= {n: tensors[n] for n in ("classifier.weight", "classifier.bias")}

    model = ZOO["bert"].build()
    inlay.load(model, path, allow_pickle=ending == ".pt", alpha=6.0)
    expected = with_weights(change)
    assert (logits("bert", model) - expected).abs().max() < 1e-5
    assert (logits("bert", ZOO["bert"].build()) - expected).abs().max() > 0.1


def test_what_rescaling_computes(tmp_path: Path) -> None:
    tensors = random({f"{q}.multi_lora_b": (32, 1) for q in QUERIES})
    save_file(tensors, tmp_path / "ia3.safetensors")

    def change(state: dict[str, Tensor]) -> None:
        for query in QUERIES:
            vector = tensors[f"{query}.multi_lora_b"]
            state[f"{query}.weight"] *= vector
            state[f"{query}.bias"] *= vector[:, 0]

    model = ZOO["bert"].build()
    inlay.load(model, tmp_path / "ia3.safetensors")
    assert (logits("bert", model) - with_weights(change)).abs().max() < 1e-5


def test_what_is_refused(tmp_path: Path) -> None:
    query = QUERIES[0]
    whole = {f"{query}.lora_A": (2, 32), f"{query}.lora_B": (32, 2)}
    cases = {
        "is missing": {f"{query}.lora_A": (2, 32)},
        "is stored, but nothing here takes it": whole | {"decoder.lora_A": (2, 32)},
        "only a part of": whole | {f"{query}.bias": (32,)},
        "which parts of it are adapted": {f"{query}.lora_A": (4, 32), f"{query}.lora_B": (32, 2)},
        "neither loralib's lora_A": {"classifier.weight": (3, 32)},
        "none of its layers is in this model": {"h.0.lora_A": (2, 32), "h.0.lora_B": (32, 2)},
    }
    for number, (said, shapes) in enumerate(cases.items()):
        save_file(random(shapes), tmp_path / f"{number}.safetensors")
        model = ZOO["bert"].build()
        with pytest.raises(AdapterFileError, match=said):
            inlay.load(model, tmp_path / f"{number}.safetensors", alpha=1)
        assert not inlay.adapters(model)


def test_a_pickle_that_is_more_than_tensors(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return (print, ("this must never run",))

    path = tmp_path / "bad.pt"
    for what in ({"a.lora_A": Code()}, [torch.zeros(2)], {"a.lora_A": 3}):
        torch.save(what, path)
        with pytest.raises(AdapterFileError):
            inlay.load(ZOO["bert"].build(), path, allow_pickle=True, alpha=1)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(AdapterFileError, match="not a whole PyTorch zip file"):
        inlay.load(ZOO["bert"].build(), path, allow_pickle=True, alpha=1)
