"""The rows of serving: mixed batches of many adapters, changing the adapter, adding one more."""

from __future__ import annotations

from dataclasses import replace

from benchmarks import mixed, switching
from benchmarks.contenders import LINEARS_112
from benchmarks.report import Options, Part, Row, milliseconds
from benchmarks.steps import TINY

DECODE, DECODE_METHODS, PREFILL = 1.8, 2.0, 1.12  # times the base alone
SWITCH, ATTACH = 0.1, 1.1  # milliseconds; times the first


def batches(options: Options) -> Part:
    """32 rows with 32 adapters, and with five methods."""
    load = mixed.Load(shape=TINY, rows=5, prompt=8, steps=2) if options.tiny else mixed.Load()
    lora = mixed.compare(load, counts=(load.rows,), runs=options.runs)
    five = mixed.compare_methods(load, runs=options.runs)
    found = lora["results"][0]
    theirs = {what: found["ratios"][f"{what}: peft/base"]["of_medians"] for what in ("prefill", "decode")}
    part = Part(raw={"lora": lora, "methods": five})
    for what, most in (("decode", DECODE), ("prefill", PREFILL)):
        part.rows.append(
            Row(
                work=f"{what} of {load.rows} rows with {load.rows} adapters / base alone",
                value=found["ratios"][f"{what}: inlay/base"]["of_medians"],
                most=most,
                detail=f"{milliseconds(found[what])}; PEFT / base {theirs[what]:.3g}",
            )
        )
    part.rows.insert(
        1,
        Row(
            work="decode with five methods mixed / base alone",
            value=five["ratios"]["decode: inlay/base"]["of_medians"],
            most=DECODE_METHODS,
            detail=milliseconds(five["decode"]),
        ),
    )
    checks = {"LoRA": found["logits"], "five methods": five["logits"]}
    part.wrong += [f"mixed batch, {name}: {check}" for name, check in checks.items() if not check["agree"]]
    return part


def switches(options: Options) -> Part:
    """Changing the adapter, and adding the last of several."""
    adapters, shape = (3, replace(LINEARS_112, layers=2)) if options.tiny else (20, LINEARS_112)
    switch = switching.compare(adapters=adapters, shape=shape, runs=options.runs)
    attach = switching.compare_attaching(adapters=adapters, shape=shape, runs=options.runs)
    timed = {"another": switch["to_another"], "base": switch["to_base_and_back"]}
    slowest = max(timed, key=lambda name: timed[name]["inlay"]["median_ms"])
    theirs = attach["ratios"]["peft: last/first"]["of_medians"]
    medians = [f"{attach[which]['inlay']['median_ms']:.3g} ms" for which in ("first", "last")]
    part = Part(raw={"switch": switch, "attach": attach})
    part.rows = [
        Row(
            work=f"switching adapters, {adapters} loaded, {switch['layers']} layers (the slower of two ways)",
            value=timed[slowest]["inlay"]["median_ms"],
            most=SWITCH,
            unit="ms",
            detail=f"to {slowest}; PEFT {timed[slowest]['peft']['median_ms']:.3g} ms",
        ),
        Row(
            work=f"attaching adapter {adapters} / attaching the first",
            value=attach["ratios"]["inlay: last/first"]["of_medians"],
            most=ATTACH,
            detail=f"first {medians[0]}, last {medians[1]}; PEFT {theirs:.3g}",
        ),
    ]
    if not switch["outputs"]["agree"]:
        part.wrong.append(f"switching: {switch['outputs']}")
    return part
