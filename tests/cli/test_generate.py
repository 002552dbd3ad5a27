from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import inlay
from inlay.cli.generate import paired
from inlay.core.errors import ConfigError

Command = Callable[..., tuple[int, str, str]]


def test_pairs_of_prompts_and_adapters() -> None:
    assert paired(["a", "b"], []) == (["a", "b"], [None, None])
    assert paired(["a", "b"], ["x"]) == (["a", "b"], ["x", "x"])
    assert paired(["a", "b"], ["x", "none"]) == (["a", "b"], ["x", None])
    assert paired(["a"], ["x", "y", "none"]) == (["a", "a", "a"], ["x", "y", None])


def test_counts_that_do_not_fit() -> None:
    with pytest.raises(ConfigError, match="2 adapters for 3 prompts"):
        paired(["a", "b", "c"], ["x", "y"])


def test_another_librarys_adapter_says_its_base(
    base: Path, make_adapter: Callable[..., Path], rows: Path, command: Command, tmp_path: Path
) -> None:
    """PEFT's folder names the base's; where that is not here, `--base` is asked for."""
    native, theirs = make_adapter(inlay.LoRA(rank=2)), tmp_path / "peft"
    code, _, error = command("convert", native, theirs, "--to", "peft", "--base", base)
    assert code == 0, error
    path = theirs / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["base_model_name_or_path"] == str(base)
    words = ("generate", "a cat", "--max-new-tokens", 4, "--json", "--adapter")
    expected = json.loads(command(*words, native, "--base", base)[1])[0]["text"]
    assert json.loads(command(*words, theirs)[1])[0]["text"] == expected
    code, out, error = command("evaluate", "--data", rows, "--adapter", theirs, "--metrics", "loss", "--json")
    assert code == 0 and json.loads(out)["base"] == str(base), error
    for named, said in (("org/model", "names the base 'org/model', which is no folder here"), (None, "does not say")):
        path.write_text(json.dumps(config | {"base_model_name_or_path": named}))
        for asked in ((*words, theirs), ("evaluate", "--data", rows, "--adapter", theirs)):
            code, out, error = command(*asked)
            assert (code, out) == (2, "") and said in error and "--base" in error
        assert json.loads(command(*words, theirs, "--base", base)[1])[0]["text"] == expected
