"""Methods inside a method, in a run's configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import inlay
from inlay import IA3, Average, LoRA, Stack

CONFIG = """
method: average
settings:
  methods:
    - {method: lora, rank: 2, rank_pattern: {q_proj: 3}}
    - {method: stack, methods: [{method: ia3}, {method: lora, rank: 4}]}
  weights: [0.5, 0.25]
"""


def test_nested_methods_are_trained_from_a_file(
    command: Callable[..., tuple[int, str, str]], base: Path, rows: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    config, out = tmp_path / "run.yaml", tmp_path / "out"
    config.write_text(f"data: {rows}\nbase: {base}\nout: {out}\nsteps: 1\neval_share: 0\n{CONFIG}")
    code, _, err = command("train", "--config", config)
    assert code == 0, err
    adapter = inlay.load(AutoModelForCausalLM.from_pretrained(base), out / "adapter")
    stack = Stack(IA3(), LoRA(rank=4))
    assert adapter.method == Average([(LoRA(rank=2, rank_pattern={"q_proj": 3}), 0.5), (stack, 0.25)])

    again = (out / "run.yaml").read_text().replace(str(out), str(tmp_path / "again"))
    config.write_text(again)  # what a run writes down starts the same run
    assert command("train", "--config", config)[0] == 0
    twin = inlay.load(AutoModelForCausalLM.from_pretrained(base), tmp_path / "again" / "adapter")
    assert twin.digest == adapter.digest

    config.write_text(again.replace("rank: 4", "rnak: 4").replace(str(tmp_path / "again"), str(tmp_path / "third")))
    code, _, err = command("train", "--config", config)
    assert code == 2 and "'rnak'; did you mean 'rank'" in err and "Traceback" not in err
