"""`inlay train`: data and a base in, an adapter out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from inlay.cli import flags
from inlay.cli.importing import importing


@flags.with_run_options
def train(
    *,
    config: Annotated[
        list[Path] | None, typer.Option(help="run.yaml of these options; flags override it. Repeatable: several runs.")
    ] = None,
    together: Annotated[
        bool, typer.Option("--together", help="Train several runs on one copy of the base, in turns.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, exactly.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    as_json: flags.AsJson = False,
    **given: Any,
) -> None:
    """Fine-tune a frozen base on your data and save the adapter."""
    said = {name: value for name, value in given.items() if value is not None}
    files: list[Path | None] = [*config] if config else [None]
    runs = [values for path in files for values in _runs(_values(dict(said), path), path)]
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
    _show(result)


def _values(given: dict[str, Any], config: Path | None) -> dict[str, Any]:
    """The file's values with the flags' on top; what they mean is found out where the configuration is checked."""
    from inlay.core.errors import ConfigError

    values: dict[str, Any] = {}
    if config is not None:
        from inlay.train.config import read_values

        values = read_values(config)
    words = given.pop("settings", None)
    if "reading" in given:
        from inlay.data.reading import Reading
        from inlay.train.hyper import parse_fields

        given["reading"] = parse_fields(Reading, given["reading"], heading="--reading", noun="option")
    if "columns" in given:
        from inlay.data.columns import parse_columns

        given["columns"] = parse_columns(given["columns"])
    if "method" in given and given["method"] != values.get("method"):
        values.pop("settings", None)  # another method's hyper-parameters
    values |= given
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
    for result in results:
        _show(result)


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


def _show(result: Any) -> None:
    from inlay.cli.tables import show_facts, told_number
    from inlay.sizes import told_rate, told_seconds

    time = f"{told_seconds(result.seconds)} {'h' if result.seconds >= 3600 else 'min'}"
    scores = {name: told_number(value, 4) for name, value in result.metrics.items()}
    if not result.steps:
        show_facts(f"{result.adapter}: fitted, nothing of the base is trained", {"time": time, **scores})
        return
    kept = f" (best: step {result.best_step:,})" if result.best_step not in (None, result.steps) else ""
    facts = {
        "trained parameters": result.trainable,
        "steps": f"{result.steps:,}{kept}",
        "time": f"{time}, {told_rate(result.tokens_per_second)} tokens/s",
    }
    show_facts(str(result.adapter), facts | scores)
