"""One training step without values: its peak by phase and role, and its work.

trial       the output head's two ways are compared, once, before any gradient or optimizer state is there
forward     the trunk                        loss     head, scores and their gradient
backward    in two halves, because activations become fewer and gradients more
step        gradients only: the optimizer works in place
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inlay.core.contracts.adapter import Adapter
from inlay.core.labels import IGNORED
from inlay.core.upstream import tree_leaves
from inlay.kernels import labelled_loss
from inlay.kernels.alike import shortening
from inlay.plan.ledger import Entry, Ledger
from inlay.plan.setting import Setting
from inlay.plan.standins import Standins, answering_autocast

PHASES = ("trial", "forward", "loss", "backward, first half", "backward, second half", "step")


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a step was seen to need besides weights, adapter and optimizer states.

    Attributes:
        peaks: phase → role → bytes, at the worst moment of the phase.
        gradients: bytes of all gradients, and of the largest one.
        flops: of products, bytes_moved: by everything else; of one pass.
    """

    peaks: Mapping[str, Mapping[str, float]]
    gradients: float
    largest_gradient: float
    flops: float
    bytes_moved: float


class Trial(NamedTuple):
    """Memory while the output head's two ways are compared.

    Attributes:
        peak: role → bytes.
        few: it was tried on few tokens, as many for any larger batch.
    """

    peak: Mapping[str, float]
    few: bool


def trace(
    model: Any, adapter: Adapter, setting: Setting, *, task: str, gpu: bool, quantised: set[int], tried: Trial
) -> Trace:
    """Run a step of `model`, whose parameters are on the meta device, after `trial` and `warm`."""
    batch = inputs(model, setting, task)
    ledger = _ledger(model, adapter, batch)
    trunk = getattr(model, "base_model", model)

    def trunk_begins(*_: Any) -> None:
        if ledger.phase == "loss":  # a prompt went through it before the rows
            ledger.phase = "forward"

    def trunk_is_over(*_: Any) -> None:
        if ledger.phase == "forward":
            ledger.phase = "loss"

    hooks = []
    if trunk is not model:
        hooks = [trunk.register_forward_pre_hook(trunk_begins), trunk.register_forward_hook(trunk_is_over)]
    try:
        with _checkpointing(model, setting, gpu, quantised), answering_autocast(), shortening(ledger.rounds), ledger:
            with Standins(gpu=gpu, quantised=quantised):
                ledger.phase = "forward"
                loss = model(**batch)["loss"]  # the scores are let go of here, as in the training loop
            ledger.phase = "backward"
            loss.backward()
            del loss
    finally:
        for hook in hooks:
            hook.remove()
    trained = [p for p in adapter.parameters() if p.requires_grad]
    grads = [p.grad for p in trained if p.grad is not None]
    kept = {number for grad in grads if (number := ledger.number_of(grad)) is not None}
    sizes = [float(g.numel() * g.element_size()) for g in grads]
    peaks = replay(ledger.entries, kept)
    for parameter in trained:
        parameter.grad = None
    phases = ("forward", "loss", "backward")
    return Trace(
        peaks={"trial": tried.peak, **peaks, "step": {"gradients": sum(sizes)}},
        gradients=sum(sizes),
        largest_gradient=max(sizes, default=0.0),
        flops=sum(ledger.flops.get(p, 0.0) for p in phases),
        bytes_moved=sum(ledger.bytes_moved.get(p, 0.0) for p in phases),
    )


def trial(model: Any, adapter: Adapter, setting: Setting, *, task: str, gpu: bool, quantised: set[int]) -> Trial:
    """Run the part of the first call that compares the output head's two ways, as far as there is one."""
    batch = inputs(model, setting, task)
    ledger = _ledger(model, adapter, batch)
    trunk = getattr(model, "base_model", model)
    tokens = [0]  # of each pass

    def passes(_: Any, args: Any, kwargs: Any) -> None:
        if labelled_loss.compared(model):
            raise _Compared
        tokens.append(max(t.shape[:2].numel() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)))

    # Not at the head: who watches that sees all scores.
    hook = trunk.register_forward_pre_hook(passes, with_kwargs=True)
    labelled_loss.forget(model)
    try:
        with _checkpointing(model, setting, gpu, quantised), answering_autocast(), shortening(ledger.rounds), ledger:  # noqa: SIM117
            with Standins(gpu=gpu, quantised=quantised), torch.no_grad(), suppress(_Compared):
                ledger.phase = "trial"
                model(**batch)
    finally:
        hook.remove()
    return Trial(replay(ledger.entries, set()).get("trial", {}), few=max(tokens) <= labelled_loss.TRIAL_TOKENS)


def warm(model: Any, task: str) -> None:
    """A forward pass of a few tokens, in which fast paths try what they try once.

    That is little beside a step, and would blur the difference of two.
    """
    batch = inputs(model, Setting(batch=1, length=8, padded=False), task)
    labels = batch.pop("labels")
    if task == "seq2seq":
        batch["decoder_input_ids"] = labels
    with answering_autocast(), Ledger([]), Standins(gpu=False):
        model(**batch)


class _Compared(Exception):
    """The head's two ways have been compared, and what would follow is not asked for."""


def _ledger(model: Any, adapter: Adapter, batch: Mapping[str, Tensor]) -> Ledger:
    return Ledger([*model.parameters(), *model.buffers(), *adapter.tensors().values(), *batch.values()])


@contextmanager
def _checkpointing(model: Any, setting: Setting, gpu: bool, quantised: set[int]) -> Iterator[None]:
    """As the setting has it; afterwards the model is as before."""
    if not setting.checkpointing:
        yield
        return
    cached = getattr(model.config, "use_cache", None)
    model.config.use_cache = False  # as transformers does, with a warning
    again = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), Standins(gpu=gpu, quantised=quantised))}
    model.activation_checkpointing_enable(again)
    try:
        yield
    finally:
        model.activation_checkpointing_disable()
        model.config.use_cache = cached


def replay(entries: list[Entry], gradients: set[int]) -> dict[str, dict[str, float]]:
    """Phase → role → bytes at the phase's worst moment."""
    backward = [i for i, entry in enumerate(entries) if entry.phase == "backward"]
    middle = backward[len(backward) // 2] if backward else 0
    made = {entry.storage: entry.phase for entry in entries if entry.bytes > 0}
    freed = {entry.storage: entry.phase for entry in entries if entry.bytes < 0}
    live: dict[str, float] = dict.fromkeys(("activations", "logits", "temporary", "gradients"), 0.0)
    worst: dict[str, tuple[float, dict[str, float]]] = {}
    for i, entry in enumerate(entries):
        live[_role(entry.storage, made, freed, gradients)] += entry.bytes
        phase = entry.phase if entry.phase != "backward" else PHASES[3 if i < middle else 4]
        total = sum(live.values())
        if phase not in worst or total > worst[phase][0]:
            worst[phase] = (total, dict(live))
    return {phase: live for phase, (_, live) in worst.items()}


def _role(storage: int, made: dict[int, str], freed: dict[int, str], gradients: set[int]) -> str:
    if storage in gradients:
        return "gradients"
    match made[storage]:
        case "loss":
            return "logits"
        case "forward" if freed.get(storage) != "forward":
            return "activations"
    return "temporary"


def inputs(model: Any, setting: Setting, task: str) -> dict[str, Tensor]:
    """A batch for the model's forward: every token labelled, the last one of all rows but the first padding."""
    rows, length = setting.batch, setting.length
    ids = torch.full((rows, length), 3, dtype=torch.int64)
    mask = torch.ones_like(ids)
    if setting.padded:
        mask[1:, -1] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if task in ("classification", "regression"):
        if getattr(model.config, "pad_token_id", None) is None:
            model.config.pad_token_id = 0
        return batch | {"labels": torch.zeros(rows, dtype=torch.int64)}
    if task == "seq2seq" and getattr(model.config, "decoder_start_token_id", None) is None:
        model.config.decoder_start_token_id = 0
    return batch | {"labels": ids.masked_fill(mask == 0, IGNORED)}
