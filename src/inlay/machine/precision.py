"""The precisions in which a device computes fast and safely, and the choice of one for a base.

    device                             16 bits   precision for a base stored in 16 bits
    GPU with bf16 (Ampere and later)   bf16      bf16
    GPU before (Turing, Volta, …)      fp16      fp16, and training scales its gradients
    CPU with bf16 products             bf16      bf16
    any other CPU                      none      fp32: 16 bits are emulated there, up to 200 times slower
    Apple's GPU                        bf16 if it can multiply and differentiate in it, else none

A base stored in 32 bits is computed in 32 bits: `auto` never rounds what is stored, except between the two kinds of 16
bits and beside quantised layers, whose rounding is far larger. Adapters are float32 everywhere.

A CPU with AMX reports it. For others (AVX512-BF16 alone is faster than float32 on some processors only; other makers
have other flags; ONEDNN_MAX_CPU_ISA may forbid instructions) a product in each precision is timed, once per machine.
"""

from __future__ import annotations

import functools
import os
import platform
import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from inlay.machine.kept import kept

if TYPE_CHECKING:
    import torch
    from torch import nn

Precision: TypeAlias = Literal["fp32", "bf16", "fp16"]
Asked: TypeAlias = Literal["auto", "bf16", "fp32", "fp16"]
ASKED: tuple[Asked, ...] = get_args(Asked)
_NAMES: dict[Precision, str] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_RESTRICTIONS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_SIZE = 256  # size of the timed products: 0.1 ms if bf16 is native, 5 ms if it is emulated
_ATTEMPTS, _HOPELESS = 5, 4  # runs of each product; no more are needed if bf16 is so many times slower
_WORTH = 0.8  # bf16 counts as native below this share of fp32's time; emulated it takes as long or far longer


@dataclass(frozen=True)
class Choice:
    """A precision, and why it was chosen.

    Attributes:
        precision: precision of the base's weights and of computation.
        why: the reason, for the user, without a full stop.
    """

    precision: Precision
    why: str

    def __str__(self) -> str:
        return f"precision: {self.precision} ({self.why})"


def choose(
    asked: Asked, stored: Precision, half: Precision | None, *, device: str = "this CPU", quantised: bool = False
) -> Choice:
    """The precision in which to compute a base.

    Args:
        asked: ``auto``, or a precision that is used whatever it costs.
        stored: precision of the base's files.
        half: the device's fast 16-bit precision (`half_of`); None if it has none.
        device: name of the device, for the reason.
        quantised: whether the base's layers are quantised; `stored` then says little about their computation.
    """
    if asked != "auto":
        emulated = asked != "fp32" and half is None
        return Choice(
            asked, f"as asked; {device} has no {asked} instructions, fp32 is faster" if emulated else "as asked"
        )
    if stored == "fp32" and not quantised:
        return Choice("fp32", "as the base is stored")
    what = "beside quantised layers" if quantised else f"the base is stored in {stored}"
    if half is None:
        return Choice("fp32", f"{device} has no bf16 instructions; {what}")
    if half == "fp16":
        return Choice("fp16", f"{device} has no bf16, so gradients are scaled; {what}")
    return Choice(half, f"{device} computes in it; {what}")


def training_device() -> str:
    """The device on which `inlay train` runs, chosen as by `transformers.Trainer`: cuda, mps or cpu."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if found is None else found.type


def device_named(device: str) -> str:
    """A device's name for the user."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return "this CPU" if device == "cpu" else f"this machine's {device} device"


@functools.cache
def half_of(device: str) -> Precision | None:
    """The 16-bit precision in which a kind of device (``cpu``, ``cuda``, ``mps``) is fast; None if there is none."""
    import torch

    if device == "cpu":
        return "bf16" if _cpu_has_bf16() else None
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "bf16" if _learns_in_bf16(device) else None


def is_slow(dtype: torch.dtype, device: str) -> bool:
    """Whether products in this dtype are emulated on a kind of device."""
    return device == "cpu" and dtype.itemsize == 2 and dtype.is_floating_point and half_of("cpu") is None


def dtype_of(precision: Precision) -> torch.dtype:
    """A precision as torch dtype."""
    import torch

    return getattr(torch, _NAMES[precision])  # type: ignore[no-any-return]


def precision_of(dtype: Any) -> Precision:
    """The inverse of `dtype_of`, for torch dtypes and their names; dtypes with more bits count as fp32."""
    name = str(dtype).rpartition(".")[2]
    return next((precision for precision, known in _NAMES.items() if known == name), "fp32")


# -- what a CPU has -------------------------------------------------------------------------------------------


def _cpu_has_bf16() -> bool:
    said = _flags()
    return bool(kept("bf16", circumstances(), _bf16_pays).value) if said is None else said


def _flags() -> bool | None:
    """Whether products are faster in bf16 according to the processor's flags; None if only a trial can tell."""
    import torch

    restricted = any(name in os.environ for name in _RESTRICTIONS)
    multiplies = torch.backends.mkldnn.is_available() and torch.cpu.get_capabilities().get("amx_bf16")
    return True if multiplies and not restricted else None


def circumstances() -> dict[str, Any]:
    """What the speed of this CPU depends on, as JSON: the processor, what of it is in use, and torch's version."""
    import torch

    return {
        "torch": torch.__version__,
        "processor": [platform.machine(), _processor(), torch.cpu.get_capabilities()],
        "in use": [torch.backends.cpu.get_cpu_capability(), torch.backends.mkldnn.is_available()],
        "restrictions": {name: os.environ.get(name) for name in _RESTRICTIONS},
    }


def _processor() -> str:
    """Its name, where the system tells one: Linux says it to nobody who asks for `platform.processor`."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _bf16_pays() -> bool:
    """Whether a product in bfloat16 takes clearly less time than one in float32; takes a few milliseconds."""
    import torch

    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    factors = {dtype: torch.ones(_SIZE, _SIZE, dtype=dtype) for dtype in best}
    with torch.no_grad():
        for attempt in range(_ATTEMPTS):  # alternating, so that other work on the machine slows both
            for dtype, factor in factors.items():
                began = time.perf_counter()
                factor @ factor
                if attempt:  # the first one includes set-up
                    best[dtype] = min(best[dtype], time.perf_counter() - began)
            if _HOPELESS * best[torch.float32] < best[torch.bfloat16] < float("inf"):
                break
    return best[torch.bfloat16] < _WORTH * best[torch.float32]


def _learns_in_bf16(device: str) -> bool:
    """Whether the device can compute a product and its gradient in bf16."""
    import torch

    try:
        x = torch.ones(8, 8, dtype=torch.bfloat16, device=device, requires_grad=True)
        (x @ x).sum().backward()
        return x.grad is not None and bool((x.grad == 16).all())
    except (RuntimeError, TypeError, NotImplementedError):
        return False


# -- telling a user who loads models without us ---------------------------------------------------------------

_told = False


def warn_if_slow(model: nn.Module) -> None:
    """Warn, once per process, that a model that gets adapters computes in a dtype without instructions on this CPU."""
    if _told:
        return
    sizes: dict[tuple[torch.dtype, str], int] = {}
    for parameter in model.parameters():
        key = (parameter.dtype, parameter.device.type)
        sizes[key] = sizes.get(key, 0) + parameter.numel()
    if not sizes:
        return
    dtype, device = max(sizes, key=lambda key: sizes[key])
    if is_slow(dtype, device):
        told_of_slowness()
        warnings.warn(
            f"this model computes in {str(dtype).removeprefix('torch.')}, for which this CPU has no instructions: "
            "float32 is up to 200 times faster here and loses nothing. Call model.float(), or load it with "
            "dtype=torch.float32",
            stacklevel=4,
        )


def told_of_slowness() -> None:
    """Record that the user knows already, so that there is no warning."""
    global _told
    _told = True
