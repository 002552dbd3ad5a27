"""`inlay train --compile`: checks that compiled layers compute the same, and how soon compiling pays.

This happens before the first step, on a batch of the run, and does not affect the adapter, its gradients or the random
state, so that a resumed run computes what it would have computed without the stop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inlay.core.errors import UnsupportedError
from inlay.core.upstream import compiler_errors
from inlay.kernels.compiled import blocks_of, compile_layers

if TYPE_CHECKING:
    from inlay.train.prepare import Prepared

PASSES = 3  # timed passes each way; the fastest counts
# Relative difference allowed in the loss and in the gradients' norm: a compiler keeps float32 where the model rounds.
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (1e-2, 1e-1), torch.float16: (1e-2, 1e-1)}


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """The cost and the gain of compiling a run's layers.

    Attributes:
        layers: number of compiled layers.
        seconds: time until the first compiled pass was over, without the pass itself.
        pass_before, pass_after: seconds of a forward and backward pass.
        steps: number of steps after which compiling has paid for itself; None means never.
    """

    layers: int
    seconds: float
    pass_before: float
    pass_after: float
    steps: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def told(self, total: int) -> str:
        """A line for the user."""
        pays = "it does not pay"
        if self.steps is not None:
            pays = f"it {'has paid' if self.steps <= total else 'would have paid'} after {self.steps} steps of {total}"
        return (
            f"compiled {self.layers} layers in {self.seconds:.1f} s: a pass takes {self.pass_after:.3f} s, before "
            f"{self.pass_before:.3f} s; {pays}"
        )


def compile_run(prepared: Prepared, *, first: int = 0) -> tuple[Compilation, Callable[[], None]]:
    """Compile the layers of a run, from number `first` on.

    Returns:
        Its cost and gain, and a function that undoes it.

    Raises:
        UnsupportedError: the layers cannot be compiled, or compute something else when compiled.
    """
    model, config = prepared.base.model, prepared.config
    rows = [prepared.train[i] for i in range(min(config.batch_size, len(prepared.train)))]
    batch = {name: value.to(model.device) for name, value in prepared.collator(rows).items()}
    kept = {name: tensor.detach().clone() for name, tensor in prepared.adapter.tensors().items()}
    _pass(prepared, batch)  # the first pass tries the fast paths
    eager = [_pass(prepared, batch) for _ in range(PASSES)]
    undo = compile_layers(model, first=first)
    try:
        compiled = [_pass(prepared, batch) for _ in range(PASSES + 1)]
        _check_same(prepared, eager, compiled)
    except BaseException as error:
        undo()
        if said := _of_the_compiler(error):
            raise UnsupportedError(f"torch.compile cannot compile these layers: {said}. Leave --compile out") from error
        raise
    finally:
        with torch.no_grad():
            for name, tensor in prepared.adapter.tensors().items():
                tensor.copy_(kept[name])
    before, after = (min(one.seconds for one in passes) for passes in (eager, compiled[1:]))
    seconds, gain = max(0.0, compiled[0].seconds - after), (before - after) * config.accumulate
    steps = math.ceil(seconds / gain) if gain > 0 else None
    found = Compilation(
        layers=len(blocks_of(model)) - first, seconds=round(seconds, 3), pass_before=round(before, 5),
        pass_after=round(after, 5), steps=steps,
    )  # fmt: skip
    return found, undo


def _of_the_compiler(error: BaseException) -> str | None:
    """The message of a compiler that failed (torch's, or the system's that it calls); None for other errors."""
    if not isinstance(error, compiler_errors()):
        return None
    return " ".join(str(error).partition("\n\n")[0].split())[:300] or type(error).__name__


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass: its time, its loss, its gradients, and whether it drew random numbers."""

    seconds: float
    loss: float
    gradients: list[Tensor | None]
    random: bool


def _pass(prepared: Prepared, batch: dict[str, Tensor]) -> Pass:
    model, parameters = prepared.base.model, list(prepared.adapter.parameters())
    training = model.training
    model.train()
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        before = _random_state(devices)
        _wait(devices)
        began = time.perf_counter()
        loss = model(**batch)["loss"]
        loss.backward()
        value = float(loss.detach())
        _wait(devices)
        seconds = time.perf_counter() - began
        random = any(not torch.equal(a, b) for a, b in zip(before, _random_state(devices), strict=True))
    gradients = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    model.train(training)
    return Pass(seconds, value, gradients, random)


def _check_same(prepared: Prepared, eager: list[Pass], compiled: list[Pass]) -> None:
    """Compare losses and gradients, unless the pass draws random numbers, which a compiler draws in another order."""
    if any(one.random for one in (*eager, *compiled)):
        return
    of_loss, of_gradient = TOLERANCE.get(prepared.base.model.dtype, TOLERANCE[torch.bfloat16])
    one, other = compiled[-1], eager[-1]
    pairs = [(a, b) for a, b in zip(one.gradients, other.gradients, strict=True) if a is not None and b is not None]
    apart = math.sqrt(sum(float((a - b).float().square().sum()) for a, b in pairs))
    whole = math.sqrt(sum(float(b.float().square().sum()) for _, b in pairs))
    missing = any((a is None) != (b is None) for a, b in zip(one.gradients, other.gradients, strict=True))
    if missing or abs(one.loss - other.loss) > of_loss * abs(other.loss) or apart > of_gradient * whole:
        raise UnsupportedError(
            f"compiled layers do not compute the same as the model (loss {one.loss:.6g} instead of {other.loss:.6g}, "
            f"gradients differ by {apart / max(whole, 1e-30):.1e}). Leave --compile out"
        )


def _random_state(devices: list[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def _wait(devices: list[torch.device]) -> None:
    for device in devices:
        torch.cuda.synchronize(device)
