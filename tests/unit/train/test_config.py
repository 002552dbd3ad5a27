"""Configurations and hyper-parameters: round trips, and one message for all mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inlay.core.errors import ConfigError
from inlay.train.config import RunConfig
from inlay.train.hyper import build_method, parse_settings

CONFIGS = st.builds(
    RunConfig,
    data=st.text(min_size=1),
    out=st.just("runs/x"),
    base=st.none() | st.just("./base"),
    separator=st.text(max_size=4),
    columns=st.dictionaries(st.sampled_from(["prompt", "completion"]), st.text(min_size=1)),
    settings=st.just({"rank": 4}) | st.just({}),
    where=st.none() | st.just("mlp") | st.lists(st.sampled_from(["q_proj", "k_proj"]), min_size=1),
    epochs=st.floats(0.1, 100),
    learning_rate=st.none() | st.floats(1e-9, 1),
    seed=st.integers(0, 2**32 - 1),
)


@given(CONFIGS)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, config: RunConfig) -> None:
    folder = tmp_path_factory.mktemp("config")
    (folder / "run.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (folder / "run.json").write_text(config.model_dump_json(), encoding="utf-8")
    assert RunConfig.read(folder / "run.yaml") == config
    assert RunConfig.read(folder / "run.json") == config


def test_all_mistakes_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.of({"data": "x", "out": "y", "bach_size": 3, "epochs": 0, "precision": "fp8"})
    for part in ("bach_size", "did you mean 'batch_size'", "epochs is 0", "precision is 'fp8'"):
        assert part in str(caught.value)


def test_precision_is_auto_unless_asked_for() -> None:
    plain = {"data": "rows.jsonl", "out": "run"}
    assert RunConfig.of(plain).precision == RunConfig.of({**plain, "precision": None}).precision == "auto"
    assert RunConfig.of({**plain, "precision": "fp16"}).precision == "fp16"
    with pytest.raises(ConfigError, match=r"precision is 'half'"):
        RunConfig.of({**plain, "precision": "half"})


def test_missing_and_contradicting() -> None:
    with pytest.raises(ConfigError, match="out is missing"):
        RunConfig.of({"data": "x"})
    with pytest.raises(ConfigError, match="early_stopping needs evaluations"):
        RunConfig.of({"data": "x", "out": "y", "early_stopping": 2, "eval_share": 0})


def test_numbers_as_yaml_writes_them(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: x\nout: y\nlearning_rate: 1e-3\n", encoding="utf-8")
    assert RunConfig.read(tmp_path / "run.yaml").learning_rate == 1e-3


def test_what_yaml_reads_as_a_switch_is_no_number(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: x\nout: y\nsteps: yes\npacking: yes\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.yaml: steps is True"):
        RunConfig.read(tmp_path / "run.yaml")
    with pytest.raises(ConfigError, match="rank=True is not a whole number"):
        build_method("lora", {"rank": True, "rank_stabilised": True})


@pytest.mark.parametrize("name", ["epochs", "learning_rate"])
def test_numbers_have_an_end(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is inf"):
        RunConfig.of({"data": "x", "out": "y", name: float("inf")})


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "just words"])
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        RunConfig.read(tmp_path / "run.yaml")


def test_a_configuration_that_is_absent(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        RunConfig.read(tmp_path / "run.yaml")


def test_settings_are_typed_by_the_method() -> None:
    words = ["rank=16", "alpha=8", "dropout=1e-1", "rank_stabilised=true"]
    values = parse_settings("lora", words)
    assert values == {"rank": 16, "alpha": 8.0, "dropout": 0.1, "rank_stabilised": True}
    assert type(values["alpha"]) is float
    assert parse_settings("prompt-tuning", ["init=labels", "labels=yes, no"])["labels"] == ("yes", "no")
    assert parse_settings("prompt-tuning", ["text=Classify the ticket: now"])["text"] == "Classify the ticket: now"


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings("lora", ["rnak=3", "rank=x", "alpha", "dropout=0.1", "dropout=0.2"])
    for part in ("did you mean 'rank'", "rank='x' is not a whole number", "'alpha' is not of the form", "given twice"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="did you mean 'lora'"):
        parse_settings("loar", [])
    with pytest.raises(ConfigError, match="rank is 0"):
        build_method("lora", {"rank": 0})
    with pytest.raises(ConfigError, match="rank='x' is not a whole number"):
        build_method("lora", {"rank": "x"})


def test_every_method_comes_back_from_plain_data() -> None:
    from inlay.methods import registry

    for name, cls in registry().items():
        for method in cls.examples():
            plain = json.loads(json.dumps({k: v for k, v in method.to_dict().items() if k != "method"}))
            assert build_method(name, plain) == method


def test_few_rows_are_read_more_often() -> None:
    from inlay.train.prepare import default_epochs

    assert [default_epochs(steps) for steps in (1, 12, 25, 100, 5000)] == [20, 20, 10, 3, 3]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "data: a.jsonl\nout: runs/x\ndata: b.jsonl\n"),
        ("b.yaml", "data: a.jsonl\nout: runs/x\nsettings: {rank: 4, rank: 8}\n"),
        ("c.json", '{"data": "a.jsonl", "out": "runs/x", "settings": {"rank": 4, "rank": 8}}'),
    ],
)
def test_a_name_given_twice(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=r"(data|rank) is given more than once"):
        RunConfig.read(tmp_path / name)


def test_yaml_may_refer_to_what_it_says_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "data: &rows a.jsonl\nout: *rows\nsettings: {<<: {rank: 4, alpha: 1.0}, alpha: 8.0}\n"
    )
    config = RunConfig.read(tmp_path / "a.yaml")
    assert (config.data, config.out, config.settings) == ("a.jsonl", "a.jsonl", {"rank": 4, "alpha": 8.0})
