"""What the laws are written with: trained adapters, comparisons, a census of a model."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import inlay
from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.method import DeltaMethod, Method
from inlay.core.contracts.pieces import SubsetPiece
from inlay.core.errors import UnsupportedError
from inlay.core.upstream import attention_named
from inlay.testing.specimen import Specimen

TOLERANCE = 2e-5  # float32, logits of order one: summation order differs between batch shapes
ROWS = 4


class Broken(AssertionError):
    """A law does not hold."""


def hold(condition: bool, message: str) -> None:
    if not condition:
        raise Broken(message)


def close(one: Tensor, other: Tensor, message: str, tolerance: float = TOLERANCE) -> None:
    worst = float((one.float() - other.float()).abs().max()) if one.numel() else 0.0
    scale = max(1.0, float(other.float().abs().max()))
    hold(worst <= tolerance * scale, f"{message}: differs by {worst:.2e}, tolerance {tolerance * scale:.0e}")


def parts(tensor: Tensor) -> list[Tensor]:
    """What a tensor of a packed type consists of; nothing of a plain one."""
    flatten = getattr(tensor.detach(), "__tensor_flatten__", None)
    return [] if flatten is None else [getattr(tensor, name) for name in flatten()[0]]


def same(one: Tensor, other: Tensor, message: str) -> None:
    one, other = one.detach(), other.detach()
    if packed := parts(one):
        for mine, its in zip(packed, parts(other), strict=True):
            same(mine, its, message)
        return
    hold(torch.equal(one, other), f"{message}: differs by {float((one.float() - other.float()).abs().max()):.2e}")


def train(adapter: Adapter, seed: int = 7, size: float = 0.1) -> None:
    """Random values in place of training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=size)


def put(specimen: Specimen, model: nn.Module, method: Method, name: str = "one") -> Adapter:
    """Attach at the paper's places; in a plain module, which has none, at every layer the method can adapt."""
    plain = specimen.kind == "plain" and isinstance(method, DeltaMethod)
    data = [specimen.batch(3, seed) for seed in range(2)] if method.needs_data else None
    if data is not None:
        dtype = next(model.parameters()).dtype
        data = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()} for batch in data]
    return inlay.attach(model, method, name=name, where=_has_bias if plain else None, data=data)


def _has_bias(path: str, module: nn.Module) -> bool:
    return module._parameters.get("bias") is not None


def attached(specimen: Specimen, method: Method, name: str = "one", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh base with a trained adapter on it."""
    model = specimen.build(dtype=dtype)
    torch.manual_seed(0)
    train(put(specimen, model, method, name))
    return model


def refusal(specimen: Specimen, method: Method) -> str | None:
    """Why the method cannot be attached to this model, or None; a refusal leaves the model as it was."""
    model = specimen.build()
    before = census(model)
    try:
        put(specimen, model, method)
    except inlay.UserError as error:
        hold(census(model) == before, "a refused attach left something behind")
        return str(error)
    try:
        forward(specimen, model, specimen.batch(2, 0))
    except UnsupportedError as error:
        return str(error)
    return None


def forward(specimen: Specimen, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Scores without a loss, whose two ways are tried on every fresh model; `silence` holds that labels change none."""
    given = {k: v for k, v in batch.items() if k != "labels"}
    if specimen.task == "seq2seq":
        given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])  # type: ignore[operator]
    with torch.no_grad():
        return specimen.logits(model(**given))


@cache
def bare(specimen: Specimen, rows: int, seed: int) -> Tensor:
    """What the base itself answers."""
    model = specimen.build()
    model.requires_grad_(False)
    return forward(specimen, model, specimen.batch(rows, seed))


def census(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that detaching must restore, apart from its outputs."""
    return {
        "keys": list(model.state_dict()),
        "classes": [(n, type(m)) for n, m in model.named_modules()],
        "flags": [(n, p.requires_grad) for n, p in model.named_parameters()],
        "attributes": [(n, sorted(m.__dict__)) for n, m in model.named_modules()],
        "attention": attention_named(model.config) if hasattr(model, "config") else None,
    }


def loss(specimen: Specimen, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    out = model(**batch)
    return specimen.logits(out).float().square().mean() if getattr(out, "loss", None) is None else out.loss


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# Company for the adapter in question: one that changes layers and one that rescales them.
PARTNERS: dict[str, Method] = {"two": inlay.LoRA(rank=2), "three": inlay.IA3()}


def accompany(specimen: Specimen, model: nn.Module, name: str) -> Adapter:
    """Put a trained partner on a model, the same one whatever is there already."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = put(specimen, model, PARTNERS[name], name)
    train(adapter, seed=len(name))
    return adapter


@cache
def by_itself(specimen: Specimen, name: str | None) -> nn.Module:
    """The base, or a partner alone on it: what rows that are not the adapter's are compared with, for every method."""
    model = specimen.build()
    model.requires_grad_(False)
    if name is not None:
        accompany(specimen, model, name)
    return model


def is_subset(model: nn.Module, name: str) -> bool:
    return any(isinstance(p, SubsetPiece) for p in inlay.adapters(model)[name].pieces)
