"""Bugs put in on purpose, each caught by the law it breaks: a law that cannot fail is no law.

Each is one that some PEFT library has had: a scale applied twice at merging, a subtraction as unmerge, a hook
that outlives an exception, the base answering for an unknown adapter, a row served by its neighbour's adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.bases import dense
from inlay.core import install, merge
from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.method import Method
from inlay.core.forward import active_adapters, batched_adapters, checkpointing, route, scope
from inlay.core.forward.host import Host
from inlay.core.model import fingerprint, layer, site
from inlay.core.prompts import encoder_sequence, prefix_attention, virtual_positions
from inlay.formats import native
from inlay.methods import _low_rank, dora, ia3
from inlay.testing import LAWS, ZOO

Bug = Callable[[], AbstractContextManager[Any]]


def patched(owner: Any, name: str, new: Any) -> Bug:
    return lambda: mock.patch.object(owner, name, new)


def double_scale(self: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight + 2 * self.scale * (self.b @ self.a), bias


def bias_forgotten(self: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight * self.scale[:, None], bias


def unmerge_by_subtraction(module: nn.Module, weight: Tensor, bias: Tensor | None) -> layer.Undo:
    parameter = module._parameters["weight"]
    assert parameter is not None
    change = (weight.t() if dense._transposed(module) else weight) - parameter.data
    parameter.data.add_(change)

    def undo() -> None:
        parameter.data.sub_(change)

    return undo


def neighbour(self: route.Route, name: str | None, like: Tensor, **kwargs: Any) -> Tensor:
    return (real_index(self, name, like, **kwargs) + 1) % like.shape[0]


real_index = route.Route.index


def turned(names: Any, among: Any, device: Any) -> batched_adapters.Segments:
    return real_segments([*names[1:], *names[:1]], among, device)


real_segments = batched_adapters.Segments.of


def base_moved(self: Any, at: site.Site) -> None:
    nn.init.normal_(self.a)
    nn.init.zeros_(self.b)
    at.module._parameters["weight"].data.mul_(1.01)  # type: ignore[union-attr]


def tensor_dropped(self: Adapter) -> dict[str, Tensor]:
    return dict(list(real_tensors(self).items())[:-1])


real_tensors = Adapter.tensors


def mask_lost(module: Any, query: Any, key: Any, value: Any, mask: Any, prefixes: Any, **kwargs: Any) -> Any:
    return real_naive(module, query, key, value, None, prefixes, **kwargs)


real_naive = prefix_attention.naive


def names_unchecked(self: active_adapters.Roster, choice: Any) -> route.Route:
    known = [c if c in self.adapters else None for c in ([choice] if isinstance(choice, str) else choice or [None])]
    return route.Route(tuple(known), per_row=not isinstance(choice, str) and choice is not None)


def half_precision(self: site.Site, *shape: int) -> Tensor:
    return torch.empty(*shape, dtype=self.dtype)


def all_slots_seen(call: Any, mask: Tensor) -> Tensor:
    return mask.new_ones((mask.shape[0], call.block))


def nothing(*args: Any, **kwargs: Any) -> None:
    return None


BUGS: dict[str, tuple[str, str, Method, Bug]] = {
    "the scale is applied twice when merging": (
        "views_agree", "llama", inlay.LoRA(rank=2), patched(_low_rank.LowRank, "weight", double_scale)),
    "merging forgets to rescale the bias": (
        "views_agree", "bert", inlay.IA3(), patched(ia3.OutputDelta, "weight", bias_forgotten)),
    "a transposed layer is read as it lies": (
        "views_agree", "gpt2", inlay.LoRA(rank=2), patched(dense, "_transposed", lambda layer: False)),
    "unmerging subtracts": (
        "views_agree", "llama", inlay.LoRA(rank=2), patched(merge, "write_weight", unmerge_by_subtraction)),
    "the norm is not recomputed when merging": (
        "views_agree", "llama", inlay.DoRA(rank=2), patched(
            dora.DoRADelta, "weight", lambda self, w, b: (w + self.scale * (self.b @ self.a), b))),
    "rows go to their neighbours' adapters": (
        "mixed_training", "llama", inlay.LoRA(rank=2), patched(route.Route, "index", neighbour)),
    "rows that are computed at once go to their neighbours' adapters": (
        "rows_are_independent", "llama", inlay.LoRA(rank=2),
        patched(batched_adapters.Segments, "of", staticmethod(turned))),
    "padding is visible behind a prefix": (
        "rows_are_independent", "bert", inlay.PrefixTuning(length=2, projection=None),
        lambda: mock.patch.multiple(prefix_attention, naive=mask_lost, fusible=lambda *a: False)),
    "empty slots of a shorter prompt are visible": (
        "rows_are_independent", "bert", inlay.PromptTuning(length=3, init="random"),
        patched(encoder_sequence, "valid", all_slots_seen)),
    "a route of the wrong length is accepted": (
        "rows_are_independent", "llama", inlay.LoRA(rank=2), patched(route.Route, "check_rows", nothing)),
    "beams are not counted": (
        "generation", "llama", inlay.PromptTuning(length=2, init="random"),
        patched(virtual_positions, "_copies", lambda *a: 1)),
    "an unknown adapter is served by the base": (
        "silence", "llama", inlay.LoRA(rank=2), patched(active_adapters.Roster, "check", names_unchecked)),
    "a choice outlives an exception": (
        "silence", "llama", inlay.LoRA(rank=2), patched(scope.Binding, "__exit__", nothing)),
    "initialisation moves the base": (
        "identity", "llama", inlay.LoRA(rank=2), patched(_low_rank.LowRank, "initialise", base_moved)),
    "the base is trained too": (
        "only_the_adapter_learns", "llama", inlay.LoRA(rank=2),
        patched(nn.Module, "requires_grad_", lambda self, requires_grad=True: self)),
    "a tensor is left out of the file": (
        "storage", "llama", inlay.LoRA(rank=2), patched(Adapter, "tensors", tensor_dropped)),
    "values are not checked when loading": (
        "storage", "llama", inlay.LoRA(rank=2), patched(native, "digest_of", lambda tensors: "")),
    "the base is not checked when loading": (
        "storage", "llama", inlay.LoRA(rank=2), patched(fingerprint.Fingerprint, "differences", lambda *a: [])),
    "detaching leaves the base frozen": (
        "detach_restores", "llama", inlay.LoRA(rank=2), patched(install, "_thaw", nothing)),
    "a failed attach leaves pieces behind": (
        "all_or_nothing", "llama", inlay.DoRA(rank=2), patched(install, "_remove", nothing)),
    "recomputation takes the route of the moment": (
        "checkpointing", "llama", inlay.LoRA(rank=2),
        patched(checkpointing, "_checkpointed", lambda host, inner, function, *args: inner(function, *args))),
    "adapters are kept in half precision": (
        "precision", "llama", inlay.LoRA(rank=2), patched(site.Site, "empty", half_precision)),
    "a deep copy shares its hosts": (
        "copying", "llama", inlay.LoRA(rank=2), patched(Host, "__deepcopy__", lambda self, memo: self)),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_caught(bug: str) -> None:
    law, specimen, method, seed = BUGS[bug]
    LAWS[law](ZOO[specimen], method)
    with seed(), pytest.raises((AssertionError, inlay.InlayError, RuntimeError, IndexError)):
        LAWS[law](ZOO[specimen], method)
