"""The README.md beside an adapter: what it is, how it was made, how it is used."""

from __future__ import annotations

from typing import Any

from inlay.core.contracts.method import Method
from inlay.formats.provenance import shown
from inlay.train.config import RunConfig
from inlay.train.record import TrainingRecord

_HYPER = (
    "epochs", "steps", "batch_size", "accumulate", "learning_rate", "schedule", "warmup", "weight_decay", "optimizer",
    "max_grad_norm", "max_length", "on_long", "precision", "gradient_checkpointing", "early_stopping", "seed",
)  # fmt: skip
_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
}


def card(
    config: RunConfig,
    method: Method,
    record: TrainingRecord,
    facts: dict[str, Any],
    metrics: dict[str, float],
) -> str:
    """The card's text.

    Args:
        config: resolved.
        facts: ``rows, eval_rows, trainable, base_parameters, steps, seconds``.
        metrics: scores of the adapter that is kept.
    """
    base = shown(config.base) if config.base else "embedded"
    published = config.base == base  # it is a hub id, not a folder of this machine
    share = 100 * facts["trainable"] / max(facts["base_parameters"], 1)
    hyper = {name: getattr(config, name) for name in _HYPER if getattr(config, name) not in (None, False)}
    return "\n".join(
        [
            "---",
            "library_name: inlay",
            *([f"base_model: {base}"] if published else []),
            f"tags: [inlay, {method.name}, {record.task}]",
            "---",
            "",
            f"# {config.name}: {method.name} for {record.task}",
            "",
            f"An adapter made by inlay: {type(method).__name__} ({method.paper}), "
            f"{facts['trainable']:,} trained parameters ({share:.2f} % of the base's {facts['base_parameters']:,}).",
            "",
            table(
                ("", ""),
                [
                    ("Base", f"`{base}`"),
                    ("Data", f"`{shown(config.data)}` ({facts['rows']:,} rows)"),
                    *_held(config, facts),
                ],
            ),
            "",
            "## Results",
            "",
            table(
                ("score", "value"),
                [(name.replace("_", " "), f"{value:.4f}") for name, value in metrics.items()],
            ),
            "",
            f"After {facts['steps']:,} steps and {facts['seconds']:,.0f} s.",
            "",
            "## Method",
            "",
            table(
                ("hyper-parameter", "value"),
                [(k, f"`{v}`") for k, v in method.to_dict().items() if k != "method"],
            ),
            "",
            f"Places: {_places(config)}.",
            "",
            "## Training",
            "",
            table(("option", "value"), [(name, f"`{value}`") for name, value in hyper.items()]),
            "",
            "Versions: " + ", ".join(f"{name} {version}" for name, version in record.versions.items()) + ".",
            "",
            "## Use",
            "",
            *_use(record, None if config.base is None else base if published else f"path/to/{base}"),
            "",
        ]
    )


def _held(config: RunConfig, facts: dict[str, Any]) -> list[tuple[str, str]]:
    if not facts["eval_rows"]:
        return []
    source = f"`{shown(config.eval_data)}`" if config.eval_data else "held out of the data"
    return [("Evaluated on", f"{source} ({facts['eval_rows']:,} rows)")]


def _places(config: RunConfig) -> str:
    where = "the method's own" if config.where is None else f"`{config.where}`"
    layers = "" if config.layers is None else f", layers `{config.layers}`"
    heads = f"; trained whole: `{', '.join(config.modules_to_save)}`" if config.modules_to_save else ""
    return where + layers + heads


def _use(record: TrainingRecord, base: str | None) -> list[str]:
    words = "" if base is None else f"--base {base} "
    verb = "generate" if record.task in ("causal", "seq2seq") else "evaluate"
    rest = '"..."' if verb == "generate" else "--data rows.jsonl"
    labels = "" if record.labels is None or record.task != "classification" else f", num_labels={len(record.labels)}"
    labels = ", num_labels=1" if record.task == "regression" else labels
    path = "inlay.assets.base_path()" if base is None else repr(base)
    return [
        "```console",
        f"$ inlay {verb} {words}--adapter . {rest}",
        "```",
        "",
        "```python",
        "import inlay",
        *(["import inlay.assets"] if base is None else []),
        f"from transformers import {_CLASSES[record.task]}",
        "",
        f"model = {_CLASSES[record.task]}.from_pretrained({path}{labels})",
        'inlay.load(model, ".")',
        "```",
    ]


def table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    """A Markdown table of two columns."""
    return "\n".join([f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)])
