"""A training step: inlay, PEFT, and the floor; and what its forward pass keeps.

The floor is the frozen model's own forward and its backward to the input embeddings: what any adapter on
every layer has to pay when it uses the model's own code. A step is zeroing, forward, backward and AdamW's
step; the floor has nothing to zero and nothing to step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import Shape, in_peft, token_rows, trained, with_inlay
from inlay import LoRA
from inlay.core.contracts.method import Method

LEARNING_RATE = 1e-3
# Relative. PEFT's update passes through float32 also on a bfloat16 base, ours does not.
TOLERANCE = {torch.bfloat16: 2e-3, torch.float32: 1e-5}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the table.

    Attributes:
        labelled: share of the positions that have a label, from the end of each row.
        rows, tokens: of the batch.
        checked: steps over which the two must agree in their losses.
        method: what is trained; where nothing else is said, LoRA.
        where: its places; its paper's if None.
        at_most: the targets, by ratio.
    """

    name: str
    shape: Shape
    dropout: float = 0.0
    labelled: float = 0.5
    method: Method | None = None
    where: str | None = "all-linear"
    at_most: Mapping[str, float] = field(default_factory=dict)
    rank: int = 8
    rows: int = 4
    tokens: int = 256
    checked: int = 20
    seed: int = 0

    @property
    def trained(self) -> Method:
        return self.method or LoRA(rank=self.rank, alpha=2 * self.rank, dropout=self.dropout)

    def batch(self) -> dict[str, Tensor]:
        """``input_ids`` and ``labels``, (rows, tokens)."""
        ids = token_rows(self.shape, self.rows, self.tokens)
        labels = ids.clone()
        labels[:, : self.tokens - round(self.labelled * self.tokens)] = -100
        return {"input_ids": ids, "labels": labels}


def activations(case: Case, *, most: float) -> dict[str, Any]:
    """Bytes that the decoder's forward pass keeps for the backward, distinct storages and no parameters.

    The floor is the frozen base, differentiated to its input embeddings.
    """
    base = case.shape.build().train()
    ours = with_inlay(base, case.trained, ["default"], seed=case.seed, where=case.where)
    theirs = in_peft(ours, base)
    batch = case.batch()
    ours(**batch, use_cache=False)  # the first call tries the fast paths
    embedded = base.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_(True)
    kept = {
        "inlay": _kept(ours, lambda: ours.model(input_ids=batch["input_ids"], use_cache=False)),
        "peft": _kept(theirs, lambda: theirs.get_base_model().model(input_ids=batch["input_ids"], use_cache=False)),
        "floor": _kept(base, lambda: base.model(inputs_embeds=embedded, use_cache=False)),
    }
    share = kept["inlay"] / kept["floor"]
    return {
        "case": case.name,
        "method": case.trained.to_dict(),
        "bytes": kept,
        "ratios": {"inlay/floor": round(share, 3), "peft/floor": round(kept["peft"] / kept["floor"], 3)},
        "at_most": {"inlay/floor": most},
        "missed": {"inlay/floor": round(share, 3)} if share > most else {},
    }


def _kept(model: nn.Module, forward: Callable[[], object]) -> int:
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, Tensor] = {}  # the tensors too, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(t.untyped_storage().nbytes() for t in seen.values())


def training_step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """A step of AdamW on whatever the model trains; returns the loss before it."""
    optimizer = torch.optim.AdamW(trained(model), lr=LEARNING_RATE, weight_decay=0.0)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss: Tensor = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def floor_step(base: Any, batch: dict[str, Tensor]) -> Callable[[], Tensor]:
    """The frozen model's forward and its backward to the input embeddings."""

    def step() -> Tensor:
        embedded = base.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_(True)
        loss: Tensor = base(inputs_embeds=embedded, labels=batch["labels"], use_cache=False).loss
        loss.backward()
        return loss.detach()

    return step


def agreement(ours: list[float], theirs: list[float], tolerance: float) -> dict[str, Any]:
    """Whether two series of losses are equal, relatively."""
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    return {
        "steps": len(ours),
        "worst_relative_difference": worst,
        "tolerance": tolerance,
        "agree": worst <= tolerance,
        "first_and_last": {name: [round(v[0], 5), round(v[-1], 5)] for name, v in (("inlay", ours), ("peer", theirs))},
    }
