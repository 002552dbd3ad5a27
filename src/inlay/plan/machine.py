"""How fast a machine is: this one is measured in less than a second, and kept; other GPUs have data sheets."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from inlay.core.errors import ConfigError, nearest
from inlay.machine.kept import kept
from inlay.machine.precision import Precision, circumstances, half_of, is_slow
from inlay.plan.setting import Setting

if TYPE_CHECKING:
    import torch

    from inlay.plan.step import Trace

GIGA = 10**9
# Memory (GiB), dense half-precision products (TFLOP/s, summed in float32), float32 products, bandwidth (GB/s);
# from the makers' data sheets.
GPUS: Mapping[str, tuple[int, float, float, float]] = {
    "T4": (16, 65, 8.1, 320),
    "V100": (32, 125, 15.7, 900),
    "RTX 3060": (12, 51, 12.7, 360),
    "RTX 3090": (24, 71, 35.6, 936),
    "RTX 4060 Ti": (16, 88, 22.1, 288),
    "RTX 4080": (16, 97.5, 48.7, 717),
    "RTX 4090": (24, 165, 82.6, 1008),
    "RTX 5090": (32, 210, 104.8, 1792),
    "A10G": (24, 70, 31.2, 600),
    "L4": (24, 121, 30.3, 300),
    "L40S": (48, 362, 91.6, 864),
    "RTX A6000": (48, 155, 38.7, 768),
    "A100 40GB": (40, 312, 19.5, 1555),
    "A100 80GB": (80, 312, 19.5, 2039),
    "H100": (80, 989, 67, 3350),
    "H200": (141, 989, 67, 4800),
}
WITHOUT_BF16 = ("T4", "V100")  # GPUs before Ampere
REACHED_PRODUCTS, REACHED_BANDWIDTH = 0.45, 0.7  # shares of the data sheet that training steps usually reach
GPU_OVERHEAD_BYTES = 0.6 * 2**30  # the driver's context and the libraries' workspaces
LASTS = 30 * 86_400  # seconds until this machine is measured anew
LONG = 0.2  # a measurement of so many seconds is good enough
SPARE = 0.97  # usable share of a GPU's memory; the allocator loses the rest by rounding and fragmentation


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Rates of one device.

    Attributes:
        memory: bytes; None if unknown.
        flops: operations per second in matrix products, by precision.
        bandwidth: bytes per second in everything else.
        overhead_bytes: memory taken before there is any tensor.
        measured: whether the rates were measured on this machine, not taken from a data sheet.
        age: seconds since they were measured; None if they were not.
    """

    name: str
    gpu: bool
    memory: int | None
    flops: Mapping[Precision, float]
    bandwidth: float
    overhead_bytes: float
    measured: bool
    age: float | None = None

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "flops": dict(self.flops)}

    def seconds(self, seen: Trace, setting: Setting, trained: int) -> float:
        """Seconds of a step: products, the rest at the memory's speed, and the optimizer's pass over its states."""
        one = seen.flops / self.flops[setting.precision] + seen.bytes_moved / self.bandwidth
        return one * setting.accumulate + trained * (16 + setting.optimizer_bytes * 2) / self.bandwidth


def machine_named(name: str) -> Machine:
    """A GPU by its name, in any spelling with the same letters and digits; the memory's size may be left out.

    Raises:
        ConfigError: the GPU is unknown.
    """
    plain = {_plain(known): known for known in GPUS}
    wanted = _plain(name.lower().removeprefix("nvidia").removeprefix("geforce").strip())
    wanted = wanted.removeprefix("geforce")
    found = plain.get(wanted) or next(
        # Only the size may be left out: an RTX 4060 is not an RTX 4060 Ti, which has twice the memory.
        (known for key, known in plain.items() if wanted and re.fullmatch(re.escape(wanted) + r"\d+gb", key)),
        None,
    )
    if found is None:
        raise ConfigError(f"unknown GPU {name!r}{nearest(name, GPUS)}")
    memory, half, single, bandwidth = GPUS[found]
    return Machine(
        name=found,
        gpu=True,
        memory=round(memory * 2**30 * SPARE),
        flops={
            "fp32": single * 1e12 * REACHED_PRODUCTS,
            "bf16": (single if found in WITHOUT_BF16 else half) * 1e12 * REACHED_PRODUCTS,  # emulated in float32
            "fp16": half * 1e12 * REACHED_PRODUCTS,
        },
        bandwidth=bandwidth * GIGA * REACHED_BANDWIDTH,
        overhead_bytes=GPU_OVERHEAD_BYTES,
        measured=False,
    )


def half_planned(gpu: str | None, device: str | None) -> Precision | None:
    """The 16-bit precision that training would choose on a GPU, given by name, or on a device here (`half_of`).

    Raises:
        ConfigError: the GPU is unknown.
    """
    if gpu is not None:
        return "fp16" if machine_named(gpu).name in WITHOUT_BF16 else "bf16"
    return half_of(_there(device or "cpu"))


def calibrate(device: str = "cpu", *, anew: bool = False) -> Machine:
    """Measure this machine, in less than a second; once in `LASTS` for each processor, torch and number of threads.

    Args:
        anew: measure in any case.

    Raises:
        ConfigError: there is no such device here.
    """
    import torch

    at = torch.device(_there(device))
    gpu = at.type == "cuda"
    device_name = torch.cuda.get_device_name(at) if gpu else "cpu"
    where = {"device": device_name, "threads": torch.get_num_threads()}
    found, age = kept(
        "speed", circumstances() | where, lambda: _rates(at), usable=_are_rates, lasts=-1.0 if anew else LASTS
    )
    return Machine(
        name=device_name if gpu else "this machine's CPU",
        gpu=gpu,
        memory=_memory(at),
        flops={"fp32": found["fp32"], "bf16": found["bf16"], "fp16": found["bf16"]},
        bandwidth=found["bandwidth"],
        overhead_bytes=GPU_OVERHEAD_BYTES if gpu else resident_bytes(),
        measured=True,
        age=age,
    )


def _rates(at: torch.device) -> dict[str, float]:
    """A product of matrices as training has them, in both precisions, and a sum of vectors larger than any cache."""
    import torch

    def rate(dtype: torch.dtype) -> float:
        # A product in 16 bits that the processor only imitates takes a hundred times as long.
        size = 8192 if at.type == "cuda" else 256 if is_slow(dtype, at.type) else 1024
        x, w = (torch.ones(size, size, dtype=dtype, device=at) for _ in range(2))
        return 2 * size**3 / _fastest(lambda: x @ w, at)

    long = torch.ones(2**24 if at.type == "cpu" else 2**27, device=at)
    moved = _fastest(lambda: torch.add(long, 1.0, out=long), at)
    return {
        "fp32": rate(torch.float32),
        "bf16": rate(torch.bfloat16),
        "bandwidth": 2 * long.numel() * long.element_size() / moved,
    }


def _are_rates(found: Any) -> bool:
    """Whether a file has what `_rates` gives."""
    return isinstance(found, dict) and all(
        isinstance(found.get(key), float) and 0 < found[key] < math.inf for key in ("fp32", "bf16", "bandwidth")
    )


def _there(device: str) -> str:
    """The kind of a device, if there is one here."""
    import torch

    if device not in ("cpu", "cuda"):
        raise ConfigError(f"device {device!r} is unknown; known: cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device here; name the one to plan for with --gpu, or give --device cpu")
    return device


def resident_bytes() -> float:
    """Memory of this process now: on a CPU, what interpreter and libraries take before there is a model."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        import resource

        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _memory(at: object) -> int | None:
    import os

    import torch

    if getattr(at, "type", "cpu") == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as limit:
            text = limit.read().strip()
    except OSError:
        text = "max"
    return min(whole, int(text)) if text.isdigit() else whole


def _fastest(work: object, at: object) -> float:
    import torch

    best = float("inf")
    began = time.perf_counter()
    for attempt in range(4):
        if attempt > 1 and time.perf_counter() - began > LONG:
            break
        start = time.perf_counter()
        work()  # type: ignore[operator]
        if getattr(at, "type", "cpu") == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
