"""Files that users have on their disks: adapters and runs written by the code of older commits still load.

The files in golden/ were written by scripts/write_golden_adapters.py, which says at which commit; the expected logits
are those of that code, and for PEFT's files those of PEFT.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import inlay
from inlay.cli.main import main
from inlay.train import RunResult, run
from inlay.train.running import resumed_config
from tests import tiny
from tests.formats.golden_bases import base, folder_of, sampled

GOLDEN = Path(__file__).parent / "golden"
EXPECTED: dict[str, dict[str, Any]] = json.loads((GOLDEN / "expected.json").read_text())
FILE = "adapter.safetensors"


def close(actual: list[float], expected: list[float]) -> bool:
    largest = max(1.0, *map(abs, expected))
    return len(actual) == len(expected) and all(
        abs(a - e) <= 1e-5 * largest for a, e in zip(actual, expected, strict=True)
    )


def content(path: Path) -> tuple[dict[str, Any], bytes]:
    """The whole file, except for the version of inlay that wrote it: header and bytes of the tensors."""
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    ours = json.loads(header["__metadata__"].pop("inlay"))
    ours.pop("inlay")
    return header | ours, raw[end:]


def still_said(new: Any, old: Any) -> bool:
    """Whether `new` says all that `old` says; a later version may add entries, but not change or drop any."""
    if not isinstance(old, dict):
        return bool(new == old)
    return isinstance(new, dict) and all(key in new and still_said(new[key], value) for key, value in old.items())


@pytest.mark.parametrize("name", EXPECTED["bases"])
def test_the_bases_are_what_they_were(name: str) -> None:
    """If this fails, the zoo's model changed, and the other failures say nothing about reading files."""
    assert close(sampled(name, base(name)), EXPECTED["bases"][name])


@pytest.mark.parametrize("case", EXPECTED["adapters"])
def test_an_adapter_of_before(case: str, tmp_path: Path) -> None:
    entry = EXPECTED["adapters"][case]
    name = entry["model"]
    assert not close(entry["logits"], EXPECTED["bases"][name]), "the adapter hardly does anything"
    model = base(name)
    inlay.load(model, GOLDEN / case, **entry.get("options", {}))
    assert close(sampled(name, model), entry["logits"])
    if case.startswith("native/"):
        inlay.save(model, "default", tmp_path)
        (header, values), (old_header, old_values) = content(tmp_path / FILE), content(GOLDEN / case / FILE)
        assert values == old_values
        assert header.keys() == old_header.keys() and still_said(header, old_header)


@pytest.mark.parametrize("case", EXPECTED["runs"])
def test_a_run_of_before(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its adapter is shown and scored, and its configuration can be read to go on with it."""

    def printed(*words: object) -> Any:
        with pytest.raises(SystemExit) as ended:
            main([*map(str, words), "--json"])
        written = capsys.readouterr()
        assert not ended.value.code, written.err
        return json.loads(written.out)

    entry, adapter = EXPECTED["runs"][case], GOLDEN / case / "adapter"
    assert printed("inspect", adapter)["method"] == entry["method"]
    bare, data = folder_of(entry["base"], tmp_path / "base"), tiny.jsonl(tmp_path / "rows.jsonl", entry["rows"])
    found = printed("evaluate", "--adapter", adapter, "--base", bare, "--data", data)["metrics"]
    assert {name: found[name] for name in entry["metrics"]} == pytest.approx(entry["metrics"], rel=1e-5)
    shutil.copytree(GOLDEN / case, tmp_path / "run")
    config = resumed_config(tmp_path / "run", {})
    assert config.steps == 4 and config.method == entry["method"] and Path(config.data).name == "rows.jsonl"
    assert run(config, resume=True) == RunResult.read(tmp_path / "run" / "result.json")
