"""Evaluating a model on a data set: the metrics that suit the data, with one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from inlay.core.errors import ConfigError, nearest, problems
from inlay.data import Layout, OnLong, Task, Template, encode, labels_of, origins, prompts
from inlay.evaluate.generate import context_size, generate_texts
from inlay.evaluate.heads import head_outputs
from inlay.evaluate.labels import check_labels, label_tokens
from inlay.evaluate.likelihood import likelihood, rank_labels
from inlay.evaluate.metrics import METRICS, score
from inlay.evaluate.progress import Advance, Progress, counting

if TYPE_CHECKING:
    from datasets import Dataset

LIKELIHOOD = ("loss", "perplexity", "bits_per_byte")
DEFAULTS: dict[str, tuple[str, ...]] = {
    "completion": ("loss", "perplexity"),
    "chat": ("loss", "perplexity"),
    "classification": ("accuracy", "macro_f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "text": ("loss", "perplexity", "bits_per_byte"),
}
FEW, FEW_TOKENS = 64, 4096  # prompts that are answered for a first look, and tokens written for them all together
_SPARE_TOKENS = 16  # beyond the longest reference, to notice a model that does not stop
_UNSTATED_CONTEXT = 1024


class Prediction(TypedDict):
    """One answer, and the expected one."""

    prompt: str
    prediction: str | float
    references: list[str] | list[float]


class Evaluation(TypedDict):
    """What `evaluate` returns.

    Keys:
        rows: number of rows of the data set. Rows with the same prompt are one answer with several references.
        metrics: name → score, on the scales of `METRICS`; ``loss`` is in nats per token.
        predictions: in the order of the rows; empty if only the likelihood was asked for.
        answered: how many ``prompts`` a text was generated for, ``of`` how many; None if none was to be generated.
    """

    kind: str
    task: str
    rows: int
    metrics: dict[str, float]
    predictions: list[Prediction]
    answered: dict[str, int] | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to evaluate.

    Attributes:
        batch_size: rows at a time.
        max_length: most tokens of a row; None is the model's context.
        max_new_tokens: most tokens of a generated text; None is a little more than the longest reference.
        num_beams: number of beams; 1 is greedy search.
        label_names: the labels of the training data, in the order of the head's outputs.
        template: how training joined prompt and completion.
        on_long: what to do with rows above `max_length`; None splits plain text and refuses the rest.
        length_normalised: rank labels by nats per token instead of nats.
        sample: generate answers to so many prompts only, spread evenly over those that leave room in the context;
            ``few`` is at most `FEW`, and fewer where references are long. None answers all, and raises where one has
            no room.
    """

    batch_size: int = 8
    max_length: int | None = None
    max_new_tokens: int | None = None
    num_beams: int = 1
    label_names: Sequence[str] | None = None
    template: Template = field(default_factory=Template)
    on_long: OnLong | None = None
    length_normalised: bool = True
    sample: int | Literal["few"] | None = None


_DEFAULT = Settings()


def evaluate(
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    layout: Layout,
    task: Task,
    *,
    metrics: Sequence[str] | None = None,
    settings: Settings = _DEFAULT,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a model, with whatever adapter is active, on every row of a data set.

    Args:
        model: a transformers model with the head that `task` needs.
        dataset: from `read_table`.
        layout: from `resolve_columns`.
        task: for classification data and the task ``causal`` or ``seq2seq``, the answer is the label whose name is most
            probable after the prompt.
        metrics: names of metrics; None takes `DEFAULTS` for the kind of data. Metrics of texts (``exact_match``,
            ``bleu``, ``rougeL`` …) generate an answer to every prompt.
        progress: called after each batch.

    Raises:
        ConfigError: metrics that are unknown or do not suit the data.
        DataError: rows that cannot be used; one message lists all.
    """
    names = tuple(metrics) if metrics is not None else DEFAULTS[layout.kind]
    check_metrics(names, layout)
    run = _Run(model, tokenizer, dataset, layout, task, settings, progress)
    found: dict[str, float] = {}
    predictions: list[Prediction] = []
    answered: dict[str, int] | None = None
    if wanted := [name for name in names if name in LIKELIHOOD]:
        found |= run.likelihoods(wanted)
    compared = [name for name in names if name in METRICS]
    if compared:
        predictions, answered = run.predictions()
        answers, references = sides(predictions, layout)
        found |= score(compared, answers, references) if predictions else dict.fromkeys(compared, math.nan)
    return Evaluation(
        kind=layout.kind,
        task=task,
        rows=len(dataset),
        metrics={name: found[name] for name in names},
        predictions=predictions,
        answered=answered,
    )


def check_metrics(names: Sequence[str], layout: Layout) -> None:
    """Raise one `ConfigError` that lists every metric that does not suit the data."""
    kinds = {"classification": "label", "regression": "number", "text": None}
    kind = kinds.get(layout.kind, "text")
    fitting = [name for name, metric in METRICS.items() if metric.kind == kind]
    if layout.kind in ("completion", "chat", "text"):
        fitting = [*LIKELIHOOD, *fitting]
    wrong = []
    for name in names:
        if name not in METRICS and name not in LIKELIHOOD:
            wrong.append(f"no metric {name!r}{nearest(name, [*LIKELIHOOD, *METRICS])}")
        elif name not in fitting:
            wrong.append(f"{name!r} is not for {layout.kind} data; choose from {', '.join(fitting)}")
    if not names:
        wrong.append(f"no metric was given; choose from {', '.join(fitting)}")
    if wrong:
        raise ConfigError(problems("metrics", wrong))


@dataclass(frozen=True)
class _Run:
    """One evaluation: everything that its steps need."""

    model: Any
    tokenizer: Any
    dataset: Dataset
    layout: Layout
    task: Task
    settings: Settings
    progress: Progress | None

    def likelihoods(self, names: Sequence[str]) -> dict[str, float]:
        rows = self._encoded()
        found = likelihood(
            self.model,
            self.tokenizer,
            rows,
            batch_size=self.settings.batch_size,
            progress=self._stage("likelihood", len(rows)),
        )
        return {name: getattr(found, name) for name in names}

    def predictions(self) -> tuple[list[Prediction], dict[str, int] | None]:
        """In the order of the rows; and `Evaluation.answered`."""
        if self.task in ("classification", "regression"):
            return self._by_head(), None
        return (self._by_ranking(), None) if self.layout.kind == "classification" else self._by_generation()

    def _by_head(self) -> list[Prediction]:
        rows = self._encoded()
        texts = [str(text) for text in self.dataset[self.layout.column("text")]]
        logits = head_outputs(
            self.model,
            self.tokenizer,
            rows,
            batch_size=self.settings.batch_size,
            progress=self._stage("predictions", len(rows)),
        )
        if self.task == "regression":
            right = [float(row["labels"]) for row in rows]
            pairs = zip(texts, logits[:, 0].tolist(), right, strict=True)
            return [Prediction(prompt=t, prediction=p, references=[r]) for t, p, r in pairs]
        labels = self._labels()
        chosen = [labels[n] for n in logits.argmax(-1).tolist()]
        wanted = [labels[row["labels"]] for row in rows]
        return [
            Prediction(prompt=t, prediction=p, references=[r]) for t, p, r in zip(texts, chosen, wanted, strict=True)
        ]

    def _by_ranking(self) -> list[Prediction]:
        labels = self._labels()
        asked = self._prompts()
        check_labels([p.reference for p in asked], origins(self.dataset), labels)
        chosen = rank_labels(
            self.model,
            self.tokenizer,
            [p.input_ids for p in asked],
            label_tokens(self.tokenizer, labels, self.task, self.settings.template),
            length_normalised=self.settings.length_normalised,
            batch_size=self.settings.batch_size,
            progress=self._stage("candidates", len(asked) * len(labels)),
        )
        return [
            Prediction(prompt=p.text, prediction=labels[n], references=[p.reference])
            for p, n in zip(asked, chosen, strict=True)
        ]

    def _by_generation(self) -> tuple[list[Prediction], dict[str, int]]:
        groups: dict[str, list[str]] = {}
        ids: dict[str, list[int]] = {}
        for prompt in self._prompts():
            groups.setdefault(prompt.text, []).append(prompt.reference)
            ids[prompt.text] = prompt.input_ids
        asked = self._sampled(groups, ids)
        answered = {"prompts": len(asked), "of": len(ids)}
        if not asked:
            return [], answered
        written = generate_texts(
            self.model,
            self.tokenizer,
            [ids[text] for text in asked],
            max_new_tokens=self._room([ids[text] for text in asked], {text: groups[text] for text in asked}),
            num_beams=self.settings.num_beams,
            batch_size=self.settings.batch_size,
            progress=self._stage("texts", len(asked)),
        )
        return [
            Prediction(prompt=text, prediction=answer, references=groups[text])
            for text, answer in zip(asked, written, strict=True)
        ], answered

    def _sampled(self, groups: dict[str, list[str]], ids: dict[str, list[int]]) -> list[str]:
        """The prompts that are answered."""
        wanted = self.settings.sample
        if wanted is None:
            return list(ids)
        size = context_size(self.model)
        longest = self._longest([reference for group in groups.values() for reference in group])
        new = self.settings.max_new_tokens or longest
        taken = 0 if self.model.config.is_encoder_decoder else new
        fitting = [text for text, row in ids.items() if row and (size is None or len(row) + taken <= size)]
        if wanted == "few":
            wanted = min(FEW, max(1, FEW_TOKENS // new))
        count = min(wanted, len(fitting))
        return [fitting[place * len(fitting) // count] for place in range(count)]

    def _longest(self, references: Sequence[str]) -> int:
        """Tokens of the longest reference and its end."""
        return max(len(ids) for ids in self.tokenizer(list(references), verbose=False)["input_ids"]) + 1

    def _room(self, asked: Sequence[Sequence[int]], groups: dict[str, list[str]]) -> int:
        if self.settings.max_new_tokens is not None:
            return self.settings.max_new_tokens
        references = [reference for group in groups.values() for reference in group]
        longest = self._longest(references)
        size = context_size(self.model)
        if size is None or self.model.config.is_encoder_decoder:
            return longest + _SPARE_TOKENS
        # If not even the references fit, `generate_texts` says which prompts are too long.
        left = size - max(len(row) for row in asked)
        return min(longest + _SPARE_TOKENS, max(longest, left))

    def _encoded(self) -> list[dict[str, Any]]:
        on_long = self.settings.on_long or ("split" if self.layout.kind == "text" else "error")
        encoded = encode(
            self.dataset,
            self.layout,
            self.tokenizer,
            task=self.task,
            max_length=self.settings.max_length or context_size(self.model) or _UNSTATED_CONTEXT,
            label_names=self._labels() if self.task == "classification" else None,
            template=self.settings.template,
            on_long=on_long,
        )
        return list(encoded)

    def _prompts(self) -> list[Any]:
        return prompts(self.dataset, self.layout, self.tokenizer, task=self.task, template=self.settings.template)

    def _labels(self) -> list[str]:
        if self.settings.label_names is not None:
            return list(self.settings.label_names)
        return labels_of(self.dataset, self.layout)

    def _stage(self, stage: str, total: int) -> Advance | None:
        return counting(self.progress, stage, total)


def sides(predictions: Sequence[Prediction], layout: Layout) -> tuple[list[Any], list[Any]]:
    """Answers and references in the form that `metrics.score` takes for such data."""
    answers = [p["prediction"] for p in predictions]
    if layout.kind in ("classification", "regression"):
        return answers, [p["references"][0] for p in predictions]
    return answers, [p["references"] for p in predictions]
