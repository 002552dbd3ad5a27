"""A training step with LoRA on every linear layer: inlay, PEFT, and the floor.

The floor is the frozen model's own forward and its backward to the input embeddings: what any adapter on
every layer has to pay when it uses the model's own code. A step is zeroing, forward, backward and AdamW's
step; the floor has nothing to zero and nothing to step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contenders import Shape, copy_values, token_rows, trained, with_inlay, with_peft
from benchmarks.timing import alternate, ratio
from inlay import LoRA

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
    """

    name: str
    shape: Shape
    dropout: float = 0.0
    labelled: float = 0.5
    rank: int = 8
    rows: int = 4
    tokens: int = 256
    checked: int = 20
    seed: int = 0

    @property
    def method(self) -> LoRA:
        return LoRA(rank=self.rank, alpha=2 * self.rank, dropout=self.dropout)

    def batch(self) -> dict[str, Tensor]:
        """``input_ids`` and ``labels``, (rows, tokens)."""
        ids = token_rows(self.shape, self.rows, self.tokens)
        labels = ids.clone()
        labels[:, : self.tokens - round(self.labelled * self.tokens)] = -100
        return {"input_ids": ids, "labels": labels}


def compare(case: Case, *, runs: int) -> dict[str, Any]:
    """Check that inlay and PEFT learn the same, then time them and the floor alternately.

    Returns:
        The case, the agreement of the losses, the timings and the ratios.
    """
    base = case.shape.build().train()
    ours = with_inlay(base, case.method, ["default"], seed=case.seed)
    theirs = with_peft(base, case.method, ["default"])
    copy_values(ours, theirs)
    batch = case.batch()
    steps = {"inlay": training_step(ours, batch), "peft": training_step(theirs, batch)}
    ours.eval(), theirs.eval()  # masks of dropout come from different generators, so losses are compared without
    agreement = losses_agree(case, steps)
    ours.train(), theirs.train()
    timings = alternate({**steps, "floor": floor_step(base, batch)}, runs=runs)
    return {
        "case": case.name,
        "shape": case.shape.to_dict(),
        "batch": [case.rows, case.tokens],
        "labelled": case.labelled,
        "method": case.method.to_dict(),
        "losses": agreement,
        "timings": {name: t.to_dict() for name, t in timings.items()},
        "ratios": {
            "inlay/peft": ratio(timings["inlay"], timings["peft"]),
            "inlay/floor": ratio(timings["inlay"], timings["floor"]),
            "peft/floor": ratio(timings["peft"], timings["floor"]),
        },
    }


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


def losses_agree(case: Case, steps: dict[str, Callable[[], Tensor]]) -> dict[str, Any]:
    """Take the first steps with both, from the same random state, and compare every loss."""
    losses: dict[str, list[float]] = {}
    for name, step in steps.items():
        torch.manual_seed(case.seed + 1)
        losses[name] = [float(step()) for _ in range(case.checked)]
    pairs = list(zip(losses["inlay"], losses["peft"], strict=True))
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    tolerance = TOLERANCE[case.shape.dtype]
    return {
        "steps": case.checked,
        "worst_relative_difference": worst,
        "tolerance": tolerance,
        "agree": worst <= tolerance,
        "first_and_last": {name: [round(v[0], 5), round(v[-1], 5)] for name, v in losses.items()},
    }
