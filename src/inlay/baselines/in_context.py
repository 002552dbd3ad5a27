"""In-context learning: solved examples in front of every question; nothing is trained.

Brown et al. 2020, "Language Models are Few-Shot Learners", arXiv:2005.14165.

    instruction  demonstration_k … demonstration_1  question ▶ answer

The best demonstration stands last, next to the question. If not all fit into the context, the worst ones are left out;
none is cut, and the number left out is reported. A label is chosen by its likelihood, in nats per token (or nats, with
`length_normalised=false`); a text is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from inlay.baselines.baseline import Baseline, Fitted, Rows
from inlay.baselines.embedding import embed
from inlay.baselines.selecting import Strategy, fixed, nearest
from inlay.core.errors import ConfigError, DataError, problems
from inlay.data import IGNORED, Layout, Prompt, Task, origins, prompts
from inlay.data.joining import Joiner
from inlay.data.prompting import source_ids
from inlay.evaluate.generate import context_size, generate_texts
from inlay.evaluate.labels import check_labels, label_tokens
from inlay.evaluate.likelihood import Likelihood, likelihood, rank_labels
from inlay.evaluate.run import Prediction

_SPARE_TOKENS = 16  # beyond the longest reference


@dataclass(frozen=True, kw_only=True)
class InContext(Baseline):
    """Demonstrations in the prompt.

    Attributes:
        k: largest number of demonstrations.
        strategy: random, balanced, nearest, longest or first (`selecting.py`).
        instruction: text in front of everything.
        between: text between instruction, demonstrations and question.
        length_normalised: compare labels by nats per token.
    """

    name: ClassVar[str] = "in-context"
    paper: ClassVar[str] = "arXiv:2005.14165"

    k: int = 8
    strategy: Strategy = "random"
    instruction: str = ""
    between: str = "\n\n"
    length_normalised: bool = True

    def __post_init__(self) -> None:
        self.require((self.k >= 0, f"k is {self.k}, expected 0 or more"))

    def task(self, layout: Layout, asked: Task | None, source: str) -> Task:
        return language_task(self.name, layout, asked, source)

    def fit(self, rows: Rows) -> Fitted:
        if self.k == 0:
            return Fitted()
        pool = _asked(rows)
        if self.strategy != "nearest":
            chosen = [pool[n] for n in fixed(self.strategy, pool, self.k, rows.seed, rows.labels)]
            return Fitted(facts={"demonstrations": _stored(chosen)})
        return Fitted(facts={"demonstrations": _stored(pool)}, tensors={"embeddings": _embedded(rows, pool)})

    def predict(self, fitted: Fitted, rows: Rows) -> tuple[list[Prediction], dict[str, Any]]:
        asked = _asked(rows)
        if rows.layout.kind == "classification":
            return self._ranked(fitted, rows, asked)
        references: dict[str, list[str]] = {}
        for question in asked:
            references.setdefault(question.text, []).append(question.reference)
        distinct = list({question.text: question for question in asked}.values())
        room = rows.max_new_tokens or _longest(rows, asked) + _SPARE_TOKENS
        ids, facts = self._written(fitted, rows, distinct, [room] * len(distinct))
        texts = generate_texts(
            rows.model,
            rows.tokenizer,
            ids,
            max_new_tokens=room,
            num_beams=rows.num_beams,
            batch_size=rows.batch_size,
            progress=rows.stage("texts", len(ids)),
        )
        both = zip(distinct, texts, strict=True)
        return [Prediction(prompt=q.text, prediction=t, references=list(references[q.text])) for q, t in both], facts

    def likelihood(self, fitted: Fitted, rows: Rows) -> tuple[Likelihood, dict[str, Any]]:
        asked = _asked(rows)
        tails = label_tokens(rows.tokenizer, [q.reference for q in asked], rows.task, rows.template)
        ids, facts = self._written(fitted, rows, asked, [len(tail) for tail in tails])
        scored: list[dict[str, list[int]]] = []
        for prompt, tail in zip(ids, tails, strict=True):
            if rows.task == "seq2seq":
                scored.append({"input_ids": prompt, "labels": tail})
            else:
                scored.append({"input_ids": prompt + tail, "labels": [IGNORED] * len(prompt) + tail})
        stage = rows.stage("likelihood", len(scored))
        return likelihood(rows.model, rows.tokenizer, scored, batch_size=rows.batch_size, progress=stage), facts

    def _ranked(self, fitted: Fitted, rows: Rows, asked: list[Prompt]) -> tuple[list[Prediction], dict[str, Any]]:
        assert rows.labels is not None
        check_labels([q.reference for q in asked], origins(rows.dataset), rows.labels)
        candidates = label_tokens(rows.tokenizer, rows.labels, rows.task, rows.template)
        ids, facts = self._written(fitted, rows, asked, [max(map(len, candidates))] * len(asked))
        chosen = rank_labels(
            rows.model,
            rows.tokenizer,
            ids,
            candidates,
            length_normalised=self.length_normalised,
            batch_size=rows.batch_size,
            progress=rows.stage("candidates", len(ids) * len(candidates)),
        )
        both = zip(asked, chosen, strict=True)
        return [Prediction(prompt=q.text, prediction=rows.labels[n], references=[q.reference]) for q, n in both], facts

    def _written(
        self, fitted: Fitted, rows: Rows, asked: Sequence[Prompt], reserved: Sequence[int]
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """Each question with its demonstrations as tokens; `reserved` tokens of the context are left for the answer."""
        pool = [(str(d["prompt"]), str(d["reference"])) for d in fitted.facts.get("demonstrations", ())]
        chosen = [list(range(len(pool)))] * len(asked)
        if "embeddings" in fitted.tensors:
            chosen = nearest(fitted.tensors["embeddings"], _embedded(rows, asked), self.k)
        limit = _limit(rows)
        joiner = Joiner(rows.tokenizer)
        joint = rows.template.separator if rows.task == "seq2seq" else ""  # in decoders the prompt ends with it
        found, used, wrong = [], [], []
        for question, places, answer in zip(asked, chosen, reserved, strict=True):
            shown = [f"{pool[n][0]}{joint}{pool[n][1]}" for n in places]
            room = limit - (0 if rows.task == "seq2seq" else answer)
            ids = self._tokens(question, shown, rows, joiner)
            while len(ids) > room and shown:
                shown.pop()
                ids = self._tokens(question, shown, rows, joiner)
            if len(ids) > room:
                wrong.append(f"a prompt of {len(ids)} tokens leaves no room for {answer} more in {limit}")
            found.append(ids)
            used.append(len(shown))
        if wrong:
            raise DataError(problems("prompts are too long even without demonstrations; shorten them", wrong[:10]))
        wanted = min(self.k, len(pool))
        fewer = sum(n < wanted for n in used)
        facts = {"wanted": wanted, "mean": sum(used) / len(used), "fewest": min(used), "rows_with_fewer": fewer}
        return found, {"demonstrations": facts}

    def _tokens(self, question: Prompt, shown: Sequence[str], rows: Rows, joiner: Joiner) -> list[int]:
        before = [self.instruction] if self.instruction else []
        text = self.between.join([*before, *reversed(shown), question.text])
        return source_ids(text, rows.tokenizer) if rows.task == "seq2seq" else joiner.lead + joiner.plain([text])[0]


def language_task(name: str, layout: Layout, asked: Task | None, source: str) -> Task:
    """The task of a base that answers with text."""
    from inlay.train.loading import read_config

    if layout.kind not in ("classification", "completion"):
        raise ConfigError(
            f"method {name!r} compares answers, and {layout.kind} data has none; give completions or labels"
        )
    if asked in ("regression", "classification"):
        raise ConfigError(f"method {name!r} answers with text; leave --task out, or give causal or seq2seq")
    encoder_decoder = bool(getattr(read_config(source), "is_encoder_decoder", False))
    return asked or ("seq2seq" if encoder_decoder else "causal")


def _asked(rows: Rows) -> list[Prompt]:
    return prompts(rows.dataset, rows.layout, rows.tokenizer, task=rows.task, template=rows.template)


def _stored(chosen: Sequence[Prompt]) -> list[dict[str, str]]:
    return [{"prompt": prompt.text, "reference": prompt.reference} for prompt in chosen]


def _embedded(rows: Rows, asked: Sequence[Prompt]) -> Any:
    # Longer texts are cut for this comparison only.
    cut = [{"input_ids": prompt.input_ids[: _limit(rows)]} for prompt in asked]
    stage = rows.stage("embeddings", len(cut))
    return embed(rows.model, rows.tokenizer, cut, "mean", batch_size=rows.batch_size, progress=stage)


def _limit(rows: Rows) -> int:
    size = context_size(rows.model)
    return rows.max_length if size is None else min(size, rows.max_length)


def _longest(rows: Rows, asked: Sequence[Prompt]) -> int:
    references = rows.tokenizer([prompt.reference for prompt in asked], verbose=False)["input_ids"]
    return max(map(len, references)) + 1
