"""What keeps memory small in training, and what happens when there is not enough of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from inlay.core.errors import ConfigError
from inlay.train import RunConfig, RunResult, run
from inlay.train.config import Optimizer
from inlay.train.optimizers import NAMES, check_optimizer
from inlay.train.passes import parts, ran_out, starts
from inlay.train.trainer import AdapterTrainer
from tests import tiny
from tests.unit.train.test_resume import interrupted
from tests.unit.train.test_run import config, metrics

CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "68719476736 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base without dropout, so that a step does not depend on how its rows are cut."""
    return tiny.llama(tmp_path_factory.mktemp("base") / "still", dropout=0.0)


@contextmanager
def room_for(rows: int, error: BaseException = CPU, *, after: int = 0, backward: bool = False) -> Iterator[list[int]]:
    """Memory for so many rows a pass, from the pass `after` on; gives the rows of every pass that was tried.

    Args:
        backward: whether a pass that is too large breaks amid its backward pass.
    """
    tried: list[int] = []
    whole: Callable[..., Any] = AdapterTrainer.compute_loss

    def compute_loss(self: AdapterTrainer, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        tried.append(len(starts(inputs)))
        broken = tried[-1] > rows and len(tried) > after
        if broken and not backward:
            raise error
        loss = whole(self, model, inputs, *args, **kwargs)
        if broken:
            first = next(iter(self.adapter.parameters()))  # its gradient is among the last

            def fail(gradient: torch.Tensor) -> None:
                handle.remove()
                raise error

            handle = first.register_hook(fail)
        return loss

    with mock.patch.object(AdapterTrainer, "compute_loss", compute_loss):
        yield tried


def same(one: RunResult, other: RunResult) -> None:
    """The same losses and the same adapter, but for the order of sums."""
    for a, b in zip(metrics(one), metrics(other), strict=True):
        assert a == pytest.approx({k: v for k, v in b.items() if k != "micro_batch"}, rel=2e-3)
    first, second = (load_file(result.adapter / "adapter.safetensors") for result in (one, other))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("error", "after", "backward"),
    [(CPU, 0, False), (torch.OutOfMemoryError("out of memory"), 3, False), (MemoryError(), 3, True)],
)
def test_a_broken_step_is_done_again(
    completions: Path, still: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    error: BaseException, after: int, backward: bool, packing: bool,
) -> None:  # fmt: skip
    """In the first pass of a run, or in the second pass of its second step: the numbers are those of enough memory."""
    asked = config(completions, still, tmp_path / "a", batch_size=8, accumulate=2, eval_share=0, packing=packing)
    asked = asked.changed(trunk_cache="off")
    whole = run(asked, progress=False)
    assert whole.micro_batch is None and "micro_batch" not in metrics(whole)[-1]
    capfd.readouterr()
    with room_for(3, error, after=after, backward=backward) as tried:
        again = run(asked.changed(out=str(tmp_path / "b")), progress=False)
    assert max(tried) == 8 and tried[-1] == 2 and again.micro_batch == 2
    assert [line.get("micro_batch") for line in metrics(again)][-1] == 2
    said = capfd.readouterr().err
    assert said.count("out of memory with 8 rows") == 1
    same(whole, again)


def test_every_row_counts_once(still: Path, tmp_path: Path) -> None:
    """A labelled head: the mean over the step's rows, whatever the passes; seven rows in the last step."""
    data = tiny.jsonl(tmp_path / "rows.jsonl", "classification", 23)
    asked = config(data, still, tmp_path / "a", eval_share=0, batch_size=4, accumulate=2, steps=None, epochs=1)
    whole = run(asked, progress=False)
    with room_for(1, after=2) as tried:
        again = run(asked.changed(out=str(tmp_path / "b")), progress=False)
    once = run(asked.changed(out=str(tmp_path / "c"), batch_size=8, accumulate=1), progress=False)
    # Two whole passes, the third and its halves' first broken, then all of the second step and of the third by ones.
    assert tried[:4] == [4, 4, 4, 2] and tried[4:] == [1] * (8 + 7)
    same(whole, again)
    assert once.steps == whole.steps == 3


def test_dropout_is_drawn_from_where_the_step_began(completions: Path, llama: Path, tmp_path: Path) -> None:
    """What a run gives does not depend on whether it had to find out first, nor on a stop in between."""
    asked = config(completions, llama, tmp_path / "a", settings={"dropout": 0.3}, eval_share=0, save_every=1, steps=4)
    with room_for(2):
        whole = run(asked, progress=False)
        again = interrupted(asked.changed(out=str(tmp_path / "b")), 2)
    assert metrics(whole) == metrics(again) and again.micro_batch == 2
    file = "adapter.safetensors"
    assert (whole.adapter / file).read_bytes() == (again.adapter / file).read_bytes()


def test_evaluation_in_parts(completions: Path, still: Path, tmp_path: Path) -> None:
    asked = config(completions, still, tmp_path / "a", packing=False)
    whole = run(asked, progress=False)
    scored: Callable[..., Any] = AdapterTrainer._scored

    def narrow(self: AdapterTrainer, batch: dict[str, Any]) -> Any:
        if len(batch["labels"]) > 1:
            raise CPU
        return scored(self, batch)

    with mock.patch.object(AdapterTrainer, "_scored", narrow):
        again = run(asked.changed(out=str(tmp_path / "b")), progress=False)
    assert again.metrics["eval_loss"] == pytest.approx(whole.metrics["eval_loss"], rel=1e-5)
    assert again.micro_batch is None


def test_not_even_one_row(completions: Path, still: Path, tmp_path: Path) -> None:
    with room_for(0) as tried, pytest.raises(ConfigError, match="out of memory with one row a pass"):
        run(config(completions, still, tmp_path / "run", batch_size=5), progress=False)
    assert tried == [5, 3, 2, 1]


def test_other_errors_pass(completions: Path, still: Path, tmp_path: Path) -> None:
    with room_for(0, RuntimeError("shapes differ")), pytest.raises(RuntimeError, match="shapes differ"):
        run(config(completions, still, tmp_path / "run"), progress=False)


def test_what_says_that_memory_ran_out() -> None:
    assert all(map(ran_out, (CPU, MemoryError(), torch.OutOfMemoryError(), RuntimeError("CUDA error: out of memory"))))
    assert not any(map(ran_out, (ValueError("out of memory"), RuntimeError("nan"), KeyboardInterrupt())))
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**62, dtype=torch.uint8)
    assert ran_out(raised.value)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
def test_parts(rows: int) -> None:
    padded = {"input_ids": torch.arange(15).reshape(5, 3), "labels": torch.arange(5), "more": 3}
    cut = list(parts(padded, rows))
    assert [len(p["labels"]) for p in cut] == [min(rows, 5 - at) for at in range(0, 5, rows)]
    assert torch.equal(torch.cat([p["input_ids"] for p in cut]), padded["input_ids"]) and cut[0]["more"] == 3
    lengths = (4, 1, 3, 2)
    texts = torch.arange(10)[None]
    packed = {"input_ids": texts, "labels": -texts, "position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    assert len(starts(packed)) == 4
    cut = list(parts(packed, rows))
    assert [len(starts(p)) for p in cut] == [min(rows, 4 - at) for at in range(0, 4, rows)]
    for name, value in packed.items():
        assert torch.equal(torch.cat([p[name] for p in cut], 1), value)


@contextmanager
def optimizers() -> Iterator[list[Any]]:
    """Those that runs in the block have made."""
    made: list[Any] = []
    create = AdapterTrainer.create_optimizer

    def creating(self: AdapterTrainer, *args: Any, **options: Any) -> Any:
        made.append((self, create(self, *args, **options)))
        return made[-1][1]

    with mock.patch.object(AdapterTrainer, "create_optimizer", creating):
        yield made


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("paged")])
def test_optimizers_hold_states_of_the_adapter_alone(completions: Path, llama: Path, tmp_path: Path, name: str) -> None:
    # 256 · 16 numbers: below 4,096, bitsandbytes keeps 32 bits.
    asked = config(completions, llama, tmp_path / name, optimizer=name, method="lora-plus", settings={"rank": 256})
    asked = asked.changed(eval_share=0, steps=2, packing=False)
    with optimizers() as made:
        run(asked, progress=False)
    trainer, optimizer = made[-1]
    inner = getattr(optimizer, "optimizer", optimizer)
    own = {id(p) for p in trainer.adapter.parameters()}
    assert {id(p) for group in inner.param_groups for p in group["params"]} == own
    assert {id(p) for p in inner.state} <= own
    rates = sorted({group["initial_lr"] for group in inner.param_groups})
    assert len(rates) == 2 and rates[1] == pytest.approx(rates[0] * trainer.adapter.method.ratio)
    large = [inner.state[p] for group in inner.param_groups for p in group["params"] if p.numel() >= 4096]
    assert large or name == "sgd"
    states = {t.dtype for state in large for k, t in state.items() if k.startswith("state")}
    assert states == ({torch.uint8} if "8bit" in name else {torch.float32} if name == "lion" else set())


def test_eight_bits_resume(completions: Path, llama: Path, tmp_path: Path) -> None:
    asked = config(completions, llama, tmp_path / "a", optimizer="adamw8bit", settings={"rank": 256}, eval_share=0)
    asked = asked.changed(save_every=1, steps=4)
    whole, again = run(asked, progress=False), interrupted(asked.changed(out=str(tmp_path / "b")), 2)
    assert metrics(whole) == metrics(again)


def test_what_cannot_be_had() -> None:
    assert set(NAMES) == set(get_args(Optimizer))
    with pytest.raises(ConfigError, match="optimizer is 'adam'"):
        RunConfig.of({"data": "rows.jsonl", "out": "run", "optimizer": "adam"})
    with mock.patch("inlay.train.optimizers.find_spec", return_value=None):
        check_optimizer("sgd")
        with pytest.raises(ConfigError, match="bitsandbytes"):
            check_optimizer("adamw8bit")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="give 'adamw8bit'"):
            check_optimizer("paged-adamw8bit")


def test_only_layers_with_gradients_are_computed_again(completions: Path, still: Path, tmp_path: Path) -> None:
    """An adapter in the second layer: the first one runs once a step, and nothing before the adapter has gradients."""
    ran: list[tuple[int, bool]] = []

    def seen(module: torch.nn.Module, given: Any) -> None:
        if type(module).__name__ == "LlamaMLP" and module.training:
            ran.append((numbers[id(module)], given[0].requires_grad))

    asked = config(completions, still, tmp_path / "run", layers=[1], gradient_checkpointing=True, eval_share=0)
    asked = asked.changed(packing=False, trunk_cache="off", steps=3, batch_size=2)
    numbers: dict[int, int] = {}
    train = AdapterTrainer.train

    def training(self: AdapterTrainer, *args: Any, **kwargs: Any) -> Any:
        numbers.update({id(layer.mlp): i for i, layer in enumerate(self.model.model.layers)})
        return train(self, *args, **kwargs)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(seen)
    try:
        with mock.patch.object(AdapterTrainer, "train", training):
            run(asked, progress=False)
    finally:
        hook.remove()
    # Before them, passes without gradients try whether fast paths are exact.
    assert ran[-9:] == [(0, False), (1, True), (1, True)] * 3
