"""(IA)³ in PEFT's files.

    <path>.ia3_l    (out, 1) rescales the layer's output; (1, in) at `feedforward_modules` rescales its input

Parts of a fused layer become one vector for the whole layer, with ones for the other parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.pieces import DeltaPiece
from inlay.core.model.view import ModelView
from inlay.formats.archive import Archive
from inlay.formats.configuration import Config
from inlay.formats.exchange import Entry, Reading, Writing
from inlay.formats.peft import targets
from inlay.formats.peft.common import PREFIX, header, places_of
from inlay.formats.peft.copies import read_copies, write_copies

SUFFIX = ".ia3_l"


def read(config: Config, view: ModelView, archive: Archive) -> Reading:
    from inlay.methods.ia3 import IA3

    stored = {n.removeprefix(PREFIX).removesuffix(SUFFIX) for n in archive.shapes if n.endswith(SUFFIX)}
    copies = read_copies(config, view, archive.shapes, PREFIX)
    paths = targets.sites(config, view, stored)
    entering = targets.ends_or_pattern(config, "feedforward_modules", paths)
    config.ignore("fan_in_fan_out", "init_ia3_weights")

    def entries(adapter: Adapter) -> Iterator[Entry]:
        for piece in adapter.pieces:
            assert isinstance(piece, DeltaPiece)
            size = piece.delta.state_dict()["scale"].shape[0]
            shape = (1, size) if piece.site.path in entering else (size, 1)
            yield Entry(f"delta/{piece.key}/scale", {f"{PREFIX}{piece.site.path}{SUFFIX}": shape}, torch.Tensor.flatten)
        yield from copies.entries(adapter)

    return Reading(IA3(entering=tuple(entering)), places_of(paths), entries, copies.paths, copies.checks)


def write(adapter: Adapter, view: ModelView) -> Writing:
    from inlay.methods.ia3 import InputDelta

    tensors: dict[str, Tensor] = {}
    entering: list[str] = []
    for piece in adapter.pieces:
        assert isinstance(piece, DeltaPiece)
        site, name = piece.site, f"{PREFIX}{piece.site.path}{SUFFIX}"
        vector = piece.delta.state_dict()["scale"].detach()
        if isinstance(piece.delta, InputDelta):
            entering.append(site.path)
            tensors[name] = vector[None]
        elif site.part is None:
            tensors[name] = vector[:, None]
        else:
            whole = tensors.get(name, torch.ones(view.layers[site.path].out_features, 1))
            tensors[name] = site.part.put(whole, vector[:, None].to(whole), 0)
    saved, copied = write_copies(adapter, view, PREFIX)
    paths = list(dict.fromkeys(n.removeprefix(PREFIX).removesuffix(SUFFIX) for n in tensors))
    config: dict[str, Any] = header(view, "IA3", saved) | {
        # PEFT requires each word of one list to be in the other, and compares ends of names character by character.
        "target_modules": paths,
        "feedforward_modules": entering,
        "fan_in_fan_out": any(type(view.modules[p]).__name__.endswith("Conv1D") for p in paths),
        "init_ia3_weights": True,
    }
    return Writing(config, tensors | copied)
