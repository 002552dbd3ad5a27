"""FISH mask: only the parameters to which the loss is most sensitive are trained.

Sung et al. 2021, "Training Neural Networks with Fixed Sparse Masks", arXiv:2111.09839.

    F̂ = 1/N Σ_rows (∇ log p(y | x))²          per entry, y the labels of the data ("empirical" Fisher information)
    θ' = θ + d                                d trained at the `share` of all entries that have the largest F̂

The mask is found once, before training, and never changes. Gradients are computed one row at a time, in eval mode, from
the model's own loss (the mean over a row's tokens, as in the authors' code). d starts at zero. Places: all parameters
of the numbered layers; entries are ranked over all of them. Finding the mask takes the memory of a float32 copy of
these parameters and of their gradients; training takes that of the chosen entries only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inlay.authoring import (
    Batches,
    ConfigError,
    Difference,
    Measured,
    ModelView,
    Pattern,
    Places,
    Recipe,
    SubsetMethod,
    bare,
    frozen,
)
from inlay.methods._entries import SparseDifference
from inlay.methods._sparse import BLOCKS, candidates, chosen_in, counts, how_many, largest, settle


@dataclass(frozen=True, kw_only=True)
class FishMask(SubsetMethod):
    """A fixed sparse mask by Fisher information.

    Attributes:
        share: share of all entries that is trained.
        samples: largest number of data rows over which F̂ is taken.
        chosen: parameter → number of its entries in the mask; filled in when the mask is found.
    """

    name: ClassVar[str] = "fish-mask"
    paper: ClassVar[str] = "arXiv:2111.09839"
    family: ClassVar[str] = "selective"
    table_order: ClassVar[int] = 40
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3)  # tuned (docs/quality.md)
    default_where: ClassVar[str] = BLOCKS
    needs_data: ClassVar[bool] = True

    share: float = 0.005
    samples: int = 1024
    chosen: Mapping[str, int] | Pattern[int] = ()

    def __post_init__(self) -> None:
        settle(self, (self.samples >= 1, f"samples is {self.samples}, expected at least 1"))

    def choose(self, view: ModelView, places: Places) -> list[str]:
        return chosen_in(view, frozen(self.chosen)) or candidates(view, places)

    def difference(self, name: str, value: Tensor) -> Difference:
        return SparseDifference(value, dict(frozen(self.chosen)).get(name, 0))

    def foreseen(self, view: ModelView, places: Places) -> FishMask:
        found = dict(view.model.named_parameters())
        sizes = {name: found[name].numel() for name in candidates(view, places)}
        return replace(self, chosen={name: max(1, round(self.share * size)) for name, size in sizes.items()})

    def measure(self, model: nn.Module, places: Places, data: Batches) -> Measured:
        view = ModelView(model)
        names = candidates(view, places)
        parameters = {n: view.modules[n.rpartition(".")[0]]._parameters[n.rpartition(".")[2]] for n in names}
        fisher = fisher_information(model, {n: p for n, p in parameters.items() if p is not None}, data, self.samples)
        kept = largest(fisher, how_many(self.share, fisher))
        values = {name: {"indices": at} for name, at in kept.items()}
        return Measured(replace(self, chosen=counts(kept)), values)

    @classmethod
    def examples(cls) -> list[FishMask]:
        return [cls(share=0.05), cls(share=0.3, samples=2)]


def fisher_information(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], data: Batches, samples: int
) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information at the base's values, in float32."""
    total = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
    count = 0
    with bare(model), _only(model, parameters):
        for row in islice(rows(data), samples):
            loss = getattr(model(**row), "loss", None)
            if loss is None:
                raise ConfigError(
                    "the model returned no loss for a batch of `data`, so it has no gradients; the batches need "
                    "`labels`, and the model must be one of transformers' with a head that computes a loss"
                )
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    total[name].add_(gradient.float().square())
            count += 1
    if not count:
        raise ConfigError("`data` holds no rows")
    return {n: t / count for n, t in total.items()}


@contextmanager
def _only(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Within the block, gradients flow to these parameters and to no others."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def rows(data: Batches) -> Iterator[dict[str, Any]]:
    """The rows of the batches, each as a batch of one row."""
    for batch in data:
        size = next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()), 0)
        for i in range(size):
            yield {k: v[i : i + 1] if isinstance(v, Tensor) and v.shape[:1] == (size,) else v for k, v in batch.items()}
