"""The trunk cache in whole runs: the numbers of a run without it, bounded, kept in files, never stale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from inlay.core.errors import ConfigError, UnsupportedError
from inlay.kernels import trunk as kernel
from inlay.train import run
from inlay.train.prepare import prepare
from inlay.train.trunk import open_trunk
from tests import tiny
from tests.unit.train.test_resume import interrupted
from tests.unit.train.test_run import config, metrics

SAID: list[str] = []


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder that draws no random numbers."""
    return tiny.llama(tmp_path_factory.mktemp("base") / "llama", dropout=0.0)


def upper(data: Path, base: Path, out: Path, **changes: Any) -> Any:
    return config(data, base, out, **{"layers": [1], "where": "all-linear", "steps": 12, "eval_every": 6, **changes})


@pytest.mark.parametrize("packing", [False, None])
def test_the_numbers_of_a_run_without_it(completions: Path, steady: Path, tmp_path: Path, packing: Any) -> None:
    served = mock.Mock(wraps=kernel.replaying)
    with mock.patch.object(kernel, "replaying", served):
        cached = run(upper(completions, steady, tmp_path / "a", packing=packing), progress=False)
    assert served.call_count > 12
    whole = run(upper(completions, steady, tmp_path / "b", packing=packing, trunk_cache="off"), progress=False)
    for ours, theirs in zip(metrics(cached), metrics(whole), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_kept_states_are_the_models_own_bit_for_bit(completions: Path, steady: Path, tmp_path: Path) -> None:
    prepared = prepare(upper(completions, steady, tmp_path / "run", packing=False))
    cache = open_trunk(prepared, SAID.append)
    assert cache is not None and (cache.cut.depth, cache.cut.total) == (1, 2)
    assert "1 of 2 layers" in SAID[-1] and "memory" in SAID[-1]
    model, row = prepared.base.model, prepared.train[0]
    same = [r for r in prepared.train if r["input_ids"] == row["input_ids"]][:1]
    batch = prepared.collator(same)
    states = kernel.states_of(model, cache.cut, {k: v for k, v in batch.items() if k != "labels"})
    with kernel.replaying(cache.cut, states):
        expected = model(**batch, use_cache=False).loss
    whole = model(**batch, use_cache=False).loss
    with cache.serving(batch):
        served = model(**batch, use_cache=False).loss
    assert torch.equal(whole, expected)
    assert torch.allclose(served, whole, rtol=1e-6)  # its row was computed beside others of its length
    cache.close()


def test_a_resumed_run_has_the_same_numbers(completions: Path, steady: Path, tmp_path: Path) -> None:
    whole = run(upper(completions, steady, tmp_path / "a"), progress=False)
    parts = interrupted(upper(completions, steady, tmp_path / "b"), 3, 8)
    assert metrics(whole) == metrics(parts)
    name = "adapter.safetensors"
    assert (whole.adapter / name).read_bytes() == (parts.adapter / name).read_bytes()


def test_an_encoder_whose_head_alone_is_trained(tmp_path: Path, bert: Path) -> None:
    settings = json.loads((bert / "config.json").read_text())
    calm = tmp_path / "bert"
    calm.mkdir()
    for file in bert.iterdir():
        (calm / file.name).write_bytes(file.read_bytes())
    settings |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (calm / "config.json").write_text(json.dumps(settings))
    data = tiny.jsonl(tmp_path / "rows.jsonl", "classification")
    asked = {"method": "bitfit", "layers": [1], "steps": 10}
    lines = []
    for place in ("auto", "off"):
        result = run(config(data, calm, tmp_path / place, **asked, trunk_cache=place), progress=False)
        lines.append(metrics(result))
    for ours, theirs in zip(*lines, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_file_serves_later_runs(completions: Path, steady: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    first = run(upper(completions, steady, tmp_path / "a", trunk_cache=str(kept)), progress=False)
    computed = mock.Mock(wraps=kernel.states_of)
    with mock.patch.object(kernel, "states_of", computed):
        again = run(upper(completions, steady, tmp_path / "b", trunk_cache=str(kept)), progress=False)
    assert computed.call_count == 3  # a sample, and a batch that is checked in evaluation and in training
    assert metrics(first) == metrics(again)
    assert {path.suffix for path in kept.iterdir()} == {".json", ".states"}
    more = run(
        upper(completions, steady, tmp_path / "c", trunk_cache=str(kept), eval_share=0.4), progress=False
    )  # the same rows, split otherwise
    assert more.steps == 12 and len(list(kept.iterdir())) == 2


def test_a_file_of_another_base_is_not_used(completions: Path, steady: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    run(upper(completions, steady, tmp_path / "a", trunk_cache=str(kept)), progress=False)
    other = tiny.llama(tmp_path / "other", dropout=0.0)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] += 0.1  # one number that a sampled digest could miss
    model.save_pretrained(other)
    run(upper(completions, other, tmp_path / "b", trunk_cache=str(kept)), progress=False)
    assert len(list(kept.glob("*.json"))) == 2


def test_a_damaged_file_is_computed_anew(completions: Path, steady: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    first = run(upper(completions, steady, tmp_path / "a", trunk_cache=str(kept)), progress=False)
    states = next(kept.glob("*.states"))
    states.write_bytes(states.read_bytes()[:-8])
    again = run(upper(completions, steady, tmp_path / "b", trunk_cache=str(kept)), progress=False)
    assert metrics(first) == metrics(again) and len(list(kept.iterdir())) == 2
    changed = next(kept.glob("*.states"))
    changed.write_bytes(bytes(len(changed.read_bytes())))
    with pytest.raises(UnsupportedError, match="kept states"):
        run(upper(completions, steady, tmp_path / "c", trunk_cache=str(kept)), progress=False)


def test_it_is_bounded(completions: Path, steady: Path, tmp_path: Path) -> None:
    prepared = prepare(upper(completions, steady, tmp_path / "run", trunk_cache_limit="1KiB"))
    assert open_trunk(prepared, SAID.append) is None
    assert SAID[-1].startswith("no trunk cache") and "1KiB" in SAID[-1]
    asked = upper(completions, steady, tmp_path / "run", trunk_cache_limit="1KiB", trunk_cache=str(tmp_path / "kept"))
    with pytest.raises(ConfigError, match="more than --trunk-cache-limit 1KiB"):
        run(asked, progress=False)
    with pytest.raises(ConfigError, match="trunk_cache_limit 'much' is not an amount of memory"):
        upper(completions, steady, tmp_path / "run", trunk_cache_limit="much")


def test_what_draws_random_numbers_is_refused(completions: Path, llama: Path, tmp_path: Path) -> None:
    prepared = prepare(upper(completions, llama, tmp_path / "run"))
    before = prepared.base.model.state_dict().keys()
    assert open_trunk(prepared, SAID.append) is None and prepared.base.model.state_dict().keys() == before
    with pytest.raises(UnsupportedError, match="random numbers below"):
        run(upper(completions, llama, tmp_path / "run", trunk_cache=str(tmp_path / "kept")), progress=False)


def test_changed_weights_are_noticed(completions: Path, steady: Path, tmp_path: Path) -> None:
    prepared = prepare(upper(completions, steady, tmp_path / "run"))
    cache = open_trunk(prepared, SAID.append)
    assert cache is not None
    batch = prepared.collator([prepared.train[0]])
    with torch.no_grad():
        prepared.base.model.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(UnsupportedError, match="changed"), cache.serving(batch):
        pass
