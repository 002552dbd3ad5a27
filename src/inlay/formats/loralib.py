"""Single files of tensors: Microsoft's loralib, and the (IA)³ vectors of t-few.

    <layer>.lora_A (r, in), <layer>.lora_B (out, r)      loralib; h = W x + (alpha / r) B A x
    <layer>.multi_lora_b (out, 1)                        t-few: the layer's output is rescaled
    <module>.<parameter>                                 any other tensor: a module that was trained whole

Such a file does not contain the alpha it was trained with, so it must be given. A fused matrix of loralib
(`MergedLinear`) does not record which of its parts are adapted, so it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.method import Method
from inlay.core.contracts.pieces import DeltaPiece
from inlay.core.errors import AdapterFileError, ConfigError
from inlay.core.model.select import Places
from inlay.core.model.view import ModelView
from inlay.formats.archive import Archive, archive
from inlay.formats.exchange import Entry, Reading, restore
from inlay.formats.single import LORA, SCALE, kind_of


def read(
    model: nn.Module, path: Path, *, name: str | None, trainable: bool, allow_pickle: bool, alpha: float | None
) -> Adapter:
    """Attach an adapter from one file of tensors, strictly.

    Raises:
        ConfigError: it is a LoRA, but `alpha` is not given.
    """
    file = archive(path, allow_pickle=allow_pickle)
    wrong: list[str] = []
    if kind_of(file) == "loralib":
        reading = _lora(file, ModelView(model), alpha, wrong)
    else:
        reading = _ia3(file, ModelView(model), wrong)
    return restore(model, reading, file, name=name or "default", trainable=trainable, wrong=wrong)


def _lora(file: Archive, view: ModelView, alpha: float | None, wrong: list[str]) -> Reading:
    from inlay.methods.lora import LoRA

    if alpha is None:
        raise ConfigError(
            f"{file.path} does not contain the alpha that its LoRA was trained with: give the training script's, such "
            "as load(..., alpha=16)"
        )
    ranks = {}
    for stored, shape in file.shapes.items():
        path = stored.removesuffix(".lora_A")
        if path == stored or path not in view.layers:
            continue
        ranks[path] = shape[0]
        if file.shapes.get(f"{path}.lora_B", (0, shape[0]))[-1] != shape[0]:
            wrong.append(
                f"{path}: lora_A has {shape[0]} rows and lora_B {file.shapes[f'{path}.lora_B'][-1]} columns, as for a "
                "fused matrix, but the file does not say which parts of it are adapted"
            )
    rank = max(set(ranks.values()), key=list(ranks.values()).count, default=1)
    pattern = {p: r for p, r in ranks.items() if r != rank}
    method = LoRA(rank=rank, alpha=alpha, rank_pattern=pattern)
    return _reading(file, view, method, list(ranks), {"a": LORA[0], "b": LORA[1]}, wrong)


def _ia3(file: Archive, view: ModelView, wrong: list[str]) -> Reading:
    from inlay.methods.ia3 import IA3

    paths = [n.removesuffix(SCALE) for n in file.shapes if n.endswith(SCALE)]
    there = [p for p in paths if p in view.layers]
    return _reading(file, view, IA3(entering=()), there, {"scale": SCALE}, wrong)


def _reading(
    file: Archive, view: ModelView, method: Method, paths: list[str], names: Mapping[str, str], wrong: list[str]
) -> Reading:
    if not paths:
        raise AdapterFileError(f"{file.path}: none of its layers is in this model ({type(view.model).__name__})")
    saved = _whole(file, view, names, wrong)

    def entries(adapter: Adapter) -> Iterator[Entry]:
        for piece in adapter.pieces:
            assert isinstance(piece, DeltaPiece)
            for ours, value in piece.delta.state_dict().items():
                shape = tuple(value.shape)
                vector = len(shape) == 1
                yield Entry(
                    f"delta/{piece.key}/{ours}",
                    {f"{piece.site.path}{names[ours]}": (*shape, 1) if vector else shape},
                    torch.Tensor.flatten if vector else _same,
                )
        for name, value in adapter.copies.items():
            yield Entry(f"copy/{name}", {name: tuple(value.shape)})

    return Reading(method, Places.of(paths, None), entries, saved)


def _same(value: Tensor) -> Tensor:
    return value


def _whole(file: Archive, view: ModelView, names: Mapping[str, str], wrong: list[str]) -> list[str]:
    """Modules of which all parameters are in the file; notes a problem for modules with only some of them."""
    rest = [n for n in file.shapes if not n.endswith(tuple(names.values()))]
    found = []
    for path in dict.fromkeys(n.rpartition(".")[0] for n in rest):
        if path not in view.modules or not path:
            continue
        missing = [n for n, _ in view.modules[path].named_parameters(prefix=path) if n not in rest]
        if missing:
            wrong.append(f"only a part of {path} was trained ({', '.join(missing)} is not in the file)")
        else:
            found.append(path)
    return found
