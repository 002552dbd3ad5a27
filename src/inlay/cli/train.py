"""`inlay train`: data and a base in, an adapter out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from inlay.cli.importing import importing


def train(
    data: Annotated[
        str | None, typer.Option(help="CSV, TSV, JSONL, JSON, Parquet or text file (maybe .gz), or a datasets id.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="Folder to write the run to.")] = None,
    base: Annotated[str | None, typer.Option(help="Transformers folder or hub id. Default: the embedded base.")] = None,
    method: Annotated[str | None, typer.Option(help="Method or baseline (see `inlay methods`). Default: lora.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Hyper-parameter of the method, e.g. rank=16. Repeatable."),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            help="all-linear, attention, mlp, a role, module names with commas, or re:PATTERN. Default: the paper's."
        ),
    ] = None,
    layers: Annotated[str | None, typer.Option(metavar="NUMBERS", help="Layers to stay within, e.g. 0-5,11.")] = None,
    modules_to_save: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Modules to train whole, with commas. A fresh head is found by itself."),
    ] = None,
    eval_data: Annotated[str | None, typer.Option(help="Rows to evaluate on during training.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a datasets id.")] = None,
    eval_split: Annotated[str | None, typer.Option(help="Split to evaluate on.")] = None,
    reading: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="How files are read: format=csv, header=text,label … Repeatable."),
    ] = None,
    eval_share: Annotated[
        float | None,
        typer.Option(help="Share of the data held out where --eval-data is not given. Default: 0.05; 0 is none."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="causal, seq2seq, classification or regression. Default: guessed from columns and base."),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="ROLE=NAME,…", help="Columns with other names, e.g. prompt=question,completion=answer."),
    ] = None,
    prompt_template: Annotated[
        str | None, typer.Option(help="Text with column names in braces that becomes the prompt.")
    ] = None,
    separator: Annotated[str | None, typer.Option(help="Between prompt and completion. Default: a line end.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the adapter. Default: default.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data. Default: 3, more of few rows.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps, in place of --epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows in a pass. Default: 16.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Passes in a step. Default: 1.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak rate. Default: the method's.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="linear, cosine, constant or constant_with_warmup. Default: the method's.")
    ] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Share of the steps in which the rate rises. Default: the method's.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Default: the method's.")] = None,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help="adamw, adafactor or sgd; from bitsandbytes: adamw8bit, paged-adamw, paged-adamw8bit, lion, lion8bit."
        ),
    ] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="Gradients are scaled down to this norm. Default: 1; 0 leaves them.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens a row may have. Default: what the base can read.")
    ] = None,
    on_long: Annotated[
        str | None,
        typer.Option(help="Longer rows: error, truncate, drop or split. Default: split for plain text, else error."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of every random draw. Default: 0.")] = None,
    precision: Annotated[str | None, typer.Option(help="bf16 or fp32 weights of the base. Default: its own.")] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="Weights of the base in nf4, fp4, int8, torchao-int8 or torchao-int4. Default: as they are."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing", "--checkpointing", help="Recompute activations to save memory."),
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations. Default: an epoch, or a quarter of a short run.")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints. Default: as --eval-every, and every ten minutes.")
    ] = None,
    early_stopping: Annotated[
        int | None, typer.Option(metavar="N", help="End after N evaluations without a better score.")
    ] = None,
    report_to: Annotated[str | None, typer.Option(help="tensorboard, wandb, mlflow, with commas.")] = None,
    packing: Annotated[
        bool | None, typer.Option("--packing/--no-packing", help="Rows behind one another. Default: where exact.")
    ] = None,
    compile: Annotated[
        bool | None, typer.Option("--compile", help="Compile the layers first; says after how many steps it pays.")
    ] = None,
    trunk_cache: Annotated[
        str | None,
        typer.Option(metavar="auto|off|PATH", help="Compute layers below the trained ones once. Default: auto."),
    ] = None,
    trunk_cache_limit: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Of the trunk cache. Default: 4GiB.")
    ] = None,
    config: Annotated[
        list[Path] | None, typer.Option(help="run.yaml of these options; flags override it. Repeatable: several runs.")
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="Train several runs on one copy of the base, in turns.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, exactly.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")] = False,
) -> None:
    """Fine-tune a frozen base on your data and save the adapter."""
    flags = {key: value for key, value in locals().items() if value is not None}
    for own in ("config", "together", "resume", "overwrite", "as_json"):
        flags.pop(own, None)
    files: list[Path | None] = [*config] if config else [None]
    runs = [values for path in files for values in _runs(_values(dict(flags), path), path)]
    if len(runs) > 1:
        return _several(runs, together=together, resume=resume, overwrite=overwrite, as_json=as_json)
    asked, file = runs[0], files[0]
    from inlay.core.errors import ConfigError
    from inlay.train.config import RunConfig

    if "out" not in asked:
        raise ConfigError("--out is missing: give the folder to write the run to, e.g. --out runs/first")
    if "data" not in asked and not resume:
        raise ConfigError("--data is missing: give a file of rows, e.g. --data rows.jsonl")
    if not resume:
        checked = RunConfig.of(asked, origin="options" if file is None else f"options and {file}")
    with importing():
        import inlay.train.trainer  # noqa: F401
        from inlay.train.running import resumed_config

    wanted = resumed_config(asked["out"], asked) if resume else checked
    result = _runner(wanted.method)(wanted, resume=resume, overwrite=overwrite)
    if as_json:
        from inlay.cli.output import write_json

        write_json(result.to_dict())
        return
    sys.stdout.write(_told(result))


def _values(flags: dict[str, Any], config: Path | None) -> dict[str, Any]:
    """The file's values with the flags' on top, in the types of the configuration."""
    from inlay.core.errors import ConfigError

    values: dict[str, Any] = {}
    if config is not None:
        from inlay.train.config import read_values

        values = read_values(config)
    words = flags.pop("set_", None)
    for key in ("modules_to_save", "report_to"):
        if key in flags:
            flags[key] = _listed(flags[key])
    if "where" in flags and "," in flags["where"] and not flags["where"].startswith("re:"):
        flags["where"] = _listed(flags["where"])
    if "reading" in flags:
        from inlay.data.reading import Reading
        from inlay.train.hyper import parse_fields

        flags["reading"] = parse_fields(Reading, flags["reading"], heading="--reading", noun="option")
    if "layers" in flags:
        flags["layers"] = _numbers(flags["layers"])
    if "columns" in flags:
        from inlay.data.columns import parse_columns

        flags["columns"] = parse_columns(flags["columns"])
    if "method" in flags and flags["method"] != values.get("method"):
        values.pop("settings", None)  # another method's hyper-parameters
    values |= flags
    if words:
        earlier = values.get("settings") or {}
        if not isinstance(earlier, dict):
            raise ConfigError(f"settings is {earlier!r}, expected `name: value` lines")
        values["settings"] = {**earlier, **_settings(str(values.get("method", "lora")), words)}
    return values


def _runs(values: dict[str, Any], file: Path | None) -> list[dict[str, Any]]:
    """The runs that a file describes: one, or those of its list ``runs``, each on top of what they share."""
    from inlay.core.errors import ConfigError

    own = values.pop("runs", None)
    if own is None:
        return [values]
    if not isinstance(own, list) or not own or not all(isinstance(run, dict) for run in own):
        raise ConfigError(f"runs in {file} is {own!r}, expected a list of `name: value` blocks, one a run")
    folder = Path(str(values.pop("out", "runs")))
    return [{**values, "out": str(folder / str(run.get("name", place))), **run} for place, run in enumerate(own, 1)]


def _several(runs: list[dict[str, Any]], *, together: bool, resume: bool, overwrite: bool, as_json: bool) -> None:
    """Several runs, in turns on one base or one after another."""
    from inlay.train.several import checked, run_several

    configs = checked(runs, resume=resume)
    trained = [config for config in configs if not _is_baseline(config.method)]
    if together and len(trained) < len(configs):
        from inlay.core.errors import ConfigError

        raise ConfigError("a baseline trains nothing of the base, so it is not run --together with others")
    results = run_several(configs, _runner, together=together, resume=resume, overwrite=overwrite)
    if as_json:
        from inlay.cli.output import write_json

        write_json([result.to_dict() for result in results])
        return
    sys.stdout.write("".join(map(_told, results)))


def _settings(method: str, words: list[str]) -> dict[str, Any]:
    """Hyper-parameters in the types of the method's fields, or of the baseline's."""
    from inlay import baselines
    from inlay.train.hyper import parse_settings

    return (baselines.parse_settings if _is_baseline(method) else parse_settings)(method, words)


def _runner(method: str) -> Any:
    """The function that runs such a configuration: training, or fitting a baseline."""
    if _is_baseline(method):
        from inlay.baselines.running import run as fit

        return fit
    from inlay.train.running import run

    return run


def _is_baseline(method: str) -> bool:
    from inlay.baselines import BUILT_IN
    from inlay.core.errors import ConfigError, nearest

    with importing():
        from inlay.methods import registry

        registry()
    if method in BUILT_IN or method in registry():
        return method in BUILT_IN
    raise ConfigError(f"unknown method {method!r}{nearest(method, [*registry(), *BUILT_IN])}")


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    """``0-2,5`` as [0, 1, 2, 5]."""
    from inlay.core.errors import ConfigError

    numbers: list[int] = []
    for part in _listed(text):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ConfigError(f"--layers {text!r}: {part!r} is not a number or a range such as 0-5")
        numbers += range(int(first), int(last if dash else first) + 1)
    return numbers


def _told(result: Any) -> str:
    scores = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in result.metrics.items())
    if not result.steps:
        return f"{result.adapter}: fitted in {result.seconds:.0f} s, nothing of the base is trained\n{scores}\n"
    kept = f" (best: step {result.best_step})" if result.best_step not in (None, result.steps) else ""
    return (
        f"{result.adapter}: {result.trainable:,} trained parameters, {result.steps} steps{kept} "
        f"in {result.seconds:.0f} s, {result.tokens_per_second:,.0f} tokens/s\n{scores}\n"
    )
