"""Methods whose tensors PEFT stores one to one: a table of names and shapes, and each configuration both ways.

VeRA       vera_lambda_d (r), vera_lambda_b (out); base_model.vera_A, vera_B once, unless left out
LoHa       hada_w1_a (out, r), hada_w1_b (r, in), hada_w2_a, hada_w2_b
LoKr       lokr_w1 or lokr_w1_a and lokr_w1_b, lokr_w2 or lokr_w2_a and lokr_w2_b; scaled by alpha / r always
AdaLoRA    lora_A (r, in), lora_B (out, r), lora_E (r, 1); rank_pattern is a mask of the remaining triplets
OFT        oft_R.weight (blocks, b (b − 1) / 2)
BOFT       boft_R (factors, blocks, b, b), of which only the skew part matters; boft_s (out, 1)
LN tuning  ln_tuning_layers.weight and .bias: the norm's new values, where ours are differences
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.pieces import DeltaPiece
from inlay.core.errors import UnsupportedError
from inlay.core.model.view import ModelView
from inlay.formats.archive import Archive
from inlay.formats.configuration import Config
from inlay.formats.exchange import Entry, Reading, Writing
from inlay.formats.peft import settings, targets
from inlay.formats.peft.common import PREFIX, header, places_of
from inlay.formats.peft.copies import read_copies, write_copies

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """One tensor of a delta, and its counterpart after the layer's name.

    Attributes:
        shape: turns our shape into theirs.
        out, back: turn our values into theirs, and back, given the piece they belong to.
    """

    theirs: str
    shape: Callable[[Shape], Shape] = tuple
    out: Callable[[Tensor, DeltaPiece], Tensor] = lambda value, piece: value
    back: Callable[[Tensor, DeltaPiece], Tensor] = lambda value, piece: value


def _column(shape: Shape) -> Shape:
    return (*shape, 1)


def _square(shape: Shape) -> Shape:
    side = (1 + math.isqrt(1 + 8 * shape[-1])) // 2
    return (*shape[:-1], side, side)


def _upper(full: Tensor) -> Tensor:
    """The rows of the upper triangle of a matrix's skew part."""
    skew = (full - full.mT) / 2
    rows, columns = torch.triu_indices(full.shape[-1], full.shape[-1], 1)
    return skew[..., rows, columns]


def _full(upper: Tensor) -> Tensor:
    side = _square(tuple(upper.shape))[-1]
    rows, columns = torch.triu_indices(side, side, 1)
    half = upper.new_zeros(*upper.shape[:-1], side, side)
    half[..., rows, columns] = upper
    return half - half.mT


def _signed(skew: Tensor, piece: DeltaPiece) -> Tensor:
    return skew if getattr(piece.delta, "terms", None) is None else -skew


def _norm(piece: DeltaPiece, index: int, like: Tensor) -> Tensor:
    value = piece.site.read_weight()[index]
    assert value is not None
    return value.detach().to(like)


def _difference(index: int, name: str) -> Pair:
    return Pair(
        name,
        out=lambda value, piece: _norm(piece, index, value) + value,
        back=lambda value, piece: value - _norm(piece, index, value),
    )


_vector = Pair("", shape=_column, out=lambda v, _: v[:, None], back=lambda v, _: v[:, 0])
TABLE: Mapping[str, Mapping[str, Pair]] = {
    "vera": {"d": Pair("vera_lambda_d"), "b": Pair("vera_lambda_b")},
    "loha": {n: Pair(f"hada_{n}") for n in ("w1_a", "w1_b", "w2_a", "w2_b")},
    "lokr": {n: Pair(f"lokr_{n}") for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
    "adalora": {"a": Pair("lora_A"), "b": Pair("lora_B"), "e": Pair("lora_E", _column, _vector.out, _vector.back)},
    # With the truncated series PEFT's rotation is the inverse: (I + Q)(I − Q)⁻¹.
    "oft": {"skew": Pair("oft_R.weight", out=lambda v, p: _signed(v, p), back=lambda v, p: _signed(v, p))},
    "boft": {
        "skew": Pair("boft_R", _square, lambda v, _: _full(v), lambda v, _: _upper(v)),
        "scale": Pair("boft_s", _column, _vector.out, _vector.back),
    },
    "norm-tuning": {
        "gain": _difference(0, "ln_tuning_layers.weight"),
        "offset": _difference(1, "ln_tuning_layers.bias"),
    },
}
LINEAR_ONLY = ("loha", "lokr", "oft", "boft")  # in PEFT; the others also take transformers' Conv1D
SHARED: Mapping[str, str] = {"shared/projections/a": "base_model.vera_A", "shared/projections/b": "base_model.vera_B"}


def read(config: Config, view: ModelView, archive: Archive) -> Reading:
    """Any method of the table."""
    kind = str(config.values["peft_type"])
    key = settings.METHODS[kind]
    names = {f".{pair.theirs}": pair for pair in TABLE[key].values()}
    stored = {n.removeprefix(PREFIX).removesuffix(e) for n in archive.shapes for e in names if n.endswith(e)}
    copies = read_copies(config, view, archive.shapes, PREFIX)
    paths = targets.sites(config, view, stored)
    method = settings.READERS[kind](config, paths, archive)

    def entries(adapter: Adapter) -> Iterator[Entry]:
        for piece in adapter.pieces:
            assert isinstance(piece, DeltaPiece)
            for name, value in piece.delta.state_dict().items():
                pair = TABLE[key].get(name)
                if pair is not None:
                    theirs = f"{PREFIX}{piece.site.path}.{pair.theirs}"
                    yield Entry(
                        f"delta/{piece.key}/{name}",
                        {theirs: pair.shape(tuple(value.shape))},
                        lambda value, pair=pair, piece=piece: pair.back(value, piece),
                    )
        yield from _shared(adapter, view, archive)
        yield from copies.entries(adapter)

    return Reading(method, places_of(paths), entries, copies.paths, copies.checks)


def _shared(adapter: Adapter, view: ModelView, archive: Archive) -> Iterator[Entry]:
    """What the pieces share. VeRA's matrices may be absent, because they can be drawn again from their seed."""
    from inlay.core.contracts.shared import shared_in

    own = {id(s): s for module in adapter.modules() for s in shared_in(module).values()}
    for shared in own.values():
        for name, value in shared.state_dict().items():
            stored, theirs = f"shared/{shared.key}/{name}", SHARED.get(f"shared/{shared.key}/{name}")
            if theirs is not None and theirs in archive.shapes:
                yield Entry(stored, {theirs: tuple(value.shape)})
            else:
                yield Entry(stored, {}, lambda shared=shared, name=name: _initial(shared, name, view))


def _initial(shared: Any, name: str, view: ModelView) -> Tensor:
    with torch.no_grad():
        shared.initialise(view)
    value: Tensor = shared.state_dict()[name]
    return value.clone()


def write(adapter: Adapter, view: ModelView) -> Writing:
    """Any method of the table."""
    key = adapter.method.name
    tensors: dict[str, Tensor] = {}
    paths: list[str] = []
    for piece in adapter.pieces:
        assert isinstance(piece, DeltaPiece)
        if piece.site.part is not None:
            raise UnsupportedError(
                f"{piece.key}: PEFT's {key} cannot adapt a part of a fused layer; attach it to the whole layer, "
                f"where={[piece.site.path.rpartition('.')[2]]}"
            )
        if key in LINEAR_ONLY and type(piece.site.module).__name__.endswith("Conv1D"):
            raise UnsupportedError(
                f"{piece.key}: PEFT's {key} does not know transposed layers (Conv1D), so it could not load it"
            )
        paths.append(piece.site.path)
        for name, value in piece.delta.state_dict().items():
            pair = TABLE[key].get(name)
            if pair is not None:
                tensors[f"{PREFIX}{piece.site.path}.{pair.theirs}"] = pair.out(value.detach(), piece)
    ours = adapter.tensors()
    tensors |= {theirs: ours[name].detach() for name, theirs in SHARED.items() if name in ours}
    if key == "boft" and not getattr(adapter.method, "scaled", False):
        tensors |= {f"{PREFIX}{p}.boft_s": torch.ones(view.layers[p].out_features, 1) for p in paths}
    saved, copied = write_copies(adapter, view, PREFIX)
    config = header(view, settings.TYPES[key], saved) | {"target_modules": targets.words_for(view, paths)}
    return Writing(config | settings.WRITERS[key](adapter, view), tensors | copied)
