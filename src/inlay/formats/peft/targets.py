"""PEFT's words for places, resolved on a model; and our places in PEFT's words.

    target_modules       ends of module names, or one regex for the whole name, or "all-linear"
    exclude_modules      likewise; excluded
    layers_to_transform  numbers of layers, found after `layers_pattern`
    rank_pattern         {regex for the end of a name: value}; the first that fits wins

A word that matches nothing is an error here; PEFT ignores it silently.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from inlay.core.contracts.site_pattern import pinned
from inlay.core.model.view import ModelView
from inlay.formats.configuration import Config

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}  # what PEFT saves by itself for a task; it lists both names although a model has only one of them


def sites(config: Config, view: ModelView, stored: Collection[str]) -> list[str]:
    """Paths of the modules that a configuration adapts.

    Args:
        stored: the paths for which the file has tensors; they decide what the configuration leaves open.
    """
    wanted = config.get("target_modules")
    excluded, layers = config.get("exclude_modules"), config.get("layers_to_transform")
    pattern = config.get("layers_pattern")
    if not wanted:
        return sorted(stored)
    saved = set(saved_modules(config, view, note=False))
    paths = [p for p in view.modules if p and not any(p == s or p.startswith(s + ".") for s in saved)]
    if wanted == "all-linear":
        linear = [p for p, s in view.layers.items() if s.kind == "linear" and s.module is not view.output_head]
        found = [p for p in paths if p in linear]
    else:
        found = _matching(config, "target_modules", wanted, paths)
    if excluded:
        without = set(_matching(config, "exclude_modules", excluded, paths))
        found = [p for p in found if p not in without]
    if layers is not None and layers != [] and not isinstance(wanted, str):
        numbers = [layers] if isinstance(layers, int) else list(layers)
        found = [p for p in found if _layer(p, pattern) in numbers]
        absent = [n for n in numbers if n not in {_layer(p, pattern) for p in found}]
        if absent:
            config.wrong.append(f"layers_to_transform: no adapted layer has the number {', '.join(map(str, absent))}")
    return found


def _matching(config: Config, key: str, wanted: Any, paths: Sequence[str]) -> list[str]:
    if isinstance(wanted, str):
        try:
            found = [p for p in paths if re.fullmatch(wanted, p)]
        except re.error as error:
            config.wrong.append(f"{key}: {wanted!r} is not a regular expression ({error})")
            return []
        if not found:
            config.wrong.append(f"{key}: the pattern {wanted!r} matches no module of this model")
        return found
    missed = [w for w in wanted if not any(fits(p, w) for p in paths)]
    config.wrong += [f"{key}: {w!r} matches no module of this model" for w in sorted(missed)]
    return [p for p in paths if any(fits(p, w) for w in wanted)]


def fits(path: str, end: str) -> bool:
    return path == end or path.endswith("." + end)


def _layer(path: str, pattern: Any) -> int | None:
    """The number of the layer that `path` lies in, found as PEFT does."""
    if not pattern:
        found = re.match(r".*?\.[^.]*\.(?P<number>\d+)\.", path)
        return int(found["number"]) if found else None
    for word in [pattern] if isinstance(pattern, str) else pattern:
        found = re.match(rf"(?:^|.*?\.){word}\.(?P<number>\d+)\.", path)
        if found:
            return int(found["number"])
    return None


def by_pattern(config: Config, key: str, paths: Sequence[str], default: float) -> dict[str, Any]:
    """Path → value of a pattern such as `rank_pattern`, for our patterns; notes a problem for keys that fit no path."""
    pattern: Mapping[str, Any] = config.get(key, {})
    found: dict[str, Any] = {}
    used: set[str] = set()
    for path in paths:
        for word, value in pattern.items():
            if re.match(rf"(.*\.)?({word})$", path):
                used.add(word)
                found.setdefault(path, value)
    config.wrong += [
        f"{key}: {path} has {value!r}, expected a positive number"
        for path, value in found.items()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0
    ]
    config.wrong += [f"{key}: {w!r} fits none of the adapted modules" for w in pattern if w not in used]
    return pinned({path: found.get(path, default) for path in paths}, default)


def saved_modules(config: Config, view: ModelView, *, note: bool = True) -> list[str]:
    """Paths of `modules_to_save`; heads that PEFT adds to the list by itself may be absent."""
    words = config.get("modules_to_save", [])
    by_itself = HEADS.get(str(config.values.get("task_type")), ())
    found: list[str] = []
    for word in words:
        paths = [p for p in view.modules if p.endswith(word)]
        if not paths and word not in by_itself and note:
            config.wrong.append(f"modules_to_save: {word!r} matches no module of this model")
        found += [p for p in paths if p not in found]
    return [p for p in found if not any(p.startswith(f + ".") for f in found)]


def words_for(view: ModelView, paths: Sequence[str]) -> list[str]:
    """The shortest ends of names that match exactly `paths`, or the paths themselves."""
    everything = [p for p in view.modules if p]
    for words in range(1, 4):
        ends = sorted({".".join(p.split(".")[-words:]) for p in paths})
        if {p for p in everything if any(fits(p, e) for e in ends)} == set(paths):
            return ends
    return list(paths)


def task_type(view: ModelView, saved: Sequence[str]) -> str | None:
    """The task for which PEFT wraps the model; None if its wrapper would expect a head that is not saved."""
    kind = type(view.model).__name__
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if kind.endswith("ForConditionalGeneration"):
        return "SEQ_2_SEQ_LM"
    for ending, task in (
        ("ForSequenceClassification", "SEQ_CLS"),
        ("ForTokenClassification", "TOKEN_CLS"),
        ("ForQuestionAnswering", "QUESTION_ANS"),
    ):
        heads = [p for p in view.modules if p in HEADS[task]]
        if kind.endswith(ending) and heads and all(h in saved for h in heads):
            return task
    return None


def pattern_for(path: str) -> str:
    """The key of `rank_pattern` that matches this module only: a regular expression for its whole name."""
    return "^" + re.escape(path)


def ends_or_pattern(config: Config, key: str, paths: Sequence[str]) -> list[str]:
    """Those of `paths` that a list of ends of names, or a regex, matches; (IA)³ compares ends by character."""
    wanted = config.get(key, [])
    if isinstance(wanted, str):
        return [p for p in paths if re.fullmatch(wanted, p)]
    return [p for p in paths if any(p.endswith(w) for w in wanted)]


def integral(value: float) -> float:
    """A whole number as an int: PEFT declares alpha as an integer."""
    return round(value) if abs(value - round(value)) < 1e-9 * max(1.0, abs(value)) else value
