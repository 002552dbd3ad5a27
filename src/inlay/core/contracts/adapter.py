"""An adapter: everything one method put into one model under one name.

What a method does around every optimizer step is its adapter's `Clock`: a budget that shrinks (AdaLoRA), a rank drawn
anew (DyLoRA), a mask found half-way (LT-SFT), a regulariser. PyTorch calls it around the steps of every optimizer, so
no training loop has to: plain loops, `transformers.Trainer` and TRL's trainers all keep the schedule.

    backward ─▶ before_step (weights and gradients of this step) ─▶ optimizer.step ─▶ after_step (new weights)

Nobody is told of a step that is left out because float16 overflowed, and gradients are without their scale when a
clock sees them: `torch.amp.GradScaler` does not call most optimizers then, but a fused one it calls all the same, and
lets it skip the step and take the scale away by itself.
"""

from __future__ import annotations

import hashlib
import weakref
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from inlay.core.contracts.method import Method
from inlay.core.contracts.pieces import DeltaPiece, Piece, PromptPiece, SubsetPiece
from inlay.core.contracts.shared import shared_in
from inlay.core.errors import UnsupportedError, problems
from inlay.core.model.select import Places, Where


class Held(nn.Module):
    """Holds an adapter's own copy of a parameter where optimizers, `.to(device)` and state dicts find it."""

    def __init__(self, value: nn.Parameter) -> None:
        super().__init__()
        self.value = value


class Copies(Mapping[str, nn.Parameter]):
    """Full parameter name → the adapter's copy. Looked up anew each time, because the parameters may be replaced."""

    def __init__(self, held: Mapping[str, Held] | None = None) -> None:
        self.held = dict(held or {})

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.held[name].value

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


@dataclass(eq=False, repr=False)
class Adapter:
    """One attached adapter.

    Attributes:
        name: the name that `use`, `save` and `detach` take.
        method: its hyper-parameters.
        places: the user's `where` and `layers`.
        pieces: its trained modules and their places.
        copies: full parameter name → the adapter's own values (`modules_to_save`).
        modules_to_save: the module paths those belong to.
        clock: what happens around an optimizer's steps; None where the method does nothing there.
        prompts: the pieces that are prompts.
        changes_base: whether it changes the base's own weights, which all rows of a batch share.
        reads_span: whether some delta acts at positions of the prompt (`core/prompts/span.py`).
    """

    name: str
    method: Method
    places: Places
    pieces: list[Piece]
    copies: Copies = field(default_factory=Copies)
    modules_to_save: tuple[str, ...] = ()
    clock: Clock | None = None
    prompts: tuple[PromptPiece, ...] = field(init=False)
    changes_base: bool = field(init=False)
    reads_span: bool = field(init=False)

    def __post_init__(self) -> None:
        # Needed in every forward, so computed once; a cached property cannot be traced by Dynamo.
        self.prompts = tuple(p for p in self.pieces if isinstance(p, PromptPiece))
        self.changes_base = any(isinstance(p, SubsetPiece) for p in self.pieces)
        self.reads_span = any(isinstance(p, DeltaPiece) and p.delta.reads_span for p in self.pieces)

    def __repr__(self) -> str:
        """Three lines: what it is, where it is, how large it is."""
        settings = self.method.to_dict()
        said = ", ".join(f"{key}={value!r}" for key, value in settings.items() if key != "method")
        where = self.where if isinstance(self.where, str) else repr(self.where)
        if isinstance(self.where, (list, tuple)):
            where = ", ".join(self.where)
        saved = f", and {', '.join(self.modules_to_save)} whole" if self.modules_to_save else ""
        return (
            f"Adapter {self.name!r}: {type(self.method).name}({said})\n"
            f"  at {len(self.pieces):,} place{'s' * (len(self.pieces) != 1)} ({where}){saved}\n"
            f"  {self.count:,} trained parameters"
        )

    @property
    def where(self) -> Where:
        """Where the adapter is, in the user's words or the method's default."""
        return self.places.where if self.places.where is not None else self.method.default_where

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the adapter, under the name it has in a file.

        ``delta/<site>/<name>``, ``prompt/<key>/<name>``, ``difference/<parameter>/<name>``, ``shared/<key>/<name>``,
        ``copy/<parameter>``.
        """
        return self._named(keep_vars=False)

    def _named(self, *, keep_vars: bool) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for piece in self.pieces:
            kind, module = kind_and_module(piece)
            owned = shared_in(module)
            for name, tensor in module.state_dict(keep_vars=keep_vars).items():
                owner = next((o for o in owned if name.startswith(f"{o}.")), None)
                if owner is None:
                    found[f"{kind}/{piece.key}/{name}"] = tensor
                else:
                    found[f"shared/{owned[owner].key}/{name.removeprefix(f'{owner}.')}"] = tensor
        return found | {f"copy/{n}": p for n, p in self.copies.items()}

    def parameter_groups(self, learning_rate: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: one for each learning rate that the method asks for (LoRA+ has two).

        Args:
            learning_rate: the rate of parameters for which the method asks no other.
        """
        by_rate: dict[float, list[nn.Parameter]] = {}
        seen: set[int] = set()
        for name, value in self._named(keep_vars=True).items():
            if isinstance(value, nn.Parameter) and id(value) not in seen:
                seen.add(id(value))
                by_rate.setdefault(self.method.rate_of(name), []).append(value)
        return [
            {"params": values, "lr": learning_rate * factor, "weight_decay": weight_decay}
            for factor, values in by_rate.items()
        ]

    def modules(self) -> list[nn.Module]:
        """The trained modules, in the order of the model."""
        return [kind_and_module(piece)[1] for piece in self.pieces]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Every trained parameter, copies of whole modules included."""
        seen: set[int] = set()
        for module in self.modules():
            for parameter in module.parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield parameter
        yield from self.copies.values()

    @property
    def count(self) -> int:
        """Number of trained values of the method itself, without the copies of `modules_to_save`."""
        return sum(p.numel() for p in self.parameters()) - self.count_copied

    @property
    def count_copied(self) -> int:
        """Number of trained values in the copies of `modules_to_save`."""
        return sum(p.numel() for p in self.copies.values())

    @property
    def trainable(self) -> bool:
        return any(p.requires_grad for p in self.parameters())

    @trainable.setter
    def trainable(self, value: bool) -> None:
        for parameter in self.parameters():
            parameter.requires_grad_(value)

    @property
    def digest(self) -> str:
        """SHA-256 over names, shapes, types and values: adapters with equal digests are equal."""
        return digest_of(self.tensors())


def digest_of(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the tensors in the order of their names."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def kind_and_module(piece: Piece) -> tuple[str, nn.Module]:
    """The word with which the names of a piece's tensors begin, and its trained module."""
    match piece:
        case DeltaPiece():
            return "delta", piece.delta
        case PromptPiece():
            return "prompt", piece.prompt
        case SubsetPiece():
            return "difference", piece.difference


def not_finite(adapter: Adapter) -> list[str]:
    """Names of the tensors with infinite or NaN values, among those a file would hold. (A gate that is open or closed
    for good may be infinite during training.)"""
    _, tensors = adapter.method.stored(adapter)
    return [n for n, value in tensors.items() if value.is_floating_point() and not bool(value.isfinite().all())]


def check_finite(adapters: Sequence[Adapter]) -> None:
    """Raise one `UnsupportedError` that names every tensor with infinite or NaN values.

    Whatever is computed from them is meaningless, and the largest of several errors need not show it.
    """
    wrong = [f"{adapter.name!r}: {name}" for adapter in adapters for name in not_finite(adapter)]
    if wrong:
        said = [*wrong[:8], *([f"and {len(wrong) - 8} more"] if len(wrong) > 8 else [])]
        raise UnsupportedError(
            problems("values that are not finite, as after a training that diverged; train again", said)
        )


class Clock(ABC):  # noqa: B024
    """Called around the steps of every optimizer that holds trainable parameters of its adapter. Abstract.

    Keep counters and averages in buffers (of a `Shared` child, for example), so that they are stored and a resumed run
    continues where it stopped.

    Read hyper-parameters from ``self.adapter.method`` when you need them, not before: a training run may fill in the
    number of steps (`Method.for_steps`) after attaching.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        _keep(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # a deep copy counts its own steps
        _keep(self)

    def before_step(self, optimizer: Optimizer) -> None:  # noqa: B027 - either half may be left out
        """The gradients are complete: read or change them here, or raise to prevent the step."""

    def after_step(self, optimizer: Optimizer) -> None:  # noqa: B027
        """The parameters have their new values: change them in place here, under `no_grad`, if need be."""


_CLOCKS: weakref.WeakSet[Clock] = weakref.WeakSet()
_hooks: list[Any] = []


def _keep(clock: Clock) -> None:
    _CLOCKS.add(clock)
    if not _hooks:  # registered with the first clock, so that other processes pay nothing
        _hooks.append(register_optimizer_step_pre_hook(lambda optimizer, *_: _tell(optimizer, "before_step")))
        _hooks.append(register_optimizer_step_post_hook(lambda optimizer, *_: _tell(optimizer, "after_step")))


def _tell(optimizer: Optimizer, what: str) -> None:
    if not _CLOCKS:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    told = [c for c in _CLOCKS if any(p.requires_grad and id(p) in held for p in c.adapter.parameters())]
    if not told or _overflowed(optimizer):
        return
    _unscale(optimizer)
    for clock in told:
        getattr(clock, what)(optimizer)


def _overflowed(optimizer: Optimizer) -> bool:
    """Whether a fused optimizer has been told by a GradScaler to skip this step."""
    found: Tensor | None = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found.item())


def _unscale(optimizer: Optimizer) -> None:
    """Take a GradScaler's scale away now, where a fused optimizer would do so later."""
    scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.div_(scale.to(parameter.grad.device))
    optimizer.grad_scale = None  # type: ignore[attr-defined]
