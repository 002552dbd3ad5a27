from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.cli.inspect import describe, inspect
from inlay.core.errors import AdapterFileError
from inlay.formats.describing import PEFT_METHODS
from inlay.formats.peft import FAMILIES
from inlay.methods import registry


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    inlay.attach(model, inlay.LoRA(rank=2), name="poems", where=["q_proj"], layers=[1])
    folder = tmp_path_factory.mktemp("adapter")
    inlay.save(model, "poems", folder)
    return folder


def test_facts(stored: Path) -> None:
    facts = describe(stored)
    assert (facts["name"], facts["method"], facts["where"], facts["layers"]) == (
        "poems",
        "lora",
        ["q_proj"],
        [1],
    )
    assert facts["hyper_parameters"]["rank"] == 2
    # One square matrix of 32: 2 · 32 · 2.
    assert facts["parameters"] == 128 and facts["types"] == ["F32"]
    assert facts["bytes"] == (stored / "adapter.safetensors").stat().st_size


def test_json_and_table(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(stored, as_json=True)
    assert json.loads(capsys.readouterr().out) == describe(stored)
    inspect(stored, tensors=True)
    shown = capsys.readouterr().out
    assert "poems" in shown and "lora" in shown and "2 × 32" in shown


PEFT = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8,
        "target_modules": ["q_proj"], "use_dora": False, "rank_pattern": {}, "peft_version": "0.21.2"}  # fmt: skip
LAYER = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


def peft_folder(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(PEFT | changes))
    save_file({f"{LAYER}A.weight": torch.ones(4, 8), f"{LAYER}B.weight": torch.ones(6, 4).half()},
              folder / "adapter_model.safetensors")  # fmt: skip
    return folder


def test_pefts_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = peft_folder(tmp_path / "lora")
    facts = describe(folder)
    assert (facts["format"], facts["method"], facts["kind"], facts["where"]) == ("peft", "lora", "LORA", ["q_proj"])
    assert facts["hyper_parameters"] == {"r": 4, "lora_alpha": 8, "use_dora": False}
    assert (facts["base_name"], facts["task"], facts["modules_to_save"]) == ("some/base", "CAUSAL_LM", [])
    assert facts["parameters"] == 4 * 8 + 6 * 4 and facts["types"] == ["F16", "F32"]
    assert facts["tensors"][f"{LAYER}B.weight"] == {"dtype": "F16", "shape": [6, 4]}
    assert facts["bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    inspect(folder, as_json=True)
    assert json.loads(capsys.readouterr().out) == facts
    inspect(folder, tensors=True)
    shown = capsys.readouterr().out
    assert "lora_alpha: 8" in shown and "some/base" in shown and "6 × 4" in shown
    assert describe(peft_folder(tmp_path / "dora", use_dora=True))["method"] == "dora"
    assert describe(peft_folder(tmp_path / "new", peft_type="NEWEST"))["method"] is None


def test_every_family_of_pefts_has_a_method_here() -> None:
    assert set(PEFT_METHODS) == set(FAMILIES) and set(PEFT_METHODS.values()) <= set(registry())


@pytest.mark.parametrize("config, method", [
    ({"architecture": None, "mh_adapter": False, "reduction_factor": 16}, "pfeiffer"),
    ({"mh_adapter": True}, "houlsby"),
    ({"is_parallel": True}, "parallel"),
    ({"architecture": "lora", "composition_mode": "scale"}, "ia3"),
    ({"architecture": "prefix_tuning"}, "prefix-tuning"),
    ({"architecture": "reft"}, None),
])  # fmt: skip
def test_adapterhubs_folders(config: dict[str, Any], method: str | None, tmp_path: Path) -> None:
    whole = {"config": config, "name": "sst", "model_name": "bert-base-uncased", "hidden_size": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(whole))
    save_file({"x.adapters.sst.adapter_down.0.weight": torch.ones(2, 8)}, tmp_path / "adapter.safetensors")
    facts = describe(tmp_path)
    assert (facts["format"], facts["name"], facts["method"]) == ("adapterhub", "sst", method)
    assert facts["base_name"] == "bert-base-uncased" and facts["parameters"] == 16


def test_single_files(tmp_path: Path) -> None:
    torch.save({"roberta.q.lora_A": torch.ones(8, 4), "roberta.q.lora_B": torch.ones(4, 8), "head.weight":
                torch.ones(3, 4).bfloat16()}, tmp_path / "mnli.bin")  # fmt: skip
    with pytest.raises(AdapterFileError, match="--allow-pickle"):
        describe(tmp_path / "mnli.bin")
    facts = describe(tmp_path / "mnli.bin", allow_pickle=True)
    assert (facts["format"], facts["kind"], facts["method"]) == ("tensors", "loralib", "lora")
    assert facts["hyper_parameters"] == {"rank": [8], "alpha": "not in the file"}
    assert facts["modules_to_save"] == ["head"] and facts["types"] == ["BF16", "F32"]
    save_file({"block.v.multi_lora_b": torch.ones(4, 1)}, tmp_path / "t.safetensors")
    assert describe(tmp_path / "t.safetensors")["method"] == "ia3"
    save_file({"block.v": torch.ones(4, 1)}, tmp_path / "other.safetensors")
    with pytest.raises(AdapterFileError, match="has neither"):
        describe(tmp_path / "other.safetensors")


def test_real_files(shared: Path) -> None:
    weights = shared / "weights"
    lora = describe(weights / "lora_roberta_base_mnli" / "roberta_base_lora_mnli.bin", allow_pickle=True)
    assert lora["kind"] == "loralib" and lora["hyper_parameters"]["rank"] == [8]
    assert (
        lora["parameters"] - sum(math.prod(t["shape"]) for n, t in lora["tensors"].items() if "lora_" not in n)
        == 294_912
    )
    ia3 = describe(weights / "ia3_t0_3b" / "t03b_ia3_finish.pt", allow_pickle=True)
    assert ia3["method"] == "ia3" and ia3["parameters"] == 540_672


def test_files_that_lie(tmp_path: Path, command: Callable[..., tuple[int, str, str]]) -> None:
    folder = peft_folder(tmp_path / "lora")
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    tensors = whole[8 + int.from_bytes(whole[:8], "little") :]

    def rewritten(**change: Any) -> bytes:
        raw = json.dumps(header | change).encode()
        return len(raw).to_bytes(8, "little") + raw + tensors

    one = header[f"{LAYER}A.weight"]
    lies = {
        "claims": (2**40).to_bytes(8, "little") + whole[8:],
        "cut short": whole[:-5],
        "a shape that its bytes do not hold": rewritten(**{f"{LAYER}A.weight": one | {"shape": [10**9, 8]}}),
        "overlapping": rewritten(extra=one),
        "nested": (lambda deep: len(deep).to_bytes(8, "little") + deep)(b"[" * 100_000),
    }
    for lie, written in lies.items():
        file.write_bytes(written)
        with pytest.raises(AdapterFileError, match="not a whole safetensors file"):
            describe(folder)
        code, out, error = command("inspect", folder)
        assert (code, out) == (2, "") and "Traceback" not in error, lie
    file.write_bytes(whole)
    for config in ("{", "[]", "[" * 100_000, '{"peft_type": "LORA", "x": "' + "y" * 2**24 + '"}'):
        (folder / "adapter_config.json").write_text(config)
        with pytest.raises(AdapterFileError):
            describe(folder)


def test_words_of_a_file_do_not_reach_the_terminal_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = peft_folder(tmp_path / "x", base_model_name_or_path="a\x1b[2Jb[bold]c", target_modules="\x9b31m")
    inspect(folder)
    shown = capsys.readouterr().out
    assert "\x1b[2J" not in shown and "\x9b" not in shown
    assert "a\\x1b[2Jb[bold]c" in shown


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"no adapter.safetensors"):
        describe(tmp_path)
