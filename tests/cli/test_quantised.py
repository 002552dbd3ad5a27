"""`--quantize` from training to a merged folder, with real commands on a tiny base; and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import inlay
from inlay.core.model.layer import read_weight, store_of
from inlay.train import load_base, read_record
from tests import tiny

Command = Callable[..., tuple[int, str, str]]
LINEARS = 14  # of two layers


def _base(folder: Path, width: int) -> Path:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = LlamaConfig(**sizes, vocab_size=320, max_position_embeddings=tiny.CONTEXT, **tokens)
    return tiny._saved(LlamaForCausalLM(config), folder)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 64 numbers, as 4-bit blocks need on a CPU."""
    return _base(tmp_path_factory.mktemp("base") / "wide", 64)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def trained(wide: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a quantisation, made once."""
    from inlay.cli.main import main

    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            out = made[name] = tmp_path_factory.mktemp("run") / name
            words = ["train", "--base", wide, "--data", rows, "--out", out, "--quantize", name, "--steps", 6]
            words += ["--learning-rate", 0.02, "--eval-share", 0, "--set", "rank=2"]
            with redirect_stdout(StringIO()), pytest.raises(SystemExit) as ended:
                main([str(word) for word in words])
            assert not ended.value.code
        return made[name]

    return run


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_training(trained: Callable[[str], Path], wide: Path, name: str) -> None:
    """The base is quantised, every linear layer of its blocks has an adapter, and the loss falls."""
    run = trained(name)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 6 and losses[-1] < losses[0]
    record = read_record(run / "adapter")
    assert record is not None and record.quantize == name
    assert len([key for key in load_file(run / "adapter" / "adapter.safetensors") if key.endswith("/a")]) == LINEARS
    model = load_base(wide, quantize=name).model
    assert sum(store_of(m) is not None for m in model.modules()) == LINEARS
    assert "quantize: " + name in (run / "run.yaml").read_text()


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.tensor([[3, 4, 5, 6]])).logits
    return found.float()


def _adapted(base: Path, adapter: Path, name: str) -> torch.Tensor:
    model = load_base(base, quantize=name).model.eval()
    inlay.load(model, adapter)
    return _logits(model)


def test_merging_makes_a_dense_folder(
    trained: Callable[[str], Path], wide: Path, command: Command, tmp_path: Path
) -> None:
    """Of the dequantised weights: plain transformers computes with it what the adapted base did."""
    adapter = trained("nf4") / "adapter"
    code, out, error = command("merge", "--base", wide, "--adapter", adapter, "--out", tmp_path / "merged", "--json")
    assert code == 0, error
    told = json.loads(out)
    assert told["layers"] == LINEARS and 0 <= told["largest_rounding_error"] < 0.02
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not any(store_of(m) is not None for m in model.modules())
    expected = _adapted(wide, adapter, "nf4")
    assert float((_logits(model) - expected).norm() / expected.norm()) < 0.03  # of bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8"])
def test_merging_requantised(
    trained: Callable[[str], Path], wide: Path, command: Command, tmp_path: Path, name: str
) -> None:
    """The folder is quantised, transformers reads it back, and what the rounding cost is said."""
    adapter = trained(name) / "adapter"
    words = ("--base", wide, "--adapter", adapter, "--out", tmp_path / "merged", "--requantize", "--json")
    code, out, error = command("merge", *words)
    assert code == 0, error
    told = json.loads(out)
    assert len(told["shares_lost"]) == LINEARS and told["largest_share_of_the_change_lost"] > 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    layers = {path: m for path, m in model.named_modules() if store_of(m) is not None}
    assert len(layers) == LINEARS and {store_of(m).name for m in layers.values()} == {name}  # type: ignore[union-attr]
    dense, base = load_base(wide, quantize=name).model, load_base(wide, quantize=name).model
    inlay.load(dense, adapter, name="tuned")
    inlay.merge(dense, "tuned")
    for path, layer in layers.items():
        exact, kept = (read_weight(m.get_submodule(path))[0].float() for m in (dense, base))
        rounding = (read_weight(layer)[0].float() - exact).norm()
        assert rounding < 0.2 * exact.norm()
        assert float(rounding / (exact - kept).norm()) == pytest.approx(told["shares_lost"][path], rel=0.1)


def test_an_adapter_says_what_it_was_trained_on(
    trained: Callable[[str], Path], wide: Path, rows: Path, command: Command
) -> None:
    """Evaluation quantises the base as in training, unless it is told otherwise."""
    words = (
        "--base",
        wide,
        "--adapter",
        trained("nf4") / "adapter",
        "--data",
        rows,
        "--json",
        "--metrics",
        "perplexity",
    )
    found = {}
    for name in (None, "nf4", "none"):
        code, out, error = command("evaluate", *words, *(() if name is None else ("--quantize", name)))
        assert code == 0, error
        found[name] = json.loads(out)["metrics"]
    assert found[None] == found["nf4"] != found["none"]


def test_a_plan_for_quantised_weights(wide: Path, command: Command) -> None:
    words = ("--base", wide, "--device", "cpu", "--method", "lora", "--batch-size", 1, "--max-length", 16, "--json")
    needed = {}
    for name in ("none", "int8", "nf4", "fp4"):
        code, out, error = command("plan", *words, "--quantize", name)
        assert code == 0, error
        needed[name] = json.loads(out)["plans"][0]["memory_bytes"]["weights"]
    assert needed["none"] > needed["int8"] > needed["nf4"] == needed["fp4"]
    code, out, error = command("plan", *words, "--quantize", "nf4", "--memory", "64GiB")
    assert code == 0, error
    told = json.loads(out)["settings"]
    assert told and all(row["fits"]["setting"]["quantisation"] == "nf4" for row in told)


MISTAKES: list[tuple[tuple[object, ...], str]] = [
    (("--quantize", "nf5"), "quantize is 'nf5': input should be 'nf4', 'fp4', 'int8'"),
    (("--quantize", "nf4", "--method", "full"), "is quantised (nf4) and cannot be changed in small steps"),
    (("--quantize", "nf4", "--method", "top-layers"), "Load the base without quantisation"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[" ".join(map(str, case[0])) for case in MISTAKES])
def test_mistakes_in_training(
    wide: Path, rows: Path, command: Command, tmp_path: Path, words: tuple[object, ...], message: str
) -> None:
    code, out, error = command("train", "--base", wide, "--data", rows, "--out", tmp_path / "run", "--steps", 2, *words)
    assert (code, out) == (2, "") and error.count("error:") == 1, error
    assert message in error and "Traceback" not in error and not (tmp_path / "run").exists()


def test_rows_that_the_library_computes_wrongly(rows: Path, command: Command, tmp_path: Path) -> None:
    """bitsandbytes on a CPU: blocks of 64 do not divide rows of 96."""
    from inlay.bases.bitsandbytes import exact

    if exact(96, "nf4", 64):
        pytest.skip("this bitsandbytes computes them right")
    base = _base(tmp_path / "narrow", 96)
    words = ("--base", base, "--data", rows, "--out", tmp_path / "run", "--steps", 2)
    code, out, error = command("train", *words, "--quantize", "nf4")
    assert (code, out) == (2, "") and "rows of these lengths wrongly" in error and "(96)" in error
    assert "Use int8" in error and not (tmp_path / "run").exists()


def test_a_base_without_safetensors(wide: Path, rows: Path, command: Command, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "base"
    shutil.copytree(wide, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    words = ("--base", folder, "--data", rows, "--out", tmp_path / "run", "--quantize", "nf4", "--steps", 2)
    code, _, error = command("train", *words)
    assert code == 2 and "safetensors" in error and "Traceback" not in error


def test_mistakes_in_merging(trained: Callable[[str], Path], wide: Path, command: Command, tmp_path: Path) -> None:
    words = ("--base", wide, "--adapter", trained("nf4") / "adapter", "--out", tmp_path / "merged")
    for more, message in (
        (("--quantize", "none", "--requantize"), "--requantize: the base is not quantised"),
        (("--quantize", "nf5"), "is unknown; known: nf4"),
    ):
        code, out, error = command("merge", *words, *more)
        assert (code, out) == (2, "") and message in error and "Traceback" not in error
        assert not (tmp_path / "merged").exists()
