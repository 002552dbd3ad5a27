"""PEFT's files beyond the plain case: heads, embeddings, convolutions, tied layers; and everything that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from inlay.core.errors import AdapterFileError, AdapterNameError, ConfigError, OutputError, UnsupportedError, UserError
from inlay.methods import method_named
from inlay.testing.models import ZOO
from tests.formats.peft_hand import in_inlay, in_peft, logits, ours, same, theirs

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA of PEFT's on Llama."""
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    theirs("llama", config, tmp_path)
    return tmp_path


def edited(folder: Path, **changes: Any) -> Path:
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def refused(folder: Path, *said: str, name: str = "llama") -> str:
    """Loading fails with all of these words, and leaves the model as it was."""
    model = ZOO[name].build()
    modules = [id(m) for m in model.modules()]
    with pytest.raises(AdapterFileError) as error:
        inlay.load(model, folder)
    for words in said:
        assert words in str(error.value)
    assert [id(m) for m in model.modules()] == modules and not inlay.adapters(model)
    return str(error.value)


@pytest.mark.parametrize("name", ["bert", "llama-classifier", "roberta", "distilbert"])
def test_heads(name: str, tmp_path: Path) -> None:
    """PEFT saves a classifier by itself and lists names that the model need not have."""
    targets = {"llama-classifier": ["q_proj"], "distilbert": ["q_lin"]}.get(name, ["query"])
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="SEQ_CLS")
    expected, base = theirs(name, config, tmp_path / "theirs"), logits(name, ZOO[name].build())
    model = ZOO[name].build()
    adapter = inlay.load(model, tmp_path / "theirs")
    assert adapter.count_copied > 0
    same(logits(name, model), expected, base)
    inlay.save(model, "default", tmp_path / "ours", format="peft")
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["task_type"] == "SEQ_CLS"
    same(in_peft(name, tmp_path / "ours"), expected, base)


def test_a_head_that_is_not_saved_is_not_promised(tmp_path: Path) -> None:
    """PEFT's wrapper for classifiers fails on files without a head, so the task is left out there."""
    model, _ = ours("bert", inlay.LoRA(rank=2))
    inlay.save(model, "default", tmp_path, format="peft")
    assert json.loads((tmp_path / CONFIG).read_text())["task_type"] is None
    same(in_peft("bert", tmp_path), logits("bert", model), logits("bert", ZOO["bert"].build()))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_embeddings(name: str, tmp_path: Path) -> None:
    """An adapted embedding; PEFT stores the frozen one beside it. Qwen's is tied to the output head."""
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    expected, base = theirs(name, config, tmp_path / "theirs"), logits(name, ZOO[name].build())
    assert any("base_layer" in n for n in load_file(tmp_path / "theirs" / WEIGHTS))
    same(in_inlay(name, tmp_path / "theirs"), expected, base)
    model = ZOO[name].build()
    inlay.load(model, tmp_path / "theirs")
    inlay.save(model, "default", tmp_path / "ours", format="peft")
    same(in_peft(name, tmp_path / "ours"), expected, base)


def test_an_embedding_over_another_base(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    theirs("llama", config, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    frozen = next(n for n in tensors if n.endswith("embed_tokens.base_layer.weight"))
    save_file(tensors | {frozen: tensors[frozen] + 1}, tmp_path / WEIGHTS)
    refused(tmp_path, "trained over other values of model.embed_tokens")


def test_whole_embeddings(tmp_path: Path) -> None:
    """A trained embedding that is tied to the head: both are written, and read back as one."""
    model, adapter = ours("qwen3", inlay.LoRA(rank=2), modules_to_save=["embed_tokens"])
    assert adapter.modules_to_save == ("model.embed_tokens",)
    inlay.save(model, "default", tmp_path, format="peft")
    expected, base = logits("qwen3", model), logits("qwen3", ZOO["qwen3"].build())
    same(in_peft("qwen3", tmp_path), expected, base)
    same(in_inlay("qwen3", tmp_path), expected, base)
    edited(tmp_path, modules_to_save=["model.embed_tokens"])
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({n: t for n, t in tensors.items() if "lm_head" not in n}, tmp_path / WEIGHTS)
    refused(tmp_path, "is tied to lm_head", name="qwen3")


def test_a_resized_vocabulary(tmp_path: Path) -> None:
    """PEFT stores the whole embeddings then; the model must have been resized alike."""
    model = ZOO["llama"].build()
    entries = model.get_input_embeddings().weight.shape[0] + 3
    model.resize_token_embeddings(entries, mean_resizing=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    refused(tmp_path, f"call model.resize_token_embeddings({entries}) before loading")
    again = ZOO["llama"].build()
    again.resize_token_embeddings(entries, mean_resizing=False)
    assert set(inlay.load(again, tmp_path).modules_to_save) == {"model.embed_tokens", "lm_head"}
    assert (logits("llama", again) - logits("llama", adapted)).abs().max() < 1e-5


def test_convolutions(tmp_path: Path) -> None:
    model, _ = ours("sequential", inlay.LoRA(rank=2), where=["0", "3", "6"])
    inlay.save(model, "default", tmp_path, format="peft")
    batch = ZOO["sequential"].batch(3, 3)
    with torch.no_grad():
        expected = model(*batch.values())
        wrapped = peft.PeftModel.from_pretrained(ZOO["sequential"].build(), tmp_path).eval()
        again = ZOO["sequential"].build()
        inlay.load(again, tmp_path)
        assert (wrapped.base_model.model(*batch.values()) - expected).abs().max() < 1e-5
        assert torch.equal(again(*batch.values()), expected)


def test_several_factors_of_butterflies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT needs a CUDA extension for these; here its only kernel is replaced by PyTorch's block_diag."""
    from peft.tuners.boft import layer

    class Blocks:
        @staticmethod
        def apply(batch: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.block_diag(*factor) for factor in batch])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: object())
    monkeypatch.setattr(layer, "FastBlockDiag", Blocks)
    base = logits("llama", ZOO["llama"].build())
    model, _ = ours("llama", method_named("boft")(block_size=4, factors=3))
    inlay.save(model, "default", tmp_path / "ours", format="peft")
    same(in_peft("llama", tmp_path / "ours"), logits("llama", model), base)
    config = peft.BOFTConfig(
        boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    expected = theirs("llama", config, tmp_path / "theirs")
    same(in_inlay("llama", tmp_path / "theirs"), expected, base)


@pytest.mark.parametrize("key", ["houlsby", "bitfit", "full", "compacter"])
def test_methods_without_a_counterpart(key: str, tmp_path: Path) -> None:
    model, _ = ours("bert", method_named(key).examples()[0])
    with pytest.raises(UnsupportedError, match=f"method '{key}' has no counterpart in PEFT's format"):
        inlay.save(model, "default", tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="unknown format 'hf'"):
        inlay.save(model, "default", tmp_path / "out", format="hf")


def cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = next(iter(tensors))
    return {n: t for n, t in tensors.items() if n != first}


@pytest.mark.parametrize(
    "change, said",
    [
        ({"target_modules": ["q_proj", "v_prj"]}, "'v_prj' matches no module of this model"),
        ({"target_modules": "nothing.*"}, "matches no module of this model"),
        ({"target_modules": "(q_proj"}, "is not a regular expression"),
        ({"exclude_modules": ["k_prj"]}, "fit this model: exclude_modules: 'k_prj'"),  # said once
        ({"layers_to_transform": [0, 7]}, "no adapted layer has the number 7"),
        ({"rank_pattern": {"up_proj": 3}}, "rank_pattern: 'up_proj' fits none of the adapted modules"),
        ({"modules_to_save": ["clasifier"]}, "modules_to_save: 'clasifier' matches no module"),
        ({"r": 8}, "expected (8, 32)"),
        ({"r": "many"}, "r is 'many', expected a positive whole number"),
        ({"r": 10**12}, "expected (1000000000000, 32)"),
        ({"r": 10**15}, "expected a positive whole number"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "DoRA on a moved base has no counterpart"),
        ({"init_lora_weights": "loftq", "use_dora": True}, "DoRA on a moved base has no counterpart"),
        ({"a_new_key": 3}, "a_new_key is 3"),
        ({"peft_type": "XLORA"}, "peft_type 'XLORA' has no counterpart"),
        ({"use_dora": True}, "lora_magnitude_vector is missing"),
    ],
)
def test_configurations_that_do_not_fit(lora: Path, change: dict[str, Any], said: str) -> None:
    refused(edited(lora, **change), said)


@pytest.mark.parametrize(
    "change, said",
    [
        (cut, ["is missing"]),
        (lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}, ["nothing here takes it"]),
        (lambda t: {n: v[..., :3].contiguous() for n, v in t.items()}, ["(8 problems)", "has shape (4, 3)"]),
        (lambda t: {n.replace("base_model.", "", 1): v for n, v in t.items()}, ["(16 problems)"]),
    ],
)
def test_tensors_that_do_not_fit(lora: Path, change: Callable[..., Any], said: list[str]) -> None:
    save_file(change(load_file(lora / WEIGHTS)), lora / WEIGHTS)
    refused(lora, *said)


def test_every_problem_is_in_one_error(lora: Path) -> None:
    save_file(cut(load_file(lora / WEIGHTS)), lora / WEIGHTS)
    refused(edited(lora, bias="all", a_new_key=3), "(3 problems)", "bias is 'all'", "a_new_key is 3", "is missing")


def test_another_base(lora: Path) -> None:
    """Other names and shapes; what PEFT loads without a word."""
    refused(lora, "'q_proj' matches no module", name="bert")


def test_damaged_files(lora: Path) -> None:
    whole = (lora / WEIGHTS).read_bytes()
    for damaged in (whole[:-9], whole[:5], b"", (2**40).to_bytes(8, "little") + whole[8:], whole + b"more"):
        (lora / WEIGHTS).write_bytes(damaged)
        refused(lora, "not a whole safetensors file")
    (lora / WEIGHTS).unlink()
    refused(lora, "none of adapter_model.safetensors")
    for damaged in (b"", b"[1]", b"{", b"\xff\xfe"):
        (lora / CONFIG).write_bytes(damaged)
        refused(lora, CONFIG)
    with pytest.raises(AdapterFileError, match="no such file or folder"):
        inlay.load(ZOO["llama"].build(), lora / "absent")


def test_a_pickle_is_read_only_on_request(lora: Path) -> None:
    expected = in_inlay("llama", lora)
    torch.save(load_file(lora / WEIGHTS), lora / "adapter_model.bin")
    (lora / WEIGHTS).unlink()
    refused(lora, "pickle", "--allow-pickle")
    assert torch.equal(in_inlay("llama", lora, allow_pickle=True), expected)


def test_our_own_file_is_recognised_beside_others(lora: Path) -> None:
    """A folder that both libraries wrote to: ours has a digest and a fingerprint, so it is the one that is read."""
    model, adapter = ours("llama", inlay.IA3())
    inlay.save(model, "default", lora)
    again = ZOO["llama"].build()
    assert inlay.load(again, lora).digest == adapter.digest


class Named(torch.nn.Module):
    """One layer's name is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.ModuleDict({"proj": torch.nn.Linear(8, 8)})
        self.proj = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self.proj(self.inner["proj"](x).tanh())
        return made


def test_a_pattern_for_one_module_alone(tmp_path: Path) -> None:
    """The scale of `proj` is not that of `inner.proj`, whose name ends like it."""
    config = peft.LoraConfig(r=2, target_modules=["proj"], alpha_pattern={"^proj": 64}, init_lora_weights=False)
    wrapped, x = peft.get_peft_model(Named(), config), torch.randn(3, 8)
    wrapped.save_pretrained(tmp_path)
    model = Named()
    inlay.load(model, tmp_path)
    torch.testing.assert_close(model(x), wrapped.eval()(x), atol=1e-5, rtol=1e-5)


def test_an_older_adapter_of_ours_is_not_read_in_the_place_of_a_new_one(tmp_path: Path) -> None:
    """One folder may hold an adapter in both formats, but not two adapters."""
    model, adapter = ours("llama", inlay.IA3())
    inlay.save(model, "default", tmp_path)
    inlay.save(model, "default", tmp_path, format="peft")
    there = sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir())
    with torch.no_grad():
        next(adapter.parameters()).add_(1)
    with pytest.raises(OutputError, match="with other values, which would be loaded instead of it"):
        inlay.save(model, "default", tmp_path, format="peft")
    assert sorted((p.name, p.read_bytes()) for p in tmp_path.iterdir()) == there


ODD = [None, True, -1, 1e300, float("nan"), "(", ["x"], [1], {"x": 1}, {"q_proj": "x"}, [[1, 2]]]


@pytest.mark.parametrize("config", ["lora", "ia3", "adalora", "oft", "prefix"])
def test_odd_values_never_crash(config: str, tmp_path: Path) -> None:
    """Any value under any key: the adapter loads, or one error says why not; never anything else."""
    targets = {"target_modules": r".*\.1\..*q_proj", "task_type": "CAUSAL_LM"}
    made = {
        "lora": lambda: peft.LoraConfig(r=2, **targets),
        "ia3": lambda: peft.IA3Config(feedforward_modules=[], **targets),
        "adalora": lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, **targets),
        "oft": lambda: peft.OFTConfig(oft_block_size=8, **targets),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    }[config]()
    theirs("llama", made, tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    model = ZOO["llama"].build()
    for key in values:
        for odd in ODD:
            (tmp_path / CONFIG).write_text(json.dumps(values | {key: odd}))
            try:
                inlay.load(model, tmp_path)
            except UserError as error:
                assert not inlay.adapters(model), (key, odd, error)
            else:
                inlay.detach(model, "default")


def test_a_name_that_is_taken(lora: Path) -> None:
    model = ZOO["llama"].build()
    inlay.load(model, lora)
    with pytest.raises(AdapterNameError, match="already on this model"):
        inlay.load(model, lora)
    assert set(inlay.adapters(model)) == {"default"}
    assert inlay.load(model, lora, name="second", trainable=True).trainable
