"""Every command from end to end, on a tiny random base."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import inlay

Command = Callable[..., tuple[int, str, str]]
Make = Callable[..., Path]


def document(answer: tuple[int, str, str]) -> Any:
    """The JSON on standard output of a command that went well and said nothing else."""
    code, out, err = answer
    assert code == 0, err
    return json.loads(out)


def test_evaluate_likelihood_and_answers(command: Command, base: Path, rows: Path, tmp_path: Path) -> None:
    names = "loss,perplexity,bits_per_byte,exact_match,bleu,rougeL"
    file = tmp_path / "answers.jsonl"
    words = ("evaluate", "--base", base, "--data", rows, "--metrics", names, "--predictions", file)
    found = document(command(*words, "--max-new-tokens", 4, "--json"))
    assert (found["kind"], found["task"], found["rows"], found["adapter"]) == ("completion", "causal", 5, None)
    assert list(found["metrics"]) == names.split(",")
    assert found["metrics"]["perplexity"] == pytest.approx(math.exp(found["metrics"]["loss"]))
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["references"] for row in answers] == [["sat", "slept"], ["ran"], ["flew off"], ["y"]]
    code, out, _ = command(*words[:-2], "--max-new-tokens", 4)
    assert code == 0 and "bits a byte" in out and "exact_match" in out


def test_evaluate_answers_some_prompts_unasked(command: Command, base: Path, rows: Path, tmp_path: Path) -> None:
    """Rows of prompt and completion show how often the answer is right, over how many prompts, and can do without."""
    words = ("evaluate", "--base", base, "--data", rows, "--max-new-tokens", 2)
    found = document(command(*words, "--json"))
    assert list(found["metrics"]) == ["loss", "perplexity", "exact_match"]
    assert found["answered"] == {"prompts": 4, "of": 4}
    assert document(command(*words, "--answers", 2, "--json"))["answered"] == {"prompts": 2, "of": 4}
    code, out, _ = command(*words, "--answers", 1)
    assert code == 0 and "exact_match: of the answers to 1 of 4 prompts" in out
    found = document(command(*words, "--answers", 0, "--json"))
    assert list(found["metrics"]) == ["loss", "perplexity"] and found["answered"] is None
    code, _, err = command(*words, "--answers", 0, "--metrics", "loss,bleu")
    assert code == 2 and "nothing to compare for bleu" in err
    file = tmp_path / "answers.jsonl"
    assert command(*words, "--predictions", file)[0] == 0 and len(file.read_text().splitlines()) == 4


def test_evaluate_asks_as_training_did(command: Command, base: Path, rows: Path, make_adapter: Make) -> None:
    plain = make_adapter(inlay.LoRA(rank=2))
    told = make_adapter(inlay.LoRA(rank=2), separator=" => ", prompt_template="Say: {prompt}")
    losses = {}
    for name, words in {
        "base": ("--base", base),
        "plain": ("--base", base, "--adapter", plain),
        # The base is the recorded one.
        "told": ("--adapter", told),
    }.items():
        found = document(command("evaluate", "--data", rows, *words, "--json"))
        losses[name] = found["metrics"]["loss"]
        assert found["base"] == str(base)
    assert len(set(losses.values())) == 3


def test_evaluate_reads_and_cuts_as_it_is_told(command: Command, base: Path, tmp_path: Path) -> None:
    """What the messages about such files advise can be said."""
    table = tmp_path / "long.tsv"
    table.write_text("a cat\tsat\n" + "a dog " * 200 + "\tran\n")
    words = ("evaluate", "--base", base, "--data", table, "--reading", "header=prompt,completion")
    code, _, err = command(*words)
    assert code == 2 and "row 2" in err and "on_long: truncate" in err
    assert document(command(*words, "--on-long", "truncate", "--json"))["rows"] == 2
    assert command(*words, "--on-long", "drop")[0] == 2


def test_evaluate_other_columns_and_bad_input(command: Command, base: Path, rows: Path, tmp_path: Path) -> None:
    table = tmp_path / "other.csv"
    table.write_text("question,answer\na,b\n")
    words = ("evaluate", "--base", base, "--data", table)
    assert document(command(*words, "--columns", "prompt=question,completion=answer", "--json"))["rows"] == 1
    assert command(*words)[0] == 2
    code, out, err = command("evaluate", "--base", base, "--data", rows, "--metrics", "bluu,accuracy")
    assert code == 2 and out == "" and "did you mean 'bleu'" in err and "'accuracy' is not for" in err
    words = ("evaluate", "--base", base, "--data", rows, "--predictions", tmp_path / "p.jsonl")
    code, _, err = command(*words, "--metrics", "loss")
    assert code == 2 and "--metrics exact_match" in err and not (tmp_path / "p.jsonl").exists()
    code, _, err = command("evaluate", "--base", base, "--data", tmp_path / "none.jsonl")
    assert code == 2 and "none.jsonl" in err and "Traceback" not in err


def test_labels_without_a_head(command: Command, base: Path, tmp_path: Path) -> None:
    data = tmp_path / "labelled.jsonl"
    data.write_text('{"text": "good", "label": "yes"}\n{"text": "bad", "label": "no"}\n')
    found = document(command("evaluate", "--base", base, "--data", data, "--json"))
    assert (found["task"], set(found["metrics"])) == ("causal", {"accuracy", "macro_f1", "matthews"})
    words = ("evaluate", "--base", base, "--data", data, "--task", "classification")
    code, _, err = command(*words)
    assert code == 2 and "no trained score" in err


def test_generate_one_adapter_a_prompt_in_one_batch(command: Command, base: Path, make_adapter: Make) -> None:
    low, prefix = make_adapter(inlay.LoRA(rank=2)), make_adapter(inlay.PrefixTuning(length=3), seed=2)
    words = ("generate", "--base", base, "--max-new-tokens", 6, "--json")
    mixed = document(command(*words, "--adapter", low, "--adapter", "none", "--adapter", prefix, "abc", "de", "f"))
    assert [row["adapter"] for row in mixed] == [str(low), None, str(prefix)]
    alone = [
        document(command(*words, "--adapter", row["adapter"] or "none", row["prompt"]))[0]["text"] for row in mixed
    ]
    assert [row["text"] for row in mixed] == alone
    code, _, err = command(*words, "--adapter", low, "--adapter", prefix, "a", "b", "c")
    assert code == 2 and "2 adapters for 3 prompts" in err


def test_generate_prints_one_text_alone(command: Command, base: Path) -> None:
    code, out, err = command("generate", "--base", base, "--max-new-tokens", 3, "abc")
    (row,) = document(command("generate", "--base", base, "--max-new-tokens", 3, "abc", "--json"))
    assert (code, out, err) == (0, row["text"] + "\n", "precision: fp32 (as the base is stored)\n")


def test_generate_writes_prompts_as_training_did(base: Path, make_adapter: Make) -> None:
    from inlay.cli.models import load_adapted, prompt_tokens

    made = {
        "chat": make_adapter(inlay.LoRA(rank=2), kind="chat"),
        "completion": make_adapter(inlay.LoRA(rank=2), separator="=>", prompt_template="Q {prompt}"),
        "text": make_adapter(inlay.LoRA(rank=2), kind="text"),
    }
    loaded = load_adapted(None, [str(folder) for folder in made.values()])

    def asked(kind: str | None, **rest: Any) -> str:
        folder = None if kind is None else str(made[kind])
        return str(loaded.tokenizer.decode(prompt_tokens(loaded, "hi", folder, **rest)))

    assert (asked("chat"), asked("chat", chat=False)) == ("<user>hi<assistant>", "hi")
    assert (asked("completion"), asked("text"), asked(None)) == ("Q hi=>", "hi", "hi")
    assert asked(None, chat=True) == "<user>hi<assistant>"


def test_a_labelling_adapter_does_not_write(command: Command, base: Path, make_adapter: Make) -> None:
    folder = make_adapter(inlay.LoRA(rank=2), task="classification", labels=["no", "yes"])
    code, _, err = command("generate", "--adapter", folder, "abc")
    assert code == 2 and "labels texts" in err


def test_adapters_that_disagree_are_refused(command: Command, base: Path, make_adapter: Make) -> None:
    folders = [make_adapter(inlay.LoRA(rank=2), base=name) for name in (str(base), "elsewhere")]
    code, _, err = command("generate", "--adapter", folders[0], "--adapter", folders[1], "a", "b")
    assert code == 2 and "different bases" in err and "elsewhere" in err


@torch.no_grad()
def test_merge_makes_a_base_that_answers_the_same(
    command: Command, base: Path, rows: Path, make_adapter: Make, tmp_path: Path
) -> None:
    adapter, out = make_adapter(inlay.LoRA(rank=2)), tmp_path / "merged"
    facts = document(command("merge", "--base", base, "--adapter", adapter, "--out", out, "--json"))
    assert facts["out"] == str(out) and facts["layers"] == len(facts["rounding_errors"]) == 4
    score = ("evaluate", "--data", rows, "--json")
    merged = document(command(*score, "--base", out))
    attached = document(command(*score, "--base", base, "--adapter", adapter))
    assert merged["metrics"] == pytest.approx(attached["metrics"], rel=1e-5)
    code, _, err = command("merge", "--base", base, "--adapter", adapter, "--out", out)
    assert code == 2 and "already in use" in err


def test_merge_refuses_what_has_no_weights(command: Command, base: Path, make_adapter: Make, tmp_path: Path) -> None:
    adapter = make_adapter(inlay.PrefixTuning(length=3))
    code, _, err = command("merge", "--base", base, "--adapter", adapter, "--out", tmp_path / "merged")
    assert code == 2 and "no weights to merge" in err and not (tmp_path / "merged").exists()


def test_methods_counts_what_attaching_gives(command: Command, base: Path) -> None:
    from transformers import AutoModelForCausalLM

    found = {row["method"]: row for row in document(command("methods", "--base", base, "--json"))["methods"]}
    assert set(found) == {*inlay.methods(), "features", "in-context", "prompt-text"}
    for name, row in found.items():
        if "unsupported" in row:
            continue
        if name not in inlay.methods():
            assert (row["family"], row["trained"], row["merges"]) == ("baseline", 0, False)
            continue
        if inlay.methods()[name].needs_data:
            continue  # how many it trains where depends on the data
        model = AutoModelForCausalLM.from_pretrained(base)
        assert row["trained"] == inlay.attach(model, inlay.methods()[name]()).count
    assert found["lora"]["merges"] and not found["prefix-tuning"]["merges"]
    assert found["lora"]["mixed_batches"] and not found["full"]["mixed_batches"]


def test_methods_are_readable_in_80_columns(command: Command, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No name is broken, in the table nor among the hyper-parameters below it, and no column is missing."""
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = command("methods", "--base", base)
    table, _, settings = out.partition("Hyper-parameters")
    cells = [line.split("│")[1:3] for line in table.splitlines() if line.startswith("│")]
    families = {cls.family for cls in inlay.methods().values()}
    assert code == 0 and "without" not in table
    assert [method.strip() for method, _ in cells] == [*inlay.methods(), "features", "in-context", "prompt-text"]
    assert {family.strip() for _, family in cells} == families
    assert max(map(len, settings.splitlines())) <= 80
    assert all(f"│ {name} " in settings for name in inlay.methods())


def test_an_adapter_of_another_base(command: Command, make_adapter: Make, base: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model.model.norm.weight.mul_(2.0)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    code, _, err = command("generate", "--base", tmp_path, "--adapter", make_adapter(inlay.LoRA(rank=2)), "a")
    assert code == 2 and "another base" in err and "Traceback" not in err
