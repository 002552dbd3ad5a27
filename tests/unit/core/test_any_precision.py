"""Every method in every precision: on a base of 16 bits, cast with its adapters, and under autocast.

Processors and types differ in what they have operators of: decompositions are for 32 bits and more, an LSTM of bfloat16
is there on some processors only. Run it as it is and with `ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import inlay
from inlay.core.errors import UserError
from inlay.methods import registry
from inlay.testing.models import ZOO
from tests.golden.hand import inputs

HALVES = (torch.bfloat16, torch.float16)


def attached(name: str, method: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model, of values that every type has, or None where the method is not for it."""
    torch.manual_seed(0)
    specimen = ZOO[name]
    model = specimen.build()
    for parameter in model.parameters():  # else LoftQ, for one, would begin with other codes
        parameter.data = parameter.data.bfloat16().half().to(dtype)
    data = [specimen.batch(3, seed) for seed in range(2)] if method.needs_data else None
    try:
        inlay.attach(model, method, data=data)
    except UserError:
        return None
    return model.train()


def learned(model: Any, name: str) -> Tensor:
    """Logits, and a step after them: a finite gradient for all that is trained, in its own type, and what clocks do."""
    logits: Tensor = model(**inputs(name, ragged=True)).logits
    logits.to(torch.promote_types(logits.dtype, torch.float32)).square().mean().backward()
    adapter = inlay.adapters(model)["default"]
    trained = list(adapter.parameters())
    for parameter in trained:
        assert parameter.grad is not None and parameter.grad.dtype == parameter.dtype
        assert parameter.grad.isfinite().all()
    for _ in range(4):  # as many as the examples' schedules have
        torch.optim.SGD(adapter.parameter_groups(1e-3)).step()
    assert not any(parameter.isnan().any() for parameter in trained)  # diff pruning ends with infinite gates
    return logits.detach().double()


def near(found: Tensor, exact: Tensor) -> bool:
    return bool((found - exact).norm() <= 5e-2 * exact.norm())


@pytest.mark.parametrize("key", registry())
def test_every_method_in_every_precision(key: str) -> None:
    method = example(key)
    name = "llama" if attached("llama", method) is not None else "gpt2"  # which has biases for BitFit
    exact = learned(attached(name, method).double(), name)
    for dtype in HALVES:
        model = attached(name, method, dtype)  # a base of 16 bits
        assert {p.dtype for p in inlay.adapters(model)["default"].parameters()} == {torch.float32}
        assert near(learned(model, name), exact), f"a base of {dtype}"
        model = attached(name, method).to(dtype)  # cast with its adapters
        assert near(learned(model, name), exact), f"cast to {dtype}"
        with torch.autocast("cpu", dtype):
            assert near(learned(attached(name, method), name), exact), f"autocast to {dtype}"


@pytest.mark.parametrize("key", registry())
def test_an_encoder_decoder_in_float16(key: str) -> None:
    model = attached("t5", example(key), torch.float16)
    if model is not None:
        assert near(learned(model, "t5"), learned(attached("t5", example(key)).double(), "t5"))


def example(key: str) -> Any:
    return next(m for m in registry()[key].examples() if not getattr(m, "dropout", 0))
