"""`inlay plan` from a configuration alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaConfig

from inlay.machine.precision import half_of

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config.json and nothing else."""
    folder = tmp_path_factory.mktemp("config")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaConfig(
        **sizes, vocab_size=256, max_position_embeddings=512, architectures=["LlamaForCausalLM"]
    ).save_pretrained(folder)
    return folder


def test_plans_as_json(config: Path, command: Command) -> None:
    code, out, _ = command("plan", "--base", config, "--method", "lora,bitfit", "--gpu", "RTX 4090", "--json")
    assert code == 0
    told = json.loads(out)
    (plan,) = told["plans"]
    memory = plan["memory_bytes"]
    assert plan["method"] == "lora" and plan["trainable"] > 0 and plan["tokens_per_second"] > 0
    assert memory["total"] == pytest.approx(sum(v for k, v in memory.items() if k != "total"), abs=8)
    assert "biases" in told["refused"]["bitfit"]


def test_a_table(config: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    words = ("--method", "lora", "--set", "rank=2", "--batch-size", 2, "--max-length", 16, "--gpu", "T4")
    code, out, _ = command("plan", "--base", config, *words)
    assert code == 0 and "activations" in out and "lora" in out and "T4" in out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--gpu", "T4"), "fp16"),
        (("--gpu", "RTX 4090"), "bf16"),
        (("--gpu", "T4", "--precision", "fp32"), "fp32"),
        (("--gpu", "V100", "--quantize", "nf4"), "fp16"),
    ],
)
def test_weights_in_what_the_gpu_computes(
    config: Path, command: Command, tmp_path: Path, words: tuple[str, ...], expected: str
) -> None:
    """A base stored in bfloat16, planned for what training would make of it there."""
    values = json.loads((config / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**values, "dtype": "bfloat16"}), encoding="utf-8")
    plain = ("--method", "lora", "--batch-size", 2, "--max-length", 16)
    code, out, _ = command("plan", "--base", tmp_path, *plain, *words, "--json")
    assert code == 0 and json.loads(out)["plans"][0]["setting"]["precision"] == expected
    code, out, _ = command("plan", "--base", tmp_path, *plain, *words)
    assert code == 0 and out.startswith(f"precision: {expected} (")


def test_search(config: Path, command: Command, tmp_path: Path) -> None:
    chart = tmp_path / "plan.html"
    words = ("--memory", "24GiB", "--gpu", "RTX 4090", "--max-length", 64, "--batch-size", 2, "--plot", chart)
    code, out, _ = command("plan", "--base", config, *words, "--json")
    assert code == 0
    settings = json.loads(out)["settings"]
    assert {row["fits"]["setting"]["quantisation"] for row in settings} == {None, "nf4"}
    page = chart.read_text(encoding="utf-8")
    assert "activations" in page and "<script src=" not in page.lower()


def test_what_is_not_said_is_as_in_training(config: Path, command: Command, tmp_path: Path) -> None:
    """What the device computes, and beside quantised weights a low-rank method at every linear layer."""
    facts = json.loads((config / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(facts | {"dtype": "float16"}))
    few, fixed = ("--batch-size", 1, "--max-length", 16, "--json"), ("--method", "lora", "--base", tmp_path)

    def plans(*words: object) -> list[dict[str, object]]:
        told = json.loads(command("plan", *fixed, *few, *words)[1])
        return told["plans"] if "plans" in told else [s["fits"] for s in told["settings"]]

    def precisions(*words: object) -> dict[object, object]:
        return {p["setting"]["quantisation"]: p["setting"]["precision"] for p in plans(*words)}  # type: ignore[index]

    assert precisions() == {None: half_of("cpu") or "fp32"} and precisions("--gpu", "T4") == {None: "fp16"}
    searched = plans("--memory", "gpu", "--gpu", "T4")
    assert precisions("--memory", "gpu", "--gpu", "T4") == {None: "fp16", "nf4": "fp16"}
    trained = {p["setting"]["quantisation"]: p["trainable"] for p in searched}  # type: ignore[index]
    (everywhere,), (quantised,) = plans("--where", "all-linear"), plans("--quantize", "int8")
    assert trained["nf4"] == quantised["trainable"] == everywhere["trainable"] != trained[None]


@pytest.mark.parametrize(
    "words, message",
    [
        (("--memory", "lots"), "is not an amount"),
        (("--memory", "0GiB"), "is nothing"),
        (("--gpu", "RTX 9999"), "unknown GPU"),
        (("--gpu", "T4", "--device", "cpu"), "exclude each other"),
        (("--device", "abacus"), "device 'abacus' is unknown"),
        (("--precision", "bf61"), "did you mean 'bf16'"),
        (("--quantize", "nf5"), "did you mean 'nf4'"),
        (("--method", "lorra", "--gpu", "T4"), "lora"),
        (("--set", "rank=2", "--gpu", "T4"), "--set is for one method"),
        (("--max-length", 4096, "--gpu", "T4"), "Give at most 512"),
        (("--method", "bitfit", "--gpu", "T4"), "biases"),
        (("--memory", "1KiB", "--gpu", "T4"), "needs more than --memory"),
        (("--plot", "plan.png"), "plan.html"),
        (("--task", "poetry"), "known: causal"),
    ],
)
def test_mistakes(config: Path, command: Command, words: tuple[object, ...], message: str) -> None:
    code, out, error = command("plan", "--base", config, *words)
    assert (code, out) == (2, "") and message in error and "Traceback" not in error


BIG = {
    "LLaMA-65B": ("RTX A6000", 64, 512, "48GiB"),
    "Llama-2-13B": ("RTX 4080", 16, 1024, "16GB"),
}


@pytest.mark.parametrize("name", BIG)
def test_big_models_on_one_card(name: str, command: Command, tmp_path: Path) -> None:
    """The field's claims, by command: 65 billion with QLoRA on 48 GB, 13 billion on 16 GB; in 16 bits neither."""
    from tests.unit.plan.configurations import config_of

    gpu, rank, length, memory = BIG[name]
    config_of(name).save_pretrained(tmp_path)
    words = ("--base", tmp_path, "--method", "lora", "--set", f"rank={rank}", "--where", "all-linear", "--gpu", gpu)
    words += ("--batch-size", 1, "--max-length", length, "--gradient-checkpointing", "--memory", memory)
    code, out, error = command("plan", *words, "--json")
    assert code == 0, error
    settings = {(r["fits"] or r["beyond"])["setting"]["quantisation"]: r for r in json.loads(out)["settings"]}
    assert settings.keys() == {None, "nf4"} and settings[None]["fits"] is None
    fits = settings["nf4"]["fits"]
    assert fits is not None and fits["base_parameters"] > 12 * 10**9


def test_no_configuration(command: Command, tmp_path: Path) -> None:
    code, _, error = command("plan", "--base", tmp_path, "--gpu", "T4")
    assert code == 2 and "no config.json" in error
    code, _, error = command("plan", "--base", "./nowhere", "--gpu", "T4")
    assert code == 2 and "no such folder" in error
    (tmp_path / "config.json").write_text("{")
    code, _, error = command("plan", "--base", tmp_path, "--gpu", "T4")
    assert code == 2 and "cannot be read" in error


def test_a_chart_without_plotly(config: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "plotly" else found(name, *a))
    code, _, error = command("plan", "--base", config, "--plot", "plan.html")
    assert code == 2 and "pip install plotly" in error
