"""Demonstrations in the context: which, in which order, how many fit, and what the model is then asked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from inlay.baselines.scoring import evaluate_folder
from inlay.baselines.selecting import fixed, nearest
from inlay.core.errors import ConfigError, DataError
from inlay.data import Prompt, read_table, resolve_columns

Fit = Callable[..., Any]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def few(path: Path, out: Path, count: int) -> Path:
    out.write_text("".join(json.dumps(row) + "\n" for row in rows_of(path)[:count]))
    return out


def demonstrations(result: Any) -> list[dict[str, str]]:
    found: list[dict[str, str]] = json.loads((result.adapter / "baseline.json").read_text())["facts"]["demonstrations"]
    return found


def nats(model: Any, prompt: list[int], answer: list[int]) -> float:
    """Summed over the answer, one row, no padding."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            output = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer]))
            return float(output.loss) * len(answer)
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    return -sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_labels_are_ranked_by_likelihood_after_the_demonstrations(
    fit: Fit, bases: dict[str, Path], labelled: Path, tmp_path: Path, name: str, normalised: bool
) -> None:
    settings = {"k": 2, "strategy": "first", "instruction": "Which?", "length_normalised": normalised}
    result = fit(name, labelled, "in-context", settings, eval_share=0)
    asked = few(labelled, tmp_path / "few.jsonl", 6)
    data = read_table(str(asked))
    scored = evaluate_folder(result.adapter, data, resolve_columns(data))
    tokenizer = AutoTokenizer.from_pretrained(bases[name])
    auto = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    model = auto.from_pretrained(bases[name]).eval()
    one, two = rows_of(labelled)[:2]
    before = f"Which?\n\n{two['text']}\n{two['label']}\n\n{one['text']}\n{one['label']}\n\n"  # the first one is nearest
    for row, prediction in zip(rows_of(asked), scored.evaluation["predictions"], strict=True):
        prompt = tokenizer(before + row["text"] + ("" if name == "t5" else "\n"))["input_ids"]
        scores = {}
        for label in ("cat", "dog", "neither"):
            answer = [*tokenizer(label)["input_ids"], tokenizer.eos_token_id]
            scores[label] = nats(model, prompt, answer) / (len(answer) if normalised else 1)
        assert prediction["prediction"] == min(scores, key=lambda label: scores[label])
        assert prediction["references"] == [row["label"]]
    assert scored.facts["demonstrations"] == {"wanted": 2, "mean": 2.0, "fewest": 2, "rows_with_fewer": 0}


def test_loss_of_completions_is_that_of_the_written_out_prompt(
    fit: Fit, bases: dict[str, Path], completions: Path, tmp_path: Path
) -> None:
    result = fit("llama", completions, "in-context", {"k": 1, "strategy": "first"}, eval_share=0)
    asked = few(completions, tmp_path / "few.jsonl", 5)
    data = read_table(str(asked))
    found = evaluate_folder(result.adapter, data, resolve_columns(data), metrics=["loss", "perplexity", "exact_match"],
                            max_new_tokens=3)  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(bases["llama"])
    model = AutoModelForCausalLM.from_pretrained(bases["llama"]).eval()
    one = rows_of(completions)[0]
    total, tokens = 0.0, 0
    for row in rows_of(asked):
        before = f"{one['prompt']}\n{one['completion']}\n\n{row['prompt']}\n"
        prompt = tokenizer(before)["input_ids"]
        answer = [*tokenizer(before + row["completion"])["input_ids"][len(prompt) :], tokenizer.eos_token_id]
        if len(prompt) + len(answer) > 96:  # the demonstration is left out
            prompt = tokenizer(f"{row['prompt']}\n")["input_ids"]
        total, tokens = total + nats(model, prompt, answer), tokens + len(answer)
    metrics = found.evaluation["metrics"]
    assert metrics["loss"] == pytest.approx(total / tokens, rel=1e-4)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    assert len(found.evaluation["predictions"]) == 5


def test_fewer_demonstrations_rather_than_cut_ones(fit: Fit, labelled: Path) -> None:
    result = fit("llama", labelled, "in-context", {"k": 40}, eval_share=0)
    assert len(demonstrations(result)) == 40
    data = read_table(str(labelled))
    facts = evaluate_folder(result.adapter, data, resolve_columns(data)).facts["demonstrations"]
    assert facts["rows_with_fewer"] == 60 and 0 < facts["fewest"] <= facts["mean"] < 40  # 96 tokens hold no 40
    with pytest.raises(DataError, match="too long even without demonstrations"):
        evaluate_folder(result.adapter, data, resolve_columns(data), max_length=6)


def test_the_most_wanted_demonstration_stays_longest(fit: Fit, labelled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from inlay.baselines import in_context

    result = fit("llama", labelled, "in-context", {"k": 12, "strategy": "first"}, eval_share=0)
    seen: list[list[str]] = []
    before = in_context.InContext._tokens

    def spy(self: Any, question: Prompt, shown: Any, rows: Any, joiner: Any) -> list[int]:
        seen.append(list(shown))
        return before(self, question, shown, rows, joiner)

    monkeypatch.setattr(in_context.InContext, "_tokens", spy)
    data = read_table(str(labelled))
    evaluate_folder(result.adapter, data, resolve_columns(data))
    wanted = [f"{d['prompt']}{d['reference']}" for d in demonstrations(result)]
    assert any(len(shown) < 12 for shown in seen)
    assert all(shown == wanted[: len(shown)] for shown in seen)


def test_balanced_takes_the_labels_in_turn(fit: Fit, labelled: Path) -> None:
    chosen = demonstrations(fit("llama", labelled, "in-context", {"k": 6, "strategy": "balanced"}, eval_share=0))
    assert [d["reference"] for d in chosen] == ["cat", "dog", "neither"] * 2
    again = [fit("llama", labelled, "in-context", {"k": 6}, seed=s, eval_share=0) for s in (0, 0, 1)]
    drawn = [demonstrations(run) for run in again]
    assert drawn[0] == drawn[1] != drawn[2]


def test_balanced_needs_labels(fit: Fit, completions: Path) -> None:
    with pytest.raises(ConfigError, match="strategy=balanced needs labels"):
        fit("llama", completions, "in-context", {"strategy": "balanced"})


def test_nearest_finds_the_very_row(fit: Fit, labelled: Path) -> None:
    """A question that is itself in the pool is its own nearest demonstration."""
    result = fit("llama", labelled, "in-context", {"k": 1, "strategy": "nearest"}, eval_share=0)
    assert len(demonstrations(result)) == 60
    from inlay.baselines import artefact, in_context

    stored = artefact.read(result.adapter)
    seen: list[list[str]] = []
    before = in_context.InContext._tokens

    def spy(self: Any, question: Prompt, shown: Any, rows: Any, joiner: Any) -> list[int]:
        seen.append([question.text, *shown])
        return before(self, question, shown, rows, joiner)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_context.InContext, "_tokens", spy)
        data = read_table(str(labelled))
        evaluate_folder(result.adapter, data, resolve_columns(data))
    assert all(shown.startswith(question) for question, shown in seen)
    assert stored.fitted.tensors["embeddings"].shape == (60, 16)


def test_strategies() -> None:
    rows = [Prompt(str(n), [0] * length, label) for n, (length, label) in enumerate([(3, "a"), (9, "b"), (5, "a")])]
    assert fixed("first", rows, 2, 0, None) == [0, 1]
    assert fixed("longest", rows, 2, 0, None) == [1, 2]
    assert sorted(fixed("random", rows, 9, 0, None)) == [0, 1, 2]
    assert [rows[n].reference for n in fixed("balanced", rows, 3, 0, ["a", "b"])] == ["a", "b", "a"]
    pool = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    assert nearest(pool, torch.tensor([[3.0, 0.1], [0.0, 1.0]]), 2) == [[0, 2], [1, 2]]


def test_prompt_text_is_in_context_without_demonstrations(fit: Fit, labelled: Path) -> None:
    words = {"instruction": "Is it a cat or a dog?"}
    both = [fit("llama", labelled, "prompt-text", words, eval_share=0.5),
            fit("llama", labelled, "in-context", {**words, "k": 0}, eval_share=0.5)]  # fmt: skip
    assert both[0].metrics == both[1].metrics and both[0].trainable == 0
    data = read_table(str(labelled))
    scored = [evaluate_folder(run.adapter, data, resolve_columns(data)).evaluation["predictions"] for run in both]
    assert scored[0] == scored[1]


@pytest.mark.parametrize(
    ("base", "method", "more", "words"),
    [
        ("llama", "in-context", {"task": "classification"}, "answers with text"),
        ("llama", "prompt-text", {"task": "regression"}, "compares answers"),
        ("bert", "in-context", {}, "lacks weights"),
    ],
)
def test_what_cannot_answer_is_refused(fit: Fit, labelled: Path, base: str, method: str, more: Any, words: str) -> None:
    from inlay.core.errors import UserError

    with pytest.raises(UserError, match=words):
        fit(base, labelled, method, **more)
