"""What every test runs under: no network, one torch thread a worker, repeatable property tests; tiny bases."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports the hub's client, which reads these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import HealthCheck, settings

from tests import tiny

# No deadline: the first example pays for imports and for building models.
settings.register_profile(
    "inlay", deadline=None, derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("inlay")


def pytest_collection_finish() -> None:
    """What was imported and collected outlives every test; looking it through for garbage takes a while each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def accelerator_state() -> Iterator[None]:
    """For tests that make an `Accelerator` or a `Trainer`: the process keeps the precision of the first one."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Several workers share the cores; more threads than cores make each of them slower."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data, `INLAY_SHARED` or `../shared`; the test is skipped where it is absent."""
    folder = Path(os.environ.get("INLAY_SHARED") or Path(__file__).parents[2] / "shared")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set INLAY_SHARED to its folder")
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny base; a decoder."""
    return tiny.llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny base; an encoder."""
    return tiny.bert(tmp_path_factory.mktemp("base") / "bert")


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny base; an encoder–decoder."""
    return tiny.t5(tmp_path_factory.mktemp("base") / "t5")


@pytest.fixture(scope="session")
def completions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of prompts and completions."""
    return tiny.jsonl(tmp_path_factory.mktemp("data") / "completions.jsonl")
