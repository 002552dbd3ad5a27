"""Loading a base from its files, quantised layer by layer while they are read.

transformers builds the model without values, reads the tensors one by one, and passes the weights of the layers to
quantise to bitsandbytes or torchao one at a time. But it maps all files of a checkpoint at once, which counts in full
against a limit on a process's memory. So it is given `Stored` tensors instead: a place in a safetensors file, read when
asked for and not kept.

The linear layers of the numbered blocks are quantised; embeddings, poolers and the output head are not.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inlay.bases import register
from inlay.core.errors import ConfigError
from inlay.core.model.layer import read_weight, store_of, write_weight
from inlay.core.model.originals import INDEX, SINGLE, weight_map
from inlay.core.model.view import ModelView

LIBRARIES = {
    "nf4": "bitsandbytes",
    "fp4": "bitsandbytes",
    "int8": "bitsandbytes",
    "torchao-int8": "torchao",
    "torchao-int4": "torchao",
}
BLOCK = 64  # weights that share a constant, in QLoRA and in our int4
MMAP_THRESHOLD = -3  # glibc's number for this option
LARGEST = 32 * 2**20  # up to here glibc adapts the threshold by itself
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor that stays in its file until it is asked for: ``stored[...]``."""

    path: Path
    start: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __getitem__(self, index: Any) -> Tensor:
        if not self.size:
            return torch.empty(self.shape, dtype=self.dtype)[index]
        raw = bytearray(self.size)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            view, at = memoryview(raw), 0
            while at < self.size:
                read = file.readinto(view[at:])
                if not read:
                    raise ConfigError(f"{self.path} ends before its last tensor: it is truncated. Copy it again")
                at += read
        return torch.frombuffer(raw, dtype=self.dtype).view(self.shape)[index]


def stored_tensors(source: str) -> dict[str, Stored]:
    """Every tensor of a checkpoint by name, without reading any.

    Args:
        source: folder, or hub id (in the local cache or on the hub).

    Raises:
        ConfigError: there are no safetensors files, or one is damaged.
    """
    found: dict[str, Stored] = {}
    for path in _files(source):
        found |= _header(path)
    return found


def _files(source: str) -> list[Path]:
    from transformers.utils import cached_file

    def locate(name: str) -> Path | None:
        at = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        return None if at is None else Path(at)

    single = locate(SINGLE)
    if single is not None:
        return [single]
    index = locate(INDEX)
    if index is None:
        raise ConfigError(
            f"base {source} has no safetensors files, and others cannot be quantised while they are read. Save the "
            "model once with save_pretrained, or leave --quantize out"
        )
    names = sorted(set(weight_map(index).values()))
    paths = [locate(name) for name in names]
    missing = [name for name, path in zip(names, paths, strict=True) if path is None]
    if missing:
        raise ConfigError(f"base {source} lacks {', '.join(missing[:4])}, which its index lists. Copy the whole folder")
    return [path for path in paths if path is not None]


def _header(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                raise ValueError(f"its header claims {length} bytes, but the file has {size}")
            header = json.loads(file.read(length))
        found = {}
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = (8 + length + at for at in entry["data_offsets"])
                dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
                if end > size or end - start != torch.Size(shape).numel() * dtype.itemsize:
                    raise ValueError(f"{name} does not fit into a file of {size} bytes")
                found[name] = Stored(path, start, end - start, dtype, shape)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not a whole safetensors file ({error}). Download it again") from error
    return found


def read_quantised(
    auto: Any,
    config: Any,
    tensors: dict[str, Any],
    name: str,
    dtype: torch.dtype,
    *,
    read_in: torch.dtype | None = None,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Load a model, quantising its tensors while they are read; returns it with transformers' loading report.

    Args:
        auto: transformers' auto class for the task.
        config: the model's configuration.
        tensors: name → `Stored`, or a tensor.
        name: the quantisation (`LIBRARIES`).
        dtype: dtype of everything that is not quantised, and of the computation.
        read_in: dtype in which weights are passed to the quantisation; None is `dtype`. It is the same on all machines,
            so that all have the same base: the codes of a weight depend on the dtype it was rounded to before.
        options: options of `from_pretrained`.

    Raises:
        ConfigError: the quantisation is unknown, its library is missing, or it cannot represent some layer.
    """
    check_quantisation(name)
    with torch.device("meta"):
        skeleton = auto.from_config(config)
    kept = _kept(skeleton, name)
    with _returned_at_once():
        model, account = type(skeleton).from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            quantization_config=_quantiser(name, kept, dtype),
            dtype=read_in or dtype,
            output_loading_info=True,
            **options,
        )
    register()
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # else its first evaluation repacks and rounds it
            layer.support_avx512bf16_for_cpu = False
    if LIBRARIES[name] == "torchao":
        from inlay.bases.torchao import PackedLinear

        for layer in model.modules():
            if store_of(layer) is not None:
                layer.__class__ = PackedLinear
    compute_in(model, dtype)
    return model, account


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Set the dtype in which a model with quantised layers computes: cast what is dense, and tell quantised layers.

    What transformers always keeps in float32 stays in float32.
    """
    before = getattr(getattr(model, "config", None), "dtype", dtype)
    for module in model.modules():
        packed = store_of(module) is not None
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None and value.dtype == before and not (packed and name == "weight"):
                    value.data = value.data.to(dtype)
        if packed and hasattr(module, "compute_dtype"):  # 4 bits of bitsandbytes
            layer: Any = module
            layer.compute_dtype = layer.weight.quant_state.dtype = dtype
    if hasattr(model, "config"):
        model.config.dtype = dtype


@contextmanager
def _returned_at_once() -> Iterator[None]:
    """For a block, freed memory of more than 2 MiB goes back to the system (with glibc; elsewhere nothing happens).

    By default glibc soon keeps pieces of up to 32 MiB, and small quantised weights end up between large temporary ones,
    so that the process grows by a third of what it has read.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    stated = os.environ.get("MALLOC_MMAP_THRESHOLD_", "")
    afterwards = int(stated) if stated.isdigit() else LARGEST
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, min(2 * 2**20, afterwards))
    try:
        yield
    finally:
        if mallopt is not None:
            mallopt(MMAP_THRESHOLD, afterwards)


def dequantise(model: nn.Module) -> None:
    """Turn every quantised layer into a dense one with the dequantised values, in place and permanently."""
    for module in list(model.modules()):
        if store_of(module) is not None:
            write_weight(module, *read_weight(module))
    for name in ("hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def check_quantisation(name: str) -> None:
    """Raise a `ConfigError` unless the quantisation is known and its library is installed."""
    if name not in LIBRARIES:
        raise ConfigError(f"quantize={name!r} is unknown; known: {', '.join(LIBRARIES)}")
    if find_spec(LIBRARIES[name]) is None:
        library = LIBRARIES[name]
        raise ConfigError(f"quantize={name} needs {library}, which is not installed: pip install {library}")
    if name == "torchao-int4" and torch.cuda.is_available():
        raise ConfigError("quantize=torchao-int4 only works on a CPU, because its weights are packed for one. Use nf4")


def _kept(skeleton: nn.Module, name: str) -> list[str]:
    """Patterns of the linear layers that are not quantised."""
    view = ModelView(skeleton)
    linear = {path: site for path, site in view.layers.items() if site.kind == "linear"}
    quantised = {path: site for path, site in linear.items() if view.in_blocks(path)}
    if not quantised:
        raise ConfigError(f"{type(skeleton).__name__} has no linear layers in numbered blocks, so nothing to quantise")
    if name == "torchao-int4":
        _check_groups({path: (site.out_features, site.in_features) for path, site in quantised.items()})
    if name in ("nf4", "fp4") and not torch.cuda.is_available():
        _check_widths({path: site.in_features for path, site in quantised.items()}, name)
    if LIBRARIES[name] == "torchao" and any(not isinstance(s.module, nn.Linear) for s in quantised.values()):
        raise ConfigError(f"torchao cannot quantise the layers of {type(skeleton).__name__}; use nf4, fp4 or int8")
    return [re.escape(path) for path in linear if path not in quantised]


def _check_widths(widths: dict[str, int], name: str) -> None:
    from inlay.bases.bitsandbytes import exact

    wrong = [f"{path} ({width})" for path, width in widths.items() if not exact(width, name, BLOCK)]
    if wrong:
        raise ConfigError(
            f"quantize={name}: bitsandbytes computes rows of these lengths wrongly on the CPU: {', '.join(wrong[:4])}"
            f"{' and others' if len(wrong) > 4 else ''}. Use int8, or leave --quantize out"
        )


def _check_groups(sizes: dict[str, tuple[int, int]]) -> None:
    wrong = [f"{path} {rows} × {width}" for path, (rows, width) in sizes.items() if width % BLOCK or rows % 16]
    if wrong:
        raise ConfigError(
            f"quantize=torchao-int4 packs 16 rows and {BLOCK} columns together; these layers are not multiples: "
            f"{', '.join(wrong[:4])}. Use nf4"
        )


def _quantiser(name: str, kept: list[str], dtype: torch.dtype) -> Any:
    """transformers' configuration object for a quantisation."""
    from transformers import BitsAndBytesConfig, TorchAoConfig

    if name in ("nf4", "fp4"):
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=name,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=kept,
        )
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    if name == "torchao-int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=kept)
    from inlay.core.upstream import int4_config

    return TorchAoConfig(int4_config(BLOCK), modules_to_not_convert=kept)
