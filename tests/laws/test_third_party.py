"""README's method in a package of its own, registered by entry point, gets everything the built-in ones get."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.recipe import readme_method

LAWS = """
import inlay
from inlay.testing import check_method
from inlay.testing.models import ZOO

check_method(inlay.methods()["scale-shift"], [ZOO[name] for name in ("llama", "gpt2", "bert", "t5")])
"""
COMPILED = """
import inlay
from inlay.testing import SLOW_LAWS
from inlay.testing.models import ZOO

SLOW_LAWS["compiling"](ZOO["llama"], inlay.methods()["scale-shift"]())
"""
LIFE = """
import torch
import inlay
from inlay.testing.models import ZOO

torch.manual_seed(0)
llama, method = ZOO["llama"], inlay.methods()["scale-shift"]
model, batch = llama.build(), llama.batch(4, 0, ragged=True)


def logits(choice, rows=batch):
    with inlay.use(model, choice), torch.no_grad():
        return model(**rows).logits


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


base = model(**batch).logits.detach()
mine = inlay.attach(model, method(), name="mine")
prefix = inlay.attach(model, inlay.PrefixTuning(length=3), name="prefix")
with torch.no_grad():
    for parameter in [*mine.parameters(), *prefix.parameters()]:
        parameter.add_(torch.randn(parameter.shape) * 0.3)

# one batch, one adapter a row
choices = ["mine", None, "prefix", "mine"]
mixed, alone = logits(choices), {choice: logits(choice) for choice in choices}
assert (alone["mine"] - base).abs().max() > 0.05
for row, choice in enumerate(choices):
    real = batch["attention_mask"][row].bool()
    same(mixed[row][real], alone[choice][row][real])

# merged and back
report = inlay.merge(model, "mine")
same(model(**batch).logits.detach(), alone["mine"])
inlay.unmerge(model)
assert torch.equal(logits(None), base) and report.worst < 1e-5

# stored and loaded, in one process and by the command line
inlay.save(model, "mine", "stored")
other = llama.build()
again = inlay.load(other, "stored")
assert again.method == method() and again.digest == mine.digest
assert torch.equal(other(**batch).logits, alone["mine"])

# detached
inlay.detach(model, "mine")
inlay.detach(model, "prefix")
assert torch.equal(model(**batch).logits, base)
"""
CONFIG = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip

PLANNED = "plan --method lora,scale-shift --gpu T4 --max-length 16 --base base"
COMMANDS = {"inspect": "inspect stored", "methods": "methods", "plan": PLANNED}
# What the process with the package does: one after another, because each process imports torch and transformers.
PROCESS = """
import contextlib, io, json, sys, traceback

from inlay.cli.main import main

programs, commands = json.load(sys.stdin)
told = {}
for name, program in programs.items():
    try:
        exec(program, {})
    except BaseException:
        told[name] = traceback.format_exc()
for name, words in commands.items():
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            main([*words.split(), "--json"])
    except SystemExit as ended:
        told[name] = json.loads(out.getvalue()) if not ended.code else f"exit code {ended.code}"
    except BaseException:
        told[name] = traceback.format_exc()
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of a process that has the package ``ssf`` installed, one module and its metadata: what commands print, and of
    programs that fail the traceback."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "ssf.py").write_text(readme_method(), encoding="utf-8")
    metadata = folder / "ssf-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: ssf\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[inlay.methods]\nscale-shift = ssf:ScaleShift\n")
    (folder / "base").mkdir()
    (folder / "base" / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **CONFIG})
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    asked = json.dumps([{"laws": LAWS, "compiled": COMPILED, "life": LIFE}, COMMANDS])
    done = subprocess.run(
        [sys.executable, "-c", PROCESS], env=environment, cwd=folder, input=asked, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_all_laws(told: dict[str, Any]) -> None:
    assert "laws" not in told, told["laws"]


def test_it_compiles(told: dict[str, Any]) -> None:
    assert "compiled" not in told, told["compiled"]


def test_attaching_mixed_batches_merging_and_storage(told: dict[str, Any]) -> None:
    assert "life" not in told, told["life"]
    facts = told["inspect"]
    assert (facts["method"], facts["hyper_parameters"]) == ("scale-shift", {"shift": True})


def test_a_row_in_the_methods_table(told: dict[str, Any]) -> None:
    rows = {row["method"]: row for row in told["methods"]["methods"]}
    assert rows["scale-shift"]["merges"] and rows["scale-shift"]["mixed_batches"]
    assert rows["scale-shift"]["trained"] > 0
    assert rows["scale-shift"]["quantised_bases"]["nf4"] is True


def test_a_row_of_the_plan(told: dict[str, Any]) -> None:
    assert told["plan"]["refused"] == {}
    plan = {row["method"]: row for row in told["plan"]["plans"]}["scale-shift"]
    # gains of 32 queries and 16 values in two layers; without biases in this base nothing is shifted
    assert plan["trainable"] == 2 * (32 + 16)
    assert plan["memory_bytes"]["optimizer"] == 8 * plan["trainable"] and plan["disk_bytes"] == 4 * plan["trainable"]
    assert plan["tokens_per_second"] > 0
