"""The configurations of the methods in `deltas.py`: PEFT's keys to our hyper-parameters and back.

Keys that only matter in training (dropout of whole ranks or modules, initialisation) are left out; keys that change the
result and have no counterpart are refused, and the message names them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.method import Method
from inlay.core.contracts.pieces import DeltaPiece
from inlay.core.contracts.site_pattern import frozen, value_at
from inlay.core.errors import UnsupportedError
from inlay.core.model.view import ModelView
from inlay.formats.archive import Archive
from inlay.formats.configuration import Config
from inlay.formats.peft import targets

TRAINING = ("init_weights", "rank_dropout", "module_dropout", "rank_dropout_scale", "fan_in_fan_out")
SMALL = 1e-5  # PEFT's AdaLoRA divides by rank + 1e-5


def _patterns(config: Config, paths: list[str]) -> dict[str, Any]:
    config.ignore(*TRAINING, "use_effective_conv2d")
    rank, alpha = config.whole("r", 8), config.number("alpha", 8)
    return {
        "rank": rank,
        "alpha": alpha,
        "rank_pattern": targets.by_pattern(config, "rank_pattern", paths, rank),
        "alpha_pattern": targets.by_pattern(config, "alpha_pattern", paths, alpha),
    }


def read_vera(config: Config, paths: list[str], archive: Archive) -> Method:
    from inlay.methods.vera import VeRA

    config.ignore(*TRAINING, "save_projection")
    config.refuse("only adapters without trained biases have a counterpart", "bias", unless=("none",))
    return VeRA(
        rank=config.whole("r", 256),
        dropout=config.number("vera_dropout", 0.0),
        start=config.number("d_initial", 0.1),
        seed=int(config.number("projection_prng_key", 0)),
    )


def write_vera(adapter: Adapter, view: ModelView) -> dict[str, Any]:
    method: Any = adapter.method
    return {
        "r": method.rank,
        "vera_dropout": method.dropout,
        "d_initial": method.start,
        "projection_prng_key": method.seed,
        "save_projection": True,
        "bias": "none",
    }


def read_loha(config: Config, paths: list[str], archive: Archive) -> Method:
    from inlay.methods.loha import LoHa

    return LoHa(**_patterns(config, paths))


def read_lokr(config: Config, paths: list[str], archive: Archive) -> Method:
    from inlay.methods.lokr import LoKr

    return LoKr(
        **_patterns(config, paths),
        factor=int(config.number("decompose_factor", -1)),
        decompose_both=bool(config.get("decompose_both", False)),
        scale_whole=True,
    )


def write_patterned(adapter: Adapter, view: ModelView) -> dict[str, Any]:
    """LoHa and LoKr: a rank and an alpha that give each site its scale."""
    method: Any = adapter.method
    ranks, alphas = {}, {}
    for piece in adapter.pieces:
        assert isinstance(piece, DeltaPiece)
        rank = value_at(piece.site.key, frozen(method.rank_pattern), method.rank)
        scale: Any = piece.delta.scale
        ranks[piece.site.path], alphas[piece.site.path] = rank, targets.integral(scale * rank)
    config: dict[str, Any] = {
        "r": method.rank,
        "alpha": method.alpha,
        "rank_pattern": {targets.pattern_for(p): r for p, r in ranks.items() if r != method.rank},
        "alpha_pattern": {targets.pattern_for(p): a for p, a in alphas.items() if a != method.alpha},
    }
    if method.name == "lokr":
        config |= {"decompose_both": method.decompose_both, "decompose_factor": method.factor}
    return config


def read_adalora(config: Config, paths: list[str], archive: Archive) -> Method:
    from inlay.methods.adalora import AdaLoRA

    rank = config.whole("init_r", 12)
    masks = config.get("rank_pattern", {})
    ranks: dict[str, int] = {}
    for name, mask in masks.items():
        path = name.removesuffix(".default").removesuffix(".lora_E")
        if path not in paths or not isinstance(mask, list) or len(mask) != rank:
            config.wrong.append(f"rank_pattern: {name!r} is not a mask of {rank} entries for an adapted module")
        else:
            ranks[path] = sum(map(bool, mask))
    config.ignore(
        "r", "use_rslora", "use_dora", "init_lora_weights", "fan_in_fan_out", "loftq_config", "megatron_core",
        "qalora_group_size", "corda_config", "eva_config", "lora_ga_config", "velora_config", "ensure_weight_tying",
        "deltaT", "tinit", "tfinal", "total_step", "beta1", "beta2", "orth_reg_weight", "target_r",
    )  # fmt: skip
    config.refuse("only adapters without trained biases have a counterpart", "bias", unless=("none",))
    config.refuse("AdaLoRA has no patterns of alpha", "alpha_pattern")
    alpha = config.number("lora_alpha", 8)
    # A pattern that names every site marks a finished schedule, whose state is not in the file.
    return AdaLoRA(
        rank=rank,
        target_rank=min(config.whole("target_r", 8), rank),
        alpha=(alpha if alpha > 0 else rank) * rank / (rank + SMALL),
        dropout=config.number("lora_dropout", 0.0),
        rank_pattern={path: ranks.get(path, rank) for path in paths},
    )


def write_adalora(adapter: Adapter, view: ModelView) -> dict[str, Any]:
    method: Any = adapter.method
    masks: dict[str, list[bool]] = {}
    for piece in adapter.pieces:
        assert isinstance(piece, DeltaPiece)
        left = piece.delta.state_dict()["e"].shape[0]
        masks[f"{piece.site.path}.lora_E"] = [i < left for i in range(method.rank)]
    return {
        "init_r": method.rank,
        "target_r": method.target_rank,
        "lora_alpha": method.alpha * (method.rank + SMALL) / method.rank,
        "lora_dropout": method.dropout,
        "rank_pattern": masks if not all(all(m) for m in masks.values()) else None,
        "total_step": 1,  # PEFT requires one even after training
        "bias": "none",
    }


def read_oft(config: Config, paths: list[str], archive: Archive) -> Method:
    from inlay.methods.oft import OFT

    config.ignore(*TRAINING, "eps")
    config.refuse("only adapters without trained biases have a counterpart", "bias", unless=("none",))
    config.refuse("the constrained rotation has no counterpart", "coft")
    size, blocks = int(config.number("oft_block_size", 32)), int(config.number("r", 0))
    neumann = config.get("use_cayley_neumann", "use_cayley_neumann" not in config.values)
    terms = config.whole("num_cayley_neumann_terms", 5)
    if neumann and terms < 3:
        config.wrong.append(f"num_cayley_neumann_terms is {terms}: a series of under three terms has no counterpart")
    return OFT(
        block_size=size or None,
        blocks=None if size else blocks,
        share_blocks=bool(config.get("block_share", False)),
        neumann_terms=max(terms, 4) if neumann else None,  # asked for three terms, PEFT computes four
    )


def write_oft(adapter: Adapter, view: ModelView) -> dict[str, Any]:
    method: Any = adapter.method
    if method.neumann_terms == 3:
        raise UnsupportedError("PEFT computes four terms of the series if three are asked for; use 4, or None")
    terms = {} if method.neumann_terms is None else {"num_cayley_neumann_terms": method.neumann_terms}
    return {
        "oft_block_size": method.block_size or 0,
        "r": method.blocks or 0,
        "block_share": method.share_blocks,
        "use_cayley_neumann": method.neumann_terms is not None,
        "coft": False,
        "bias": "none",
        **terms,
    }


def read_boft(config: Config, paths: list[str], archive: Archive) -> Method:
    from inlay.methods.boft import BOFT

    config.ignore(*TRAINING, "boft_n_butterfly_factor", "boft_dropout", "boft_block_num", "boft_block_size")
    config.refuse("only adapters without trained biases have a counterpart", "bias", unless=("none",))
    # Without its CUDA extension PEFT trains one factor, however many were asked for, so the tensors decide.
    shapes = {s for n, s in archive.shapes.items() if n.endswith(".boft_R") and len(s) == 4}
    factors, sizes = {s[0] for s in shapes}, {s[2] for s in shapes}
    if len(factors) != 1 or len(sizes) != 1:
        config.wrong.append("boft_R has different numbers of factors or block sizes in different layers")
    return BOFT(block_size=max(sizes, default=2), factors=max(factors, default=1), scaled=True)


def write_boft(adapter: Adapter, view: ModelView) -> dict[str, Any]:
    method: Any = adapter.method
    return {
        "boft_block_size": method.block_size,
        "boft_block_num": 0,
        "boft_n_butterfly_factor": method.factors,
        "bias": "none",
    }


def read_norms(config: Config, paths: list[str], archive: Archive) -> Method:
    from inlay.methods.norm_tuning import NormTuning

    return NormTuning()


def write_norms(adapter: Adapter, view: ModelView) -> dict[str, Any]:
    return {}


METHODS: Mapping[str, str] = {
    "VERA": "vera",
    "LOHA": "loha",
    "LOKR": "lokr",
    "ADALORA": "adalora",
    "OFT": "oft",
    "BOFT": "boft",
    "LN_TUNING": "norm-tuning",
}
TYPES: Mapping[str, str] = {ours: theirs for theirs, ours in METHODS.items()}
READERS: Mapping[str, Callable[[Config, list[str], Archive], Method]] = {
    "VERA": read_vera,
    "LOHA": read_loha,
    "LOKR": read_lokr,
    "ADALORA": read_adalora,
    "OFT": read_oft,
    "BOFT": read_boft,
    "LN_TUNING": read_norms,
}
WRITERS: Mapping[str, Callable[[Adapter, ModelView], dict[str, Any]]] = {
    "vera": write_vera,
    "loha": write_patterned,
    "lokr": write_patterned,
    "adalora": write_adalora,
    "oft": write_oft,
    "boft": write_boft,
    "norm-tuning": write_norms,
}
