"""An option is declared once: the schema, the command line and the documentation follow from `RunConfig`."""

from __future__ import annotations

import json
import re
from typing import Any, Literal, get_args, get_origin

import pytest
import typer
import yaml
from hypothesis import given

from inlay.cli.main import app
from inlay.cli.schema import run_schema, written
from inlay.core.errors import ConfigError
from inlay.methods import registry
from inlay.train.config import RunConfig
from inlay.train.options import SCHEMA, options
from inlay.train.words import layers, listed, places
from tests.unit.train.test_config import CONFIGS

NEEDED = {"data": "rows.jsonl", "out": "runs/x"}


def flags() -> dict[str, Any]:
    """Name → the parameter of `inlay train`."""
    group: Any = typer.main.get_command(app)
    return {parameter.name: parameter for parameter in group.get_command(None, "train").params}


def words_of(annotation: Any) -> tuple[str, ...]:
    """The words of the `Literal` in a type, if there is one."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return next(filter(None, map(words_of, get_args(annotation))), ())


def test_the_schema_is_up_to_date() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == f"{written(run_schema())}\n", "run `make docs`"


def test_an_option_is_its_field() -> None:
    assert list(options()) == list(RunConfig.model_fields)
    for name, field in RunConfig.model_fields.items():
        option = options()[name]
        assert option.default == (None if field.is_required() else field.get_default())
        assert f"{option.told}{' Default: ' * bool(option.unsaid and option.default is None)}" in str(field.description)
        assert option.choices == words_of(field.annotation)


def test_every_option_has_its_flag() -> None:
    found = flags()
    assert set(found) == {*options(), "config", "together", "resume", "overwrite", "as_json"}
    for name, option in options().items():
        assert found[name].opts[0] == ("--set" if name == "settings" else f"--{name.replace('_', '-')}")
        assert found[name].help.startswith(option.help) and found[name].default is None
    assert found["gradient_checkpointing"].opts[1] == "--checkpointing" and not found["compile"].secondary_opts
    assert found["packing"].secondary_opts == ["--no-packing"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("batch_size", "Rows in a forward pass (micro-batch). Default: 16."),
        ("seed", "Seed of every random draw. Default: 0."),
        ("separator", r'Text between prompt and completion; never scored. Default: "\n".'),
        ("learning_rate", "Peak learning rate. Default: the method's."),
        ("compile", "Compile the layers first; prints after how many steps that pays."),
        ("steps", "Optimizer steps, instead of epochs."),
        ("report_to", "Trackers to report to. One of tensorboard, wandb, mlflow."),
    ],
)
def test_what_help_says(name: str, shown: str) -> None:
    assert options()[name].help == shown


def test_every_option_says_what_it_does() -> None:
    assert [o.name for o in options().values() if not re.fullmatch(r"[A-Z].*[.…]", o.told)] == []


# -- text that stands for a list, in a file as on the command line --


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("layers", "0-2, 5", [0, 1, 2, 5]),
        ("layers", "3", [3]),
        ("layers", 3, [3]),
        ("modules_to_save", "score, lm_head", ["score", "lm_head"]),
        ("report_to", "tensorboard,wandb", ["tensorboard", "wandb"]),
        ("where", "q_proj, v_proj", ["q_proj", "v_proj"]),
        ("where", "attention", "attention"),
        ("where", "re:.*[0-9]{1,2}.q_proj", "re:.*[0-9]{1,2}.q_proj"),
        ("where", ["q_proj"], ["q_proj"]),
    ],
)
def test_text_that_stands_for_a_list(name: str, text: Any, value: Any) -> None:
    assert getattr(RunConfig.of({**NEEDED, name: text}), name) == value


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("layers", "0-x", "'0-x' is not a number or a range"),
        ("layers", "5-3", "'5-3' is not a number or a range"),
        ("layers", "0-999999999", "is not a number or a range"),
        ("layers", "-1", "'-1' is not a number or a range"),
        ("layers", True, "layers is True"),
        ("where", "re:(", "is not a regular expression"),
        ("report_to", "nobody", "report_to.0 is 'nobody'"),
        ("trunk_cache_limit", "much", "trunk_cache_limit 'much' is not an amount of memory"),
    ],
)
def test_text_that_stands_for_nothing(name: str, text: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        RunConfig.of({**NEEDED, name: text})


def test_words() -> None:
    assert listed("a, b,,") == ["a", "b"] and layers([1]) == [1] and places(None) is None
    assert places("re:a,b") == re.compile("a,b") and places("a,b") == ["a", "b"] and places("mlp") == "mlp"


# -- the schema, as an editor takes it --


class Invalid(Exception):
    """The value does not have the form that the schema gives it."""


def check(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> None:
    """What the schema uses of JSON Schema; a word that is not known here is an error, never passed over."""
    for word, form in schema.items():
        match word:
            case "$ref":
                check(value, root if form == "#" else root["$defs"][form.removeprefix("#/$defs/")], root)
            case "type":
                kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool,
                         "number": (int, float), "null": type(None)}  # fmt: skip
                ok = isinstance(value, kinds[form]) and (form == "boolean" or not isinstance(value, bool))
                _hold(ok, f"{value!r} is no {form}")
            case "properties" if isinstance(value, dict):
                for name, part in form.items():
                    if name in value:
                        check(value[name], part, root)
            case "additionalProperties" if isinstance(value, dict):
                more = {k: v for k, v in value.items() if k not in schema.get("properties", {})}
                _hold(form is not False or not more, f"unknown {sorted(more)}")
                for part in more.values() if isinstance(form, dict) else ():
                    check(part, form, root)
            case "items" if isinstance(value, list):
                for part in value:
                    check(part, form, root)
            case "prefixItems" if isinstance(value, list):
                for item, part in zip(value, form, strict=False):
                    check(item, part, root)
            case "anyOf":
                _hold(any(_valid(value, part, root) for part in form), f"{value!r} has none of the forms {form}")
            case "allOf":
                for part in form:
                    check(value, part, root)
            case "if":
                if _valid(value, form, root):
                    check(value, schema["then"], root)
            case "const":
                _hold(value == form, "another")
            case "enum":
                _hold(value in form, f"{value!r} is not one of {form}")
            case "required":
                _hold(set(form) <= set(value), f"{form} are missing")
            case "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" if isinstance(value, (int, float)):
                less, bound = "inimum" in word, word.startswith("exclusive")
                _hold((value > form if less else value < form) or (not bound and value == form), f"{value} {word}")
            case "minItems" | "maxItems" if isinstance(value, list):
                _hold(len(value) >= form if word == "minItems" else len(value) <= form, f"{value} {word}")
            case _:
                of_others = "properties additionalProperties items prefixItems minItems maxItems then minimum maximum"
                about = "exclusiveMinimum exclusiveMaximum $defs $schema title description default"
                assert word in f"{of_others} {about}".split(), f"{word} is not checked"


def _hold(condition: bool, message: str) -> None:
    if not condition:
        raise Invalid(message)


def _valid(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> bool:
    try:
        check(value, schema, root)
    except Invalid:
        return False
    return True


ROOT: dict[str, Any] = json.loads(SCHEMA.read_text(encoding="utf-8"))


@given(CONFIGS)
def test_what_a_run_saves_has_the_form(config: RunConfig) -> None:
    check(yaml.safe_load(config.to_yaml()), ROOT, ROOT)


def test_every_method_at_its_defaults_and_examples_has_the_form() -> None:
    for key, cls in registry().items():
        for method in [cls(), *cls.examples()]:
            settings = json.loads(json.dumps({k: v for k, v in method.to_dict().items() if k != "method"}))
            check({"method": key, "settings": settings}, ROOT, ROOT)


@pytest.mark.parametrize(
    "text",
    [
        "data: a.jsonl\nmethod: dora\nsettings: {rank: 4}\nlayers: 0-3\nwhere: q_proj,v_proj",
        "data: a.jsonl\nruns: [{name: a, seed: 1}, {name: b, method: ia3, settings: {}}]",
        "method: of-another-package\nsettings: {anything: 1}",
        "method: features\nsettings: {pooling: mean}",
    ],
)
def test_files_that_have_the_form(text: str) -> None:
    check(yaml.safe_load(text), ROOT, ROOT)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bach_size: 3", "unknown ['bach_size']"),
        ("batch_size: 0", "minimum"),
        ("settings: {rnak: 3}", "unknown ['rnak']"),  # of LoRA, which is what is not said
        ("method: ia3\nsettings: {rank: 3}", "unknown ['rank']"),
        ("method: prefix-tuning\nsettings: {init: texts}", "'texts' is not one of"),
        ("optimizer: adam", "'adam' is not one of"),
        ("runs: [{sed: 1}]", "unknown ['sed']"),
        ("eval_share: 1", "exclusiveMaximum"),
    ],
)
def test_files_that_do_not(text: str, said: str) -> None:
    with pytest.raises(Invalid, match=re.escape(said)):
        check(yaml.safe_load(text), ROOT, ROOT)


def test_a_hyper_parameter_is_described_as_in_its_docstring() -> None:
    rank = ROOT["$defs"]["adalora"]["properties"]["target_rank"]
    assert rank == {
        "type": "integer", "description": "Rank of every matrix at first, and mean rank at the end.", "default": 8,
    }  # fmt: skip


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    from inlay.cli.main import main

    def printed() -> str:
        with pytest.raises(SystemExit) as ended:
            main(["schema"])
        assert not ended.value.code
        return capsys.readouterr().out

    monkeypatch.setattr(metadata, "entry_points", lambda **_: ())
    assert printed() == SCHEMA.read_text(encoding="utf-8")
    # Where a package brings a method, the file does not have it, and the schema is made anew.
    monkeypatch.setattr(metadata, "entry_points", lambda **_: ("one",))
    monkeypatch.setattr("inlay.cli.schema.run_schema", lambda: {"made": "anew"})
    assert printed() == '{"made": "anew"}\n'
