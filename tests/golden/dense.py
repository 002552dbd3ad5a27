"""What the golden tests of weights share: the bare base with its matrices replaced by a paper's dense formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import inlay
from tests.golden.hand import agree, inputs, numbers, shake, with_weights, zoo_model
from tests.golden.places import TRANSPOSED, rows_of

Change = Callable[[dict[str, Tensor], Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


def sites(leaves: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Stored site → its numbers, with what all sites of the adapter share."""
    found: dict[str, dict[str, Tensor]] = {}
    common: dict[str, Tensor] = {}
    for name, leaf in leaves.items():
        kind, site, number = name.split("/")
        assert kind in ("delta", "shared")
        if kind == "shared":
            common[f"{site}.{number}"] = leaf
        else:
            found.setdefault(site, {})[number] = leaf
    return {site: own | common for site, own in found.items()}


def dense(name: str, leaves: dict[str, Tensor], batch: dict[str, Tensor], change: Change) -> Any:
    """The bare model with `change` applied to (weight, bias) of each site, as (out, in) matrices."""
    bare = zoo_model(name)
    values = {n: p.detach() for n, p in bare.named_parameters()}
    for site, own in sites(leaves).items():
        path = site.partition(":")[0]
        weight, bias = values[path + ".weight"], values.get(path + ".bias")
        weight = weight.t() if name in TRANSPOSED else weight
        rows = rows_of(name, site)
        at = torch.arange(weight.shape[0]) if rows is None else rows
        new, new_bias = change(own, weight[at], None if bias is None else bias[at])
        weight = weight.index_copy(0, at, new)
        values[path + ".weight"] = weight.t() if name in TRANSPOSED else weight
        if bias is not None and new_bias is not None:
            values[path + ".bias"] = bias.index_copy(0, at, new_bias)
    return with_weights(bare, lambda n, _: values[n], batch).logits


def check(name: str, method: Any, expected_sites: set[str], change: Change, **where: Any) -> None:
    batch = inputs(name, ragged=name != "vit")
    model: Any = zoo_model(name)
    adapter = shake(inlay.attach(model, method, **where))
    leaves = numbers(adapter)
    assert set(sites(leaves)) == expected_sites
    agree(adapter, model(**batch).logits, dense(name, leaves, batch, change), leaves, tolerance=2e-5)
