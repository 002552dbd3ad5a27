"""One batch, many adapters: prefill and decode of 32 rows, against PEFT's `adapter_names` and the base alone.

PEFT mixes LoRA only; adapters of five methods in one batch are timed against the base, and checked against each row
on its own.

Decode is one token a row on top of a filled cache, as often as a short answer has tokens; prefill is one
forward over the prompts with the last position's logits, as generation does it. The choice of adapters is
part of what is timed.

The last position is given to the models as an index and not as a count: for a count they slice, and PyTorch
multiplies a sliced batch by the head's matrix copied once a row, which took five times as long as everything
else together and would hide what is measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import inlay
from benchmarks.contenders import LLAMA_58M, Shape, copy_values, randomise, token_rows, with_inlay, with_peft
from benchmarks.timing import alternate, ratio
from inlay import IA3, LoRA, Pfeiffer, PrefixTuning, PromptTuning
from inlay.core.contracts.method import Method

# Of the logits' standard deviation: bfloat16 rounds at other places in the two.
TOLERANCE = {torch.bfloat16: 0.15, torch.float32: 1e-4}


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is served.

    Attributes:
        prompt: tokens a row in the cache.
        steps: tokens a row decoded in a run.
    """

    shape: Shape = LLAMA_58M
    rows: int = 32
    prompt: int = 32
    steps: int = 8


def compare(load: Load, *, counts: tuple[int, ...] = (1, 8, 32), runs: int) -> dict[str, Any]:
    """For each number of adapters, spread evenly over the rows: agreement, timings and ratios."""
    names = [f"a{n}" for n in range(max(counts))]
    base = load.shape.build().eval()
    ours, theirs = (
        with_inlay(base, LoRA(rank=8), names, seed=0).eval(),
        with_peft(base, LoRA(rank=8), names).eval(),
    )
    randomise(ours, seed=1)
    copy_values(ours, theirs)
    ids = token_rows(load.shape, load.rows, load.prompt)
    results = []
    for count in counts:
        choice = [names[row % count] for row in range(load.rows)]
        callers = {
            "inlay": _with_inlay(ours, choice),
            "peft": _with_peft(theirs, choice),
            "base": _plain(base),
        }
        agreement = _logits_agree(callers, ids, TOLERANCE[load.shape.dtype])
        with torch.inference_mode():
            prefill = alternate({n: _prefill(c, ids) for n, c in callers.items()}, runs=runs)
            decode = alternate({n: _decode(c, ids, load.steps) for n, c in callers.items()}, runs=runs)
        results.append(
            {
                "adapters": count,
                "logits": agreement,
                "prefill": {n: t.to_dict() for n, t in prefill.items()},
                "decode": {n: t.to_dict() for n, t in decode.items()},
                "ratios": {
                    f"{what}: {a}/{b}": ratio(timings[a], timings[b])
                    for what, timings in (("prefill", prefill), ("decode", decode))
                    for a, b in (("inlay", "base"), ("peft", "base"), ("inlay", "peft"))
                },
            }
        )
    return {
        "shape": load.shape.to_dict(),
        "rows": load.rows,
        "prompt_tokens": load.prompt,
        "decoded_tokens_a_run": load.steps,
        "results": results,
    }


# Their papers' own places; what a server of several tasks would find side by side.
FIVE: tuple[Method, ...] = (
    LoRA(rank=8), IA3(), Pfeiffer(), PrefixTuning(length=20), PromptTuning(length=20, init="random"),
)  # fmt: skip


def compare_methods(load: Load, *, methods: Sequence[Method] = FIVE, runs: int) -> dict[str, Any]:
    """An adapter a row, the methods in turn: agreement with each row alone, timings and ratios."""
    base = load.shape.build().eval()
    model = copy.deepcopy(base)
    names: list[str] = []
    for row in range(load.rows):
        method = methods[row % len(methods)]
        names.append(f"{method.name}-{row}")
        torch.manual_seed(row)
        inlay.attach(model, method, name=names[-1])
        with torch.no_grad():
            for parameter in inlay.adapters(model)[names[-1]].parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval()
    ids = token_rows(load.shape, load.rows, load.prompt)
    callers = {"inlay": _with_inlay(model, names), "base": _plain(base)}
    agreement = _rows_agree(model, names, ids, TOLERANCE[load.shape.dtype])
    with torch.inference_mode():
        prefill = alternate({n: _prefill(c, ids) for n, c in callers.items()}, runs=runs)
        decode = alternate({n: _decode(c, ids, load.steps) for n, c in callers.items()}, runs=runs)
    return {
        "adapters": load.rows,
        "methods": [m.name for m in methods],
        "logits": agreement,
        "prefill": {n: t.to_dict() for n, t in prefill.items()},
        "decode": {n: t.to_dict() for n, t in decode.items()},
        "ratios": {
            "prefill: inlay/base": ratio(prefill["inlay"], prefill["base"]),
            "decode: inlay/base": ratio(decode["inlay"], decode["base"]),
        },
    }


Caller = Callable[..., Any]


def _with_inlay(model: Any, choice: list[str]) -> Caller:
    def call(**inputs: Any) -> Any:
        with inlay.use(model, choice):
            return model(**inputs)

    return call


def _with_peft(model: Any, choice: list[str]) -> Caller:
    return lambda **inputs: model(**inputs, adapter_names=choice)


def _plain(model: Any) -> Caller:
    return lambda **inputs: model(**inputs)


def _prefill(call: Caller, ids: Tensor) -> Callable[[], object]:
    last = torch.tensor([ids.shape[1] - 1])
    return lambda: call(input_ids=ids, logits_to_keep=last, use_cache=False)


def _decode(call: Caller, ids: Tensor, steps: int) -> Callable[[], object]:
    from transformers import DynamicCache

    cache = DynamicCache()
    call(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = ids[:, -1:]

    def run() -> None:
        for _ in range(steps):
            call(input_ids=token, past_key_values=cache, use_cache=True)
        cache.crop(-steps)

    return run


def _rows_agree(model: Any, names: list[str], ids: Tensor, tolerance: float) -> dict[str, Any]:
    """Last position's logits: a mixed batch gives those of its rows alone, and unlike the base's."""
    last = torch.tensor([ids.shape[1] - 1])
    logits: dict[str, Tensor] = {}
    with torch.no_grad():
        for what, choice in (("mixed", names), ("base", None)):
            with inlay.use(model, choice):
                logits[what] = model(input_ids=ids, logits_to_keep=last, use_cache=False).logits.float()
        alone = []
        for row, name in enumerate(names):
            with inlay.use(model, name):
                alone.append(model(input_ids=ids[row : row + 1], logits_to_keep=last, use_cache=False).logits.float())
    scale = float(logits["base"].std())
    apart = float((logits["mixed"] - torch.cat(alone)).abs().max()) / scale
    effect = float((logits["mixed"] - logits["base"]).abs().amax(dim=(1, 2)).min()) / scale
    return {
        "worst_difference_from_each_row_alone_in_deviations": apart,
        "smallest_effect_on_a_row_in_deviations": effect,
        "tolerance": tolerance,
        "agree": apart <= tolerance < effect,
    }


def _logits_agree(callers: dict[str, Caller], ids: Tensor, tolerance: float) -> dict[str, Any]:
    """Last position's logits: those of inlay and PEFT are equal, and unlike the base's."""
    last = torch.tensor([ids.shape[1] - 1])
    with torch.no_grad():
        logits = {
            name: call(input_ids=ids, logits_to_keep=last, use_cache=False).logits.float()
            for name, call in callers.items()
        }
    scale = float(logits["base"].std())
    between = float((logits["inlay"] - logits["peft"]).abs().max()) / scale
    effect = float((logits["inlay"] - logits["base"]).abs().amax(dim=(1, 2)).min()) / scale
    return {
        "worst_difference_between_the_two_in_deviations": between,
        "smallest_effect_on_a_row_in_deviations": effect,
        "tolerance": tolerance,
        "agree": between <= tolerance < effect,
    }
