"""Several configurations in one command: a list in one file, or a file each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inlay.core.errors import ConfigError


def test_runs_of_one_file_and_of_several() -> None:
    from inlay.cli.train import _runs

    shared = {"data": "rows.jsonl", "out": "all", "steps": 2}
    listed = [{"name": "first"}, {"method": "ia3"}, {"out": "elsewhere"}]
    found = _runs({**shared, "runs": listed}, Path("many.yaml"))
    assert [run["out"] for run in found] == ["all/first", "all/2", "elsewhere"]
    assert found[1]["method"] == "ia3" and all(run["steps"] == 2 for run in found)
    assert _runs(dict(shared), None) == [shared]
    for wrong in ("lora", [], [3]):
        with pytest.raises(ConfigError, match=r"runs in many.yaml"):
            _runs({**shared, "runs": wrong}, Path("many.yaml"))


def test_together_in_one_command(tmp_path: Path, command: Any, base: Path, rows: Path) -> None:
    file = tmp_path / "many.yaml"
    common = {"data": str(rows), "base": str(base), "steps": 2, "batch_size": 2, "out": str(tmp_path / "all")}
    file.write_text(json.dumps({**common, "runs": [{"name": "a"}, {"name": "b", "method": "ia3"}]}))
    code, out, err = command("train", "--config", file, "--together", "--json")
    assert code == 0, err
    assert [Path(result["out"]).name for result in json.loads(out)] == ["a", "b"]
    code, out, err = command("train", "--config", file, "--together", "--resume")
    assert code == 0 and out.count("trained parameters") == 2, err
    code, _, err = command("train", "--config", file)
    assert code != 0 and "already in use" in err
    values = {key: value for key, value in common.items() if key != "out"}
    file.write_text(json.dumps({**values, "runs": [{"out": str(tmp_path / "c")}, {"method": "features"}]}))
    code, _, err = command("train", "--config", file, "--together")
    assert code != 0 and "baseline" in err
