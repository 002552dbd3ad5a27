"""LoRA and DoRA in PEFT's files, and our methods that are a LoRA once they are trained.

    linear       <path>.lora_A.weight (r, in)          <path>.lora_B.weight (out, r)
    embedding    <path>.lora_embedding_A (r, entries)  <path>.lora_embedding_B (dim, r)
    convolution  <path>.lora_A.weight (r, in, *kernel) <path>.lora_B.weight (out, r, 1, …)
    DoRA         <path>.lora_magnitude_vector (out)

Parts of a fused layer (GPT-2's query and value) become one LoRA of the whole layer: A stacked, B with zeros in the rows
of the other parts, ranks added. PiSSA and OLoRA keep their offset in the adapter, so they become a LoRA of twice the
rank: [B, −B₀] [A; A₀].
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.method import Method
from inlay.core.contracts.pieces import DeltaPiece
from inlay.core.model.site import Site
from inlay.core.model.view import ModelView
from inlay.formats.archive import Archive
from inlay.formats.configuration import Config
from inlay.formats.exchange import Entry, Reading, Writing
from inlay.formats.peft import targets
from inlay.formats.peft.common import PREFIX, header, places_of
from inlay.formats.peft.copies import read_copies, write_copies

SUFFIXES = (".lora_A.weight", ".lora_embedding_A")
NAMES = {
    "linear": {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"},
    "conv": {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"},
    "embedding": {"a": "lora_embedding_A", "b": "lora_embedding_B", "magnitude": "lora_magnitude_vector"},
}
OFFSET = ("pissa", "olora")
MOVED = (
    *OFFSET,
    "corda",
    "lora_ga",
    "loftq",
    "mica",
)  # these subtract their first factors from the base's weight
REFUSED = {
    "the bias vectors of the base are trained, which is another method (bitfit)": ("lora_bias",),
    "inlay's LoRA has nothing of the kind": (
        "layer_replication", "target_parameters", "alora_invocation_tokens", "use_qalora", "use_bdlora",
        "arrow_config", "kasa_config", "monteclora_config", "megatron_config", "trainable_token_indices",
    ),
}  # fmt: skip
TRAINING_ONLY = (
    "corda_config", "eva_config", "fan_in_fan_out", "loftq_config", "lora_ga_config", "megatron_core",
    "qalora_group_size", "velora_config", "ensure_weight_tying", "init_lora_weights",
)  # fmt: skip


def read(config: Config, view: ModelView, archive: Archive) -> Reading:
    """PEFT's LORA as our LoRA, DoRA, PiSSA or OLoRA."""
    stored = {n.removeprefix(PREFIX).removesuffix(e) for n in archive.shapes for e in SUFFIXES if n.endswith(e)}
    copies = read_copies(config, view, archive.shapes, PREFIX)
    paths = targets.sites(config, view, stored)
    for reason, keys in REFUSED.items():
        config.refuse(reason, *keys)
    config.refuse("only adapters without trained biases have a counterpart", "bias", unless=("none",))
    config.ignore(*TRAINING_ONLY)
    if config.get("ensure_weight_tying") and any(view.layers[p].kind == "embedding" for p in paths if p in view.layers):
        config.wrong.append("ensure_weight_tying with an adapted embedding has no counterpart")
    transposed = any(type(view.modules[p]).__name__.endswith("Conv1D") for p in paths)
    method = _method(config, paths, transposed)
    names = _offset_names(method)

    def entries(adapter: Adapter) -> Iterator[Entry]:
        for piece in adapter.pieces:
            assert isinstance(piece, DeltaPiece)
            yield from _entries(piece, names)
        yield from copies.entries(adapter)

    return Reading(method, places_of(paths), entries, copies.paths, copies.checks)


def _method(config: Config, paths: list[str], transposed: bool) -> Method:
    from inlay.methods.dora import DoRA
    from inlay.methods.lora import LoRA

    rank, alpha = config.whole("r", 8), config.number("lora_alpha", 8)
    dropout, stabilised = config.number("lora_dropout", 0.0), bool(config.get("use_rslora", False))
    ranks = targets.by_pattern(config, "rank_pattern", paths, rank)
    alphas = targets.by_pattern(config, "alpha_pattern", paths, alpha)
    start, dora = str(config.get("init_lora_weights", True)).lower(), bool(config.get("use_dora", False))
    if start in OFFSET and not dora:
        if start == "olora" and transposed:
            config.wrong.append("PEFT's OLoRA factorises the transposed weight of a Conv1D, which gives another start")
        return _shifted(config, start, rank, alpha, bool(ranks or alphas or stabilised))
    if start.startswith(MOVED):
        way = (
            "and DoRA on a moved base has no counterpart"
            if dora
            else "save it with path_initial_model_for_weight_conversion, which makes it a plain LoRA"
        )
        config.wrong.append(
            f"init_lora_weights is {start!r}, which moved the base's weights when training began and cannot be "
            f"repeated exactly; {way}"
        )
    if dora:
        if stabilised:  # DoRA has no rank-stabilised scale; alpha √r / r is the same number
            alphas = {p: alphas.get(p, alpha) * math.sqrt(ranks.get(p, rank)) for p in paths}
        return DoRA(rank=rank, alpha=alpha, dropout=dropout, rank_pattern=ranks, alpha_pattern=alphas)
    return LoRA(
        rank=rank, alpha=alpha, dropout=dropout, rank_stabilised=stabilised, rank_pattern=ranks, alpha_pattern=alphas
    )


def _shifted(config: Config, start: str, rank: int, alpha: float, patterned: bool) -> Method:
    """PiSSA or OLoRA; its offset from the base is computed again, as PEFT does when it loads one."""
    from inlay.methods import method_named

    if patterned:
        config.wrong.append(f"init_lora_weights={start!r} with rank or alpha patterns or use_rslora has no counterpart")
    values: dict[str, Any] = {"rank": rank, "alpha": alpha}
    return method_named(start).from_dict(values)


def _offset_names(method: Method) -> tuple[str, str] | None:
    """The names of the frozen first factors, for a method that keeps them."""
    return ("a0", "b0") if method.name in OFFSET else None


def _entries(piece: DeltaPiece, offset: tuple[str, str] | None) -> Iterator[Entry]:
    site, state = piece.site, piece.delta.state_dict()
    for name, value in state.items():
        if offset and name in offset:
            yield Entry(f"delta/{piece.key}/{name}", {}, lambda piece=piece, name=name: _first(piece, name))
            continue
        shape = tuple(value.shape)
        theirs = f"{PREFIX}{site.path}.{NAMES[site.kind][name]}"
        if site.kind == "conv" and name == "b":
            kernel = (1,) * (piece.delta.state_dict()["a"].dim() - 2)
            yield Entry(f"delta/{piece.key}/b", {theirs: (*shape, *kernel)}, lambda t, s=shape: t.reshape(s))
        else:
            yield Entry(f"delta/{piece.key}/{name}", {theirs: shape})


def _first(piece: DeltaPiece, name: str) -> Tensor:
    """A frozen first factor, computed from the base. `initialise` would fill the trained factors too."""
    delta: Any = piece.delta
    with torch.no_grad():
        a, b = delta.factors(piece.site.read_weight()[0].to(delta.a.dtype))
    value: Tensor = a if name == "a0" else b
    return value


def write(adapter: Adapter, view: ModelView) -> Writing:
    """An adapter of the LoRA family as PEFT's LORA."""
    by_path: dict[str, list[DeltaPiece]] = {}
    for piece in adapter.pieces:
        assert isinstance(piece, DeltaPiece)
        by_path.setdefault(piece.site.path, []).append(piece)
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    tensors: dict[str, Tensor] = {}
    for path, pieces in by_path.items():
        a, b, magnitude, scale = _whole(view.layers[path], pieces)
        names = NAMES[view.layers[path].kind]
        ranks[path], scales[path] = a.shape[0], scale
        tensors[f"{PREFIX}{path}.{names['a']}"] = a
        tensors[f"{PREFIX}{path}.{names['b']}"] = b
        if magnitude is not None:
            tensors[f"{PREFIX}{path}.{names['magnitude']}"] = magnitude
    saved, copied = write_copies(adapter, view, PREFIX)
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    stabilised = bool(getattr(adapter.method, "rank_stabilised", False))
    alphas = {path: targets.integral(scales[path] * (math.sqrt(r) if stabilised else r)) for path, r in ranks.items()}
    alpha = max(set(alphas.values()), key=list(alphas.values()).count)
    config = header(view, "LORA", saved) | {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": float(getattr(adapter.method, "dropout", 0.0)),
        "target_modules": targets.words_for(view, list(by_path)),
        "rank_pattern": {targets.pattern_for(p): r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {targets.pattern_for(p): a for p, a in alphas.items() if a != alpha},
        "use_dora": adapter.method.name == "dora",
        "use_rslora": stabilised,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": any(type(view.modules[p]).__name__.endswith("Conv1D") for p in by_path),
    }
    return Writing(config, tensors | copied)


def _whole(layer: Site, pieces: list[DeltaPiece]) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """(A, B, magnitude, scale) of the whole layer, in PEFT's shapes."""
    scale = max((_scale(p) for p in pieces), key=abs) or 1.0
    stacked, sides = [], []
    magnitude: Tensor | None = None
    for piece in pieces:
        state = {n: t.detach() for n, t in piece.delta.state_dict().items()}
        served = getattr(piece.delta, "served", None)  # DyLoRA uses its first rows and columns
        a, b = state["a"][:served], state["b"][:, :served]
        if "a0" in state:
            a, b = torch.cat([a, state["a0"]]), torch.cat([b, -state["b0"]], dim=1)
        b = b * (_scale(piece) / scale)
        part = piece.site.part
        if part is not None:
            b = part.put(b.new_zeros(layer.out_features, b.shape[1]), b, 0)
        if "magnitude" in state:
            if magnitude is None:
                magnitude = state["magnitude"] if part is None else layer.read_weight()[0].float().norm(dim=1)
            magnitude = magnitude if part is None else part.put(magnitude, state["magnitude"], 0)
        stacked.append(a)
        sides.append(b)
    a, b = torch.cat(stacked), torch.cat(sides, dim=1)
    if layer.kind == "conv":
        b = b.reshape(*b.shape, *(1,) * (a.dim() - 2))
    return a, b, magnitude, scale


def _scale(piece: DeltaPiece) -> float:
    delta: Any = piece.delta
    served = getattr(delta, "served", None)
    return float(delta.scale if served is None else delta.alpha / served)
