"""What a training step allocates, found by running it on tensors without values.

The model's parameters are on the meta device: every operation gives an output of the right shape, type and life
time, and computes nothing. `Ledger` notes each storage when it is made and when it is freed, in order, so replaying
its entries gives the memory in use at every moment of the real step, backward pass, recomputation and in-place
kernels included.

    forward ── made: activations, temporary        backward ── made: gradients, temporary; freed: activations

Whole numbers (token ids, labels, masks, positions) stay on the CPU with their values, because models branch on them
(a mask without padding is left out) and count with them (labelled positions). What a fast path asks of other
values, namely whether its result is that of its naive twin, is answered with yes: true, and a difference of zero.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inlay.core.upstream import (
    GROUPED_PRODUCT,
    LOOK_AT_NUMBER,
    TorchDispatchMode,
    storage_number,
    tree_leaves,
    tree_map_only,
)
from inlay.plan.answers import META, NOTHING, Work, asked, recalled, tensors_in

WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.bool)
_FILLED = (torch.ops.aten.zeros.default, torch.ops.aten.ones.default, torch.ops.aten.full.default)
LARGE = 2**14  # numbers
_ASKED = (LOOK_AT_NUMBER, torch.ops.aten.equal.default)
CPU = torch.device("cpu")


class Entry(NamedTuple):
    """One allocation (bytes above zero) or release (below), in the order in which they happen."""

    storage: int
    bytes: int
    phase: str


class Ledger(TorchDispatchMode):
    """Notes allocations, releases and work of everything that runs inside of it.

    Args:
        known: tensors that were there before.

    Attributes:
        phase: set by the caller as the step goes on; every entry carries it.
        flops: of products, by phase.
        bytes_moved: read and written by everything else, by phase.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.phase = ""
        self.entries: list[Entry] = []
        self.flops: dict[str, float] = {}
        self.bytes_moved: dict[str, float] = {}
        storages = [tensor.untyped_storage() for tensor in known]
        self._before = {storage_number(s): s for s in storages}  # held: the numbers stay theirs
        self._alive: dict[int, tuple[int, Any]] = {}
        self._count = 0

    def see(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what it makes and how much work it is."""
        kwargs = dict(kwargs) if kwargs else {}
        known = recalled(func, args, kwargs)
        if known is not None:
            out, work, made = known
            for tensor in made:
                self._note(tensor)
        elif func in _ASKED and (looked_at := args[0]).is_meta:
            return _answer(func, looked_at)
        else:
            out, work = self._run(func, args, kwargs)
            for tensor in (out,) if isinstance(out, Tensor) else tensors_in(out):
                self._note(tensor)
        if work is not NOTHING:
            self.flops[self.phase] = self.flops.get(self.phase, 0.0) + work.flops
            self.bytes_moved[self.phase] = self.bytes_moved.get(self.phase, 0.0) + work.bytes_moved
        return out

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Work]:
        """What torch says, of tensors that are all without values, or all with them."""
        given = tensors_in((*args, *kwargs.values()) if kwargs else args)
        without = sum([t.is_meta for t in given])
        if 0 < without < len(given):
            args, kwargs = tree_map_only(Tensor, _without_values, (args, kwargs))
        elif not without and kwargs.get("device") == META and _whole(given, args, kwargs):
            kwargs["device"] = CPU
        elif func in _FILLED and _is_large(args, kwargs):
            kwargs["device"] = META
        return _grouped_product(args, kwargs) if func is GROUPED_PRODUCT else asked(func, args, kwargs)

    def rounds(self, steps: range) -> Iterator[int]:
        """Of a loop whose rounds are `alike`: the first three, and the last.

        The work of those between is what the second and the third lead to: it stays, or becomes evenly more or less.
        """
        seen = [self._work()]
        for step in steps[:3]:
            yield step
            seen.append(self._work())
        between = len(steps) - 4
        if between > 0:
            (*_, before, second, third) = seen
            for total, *at in zip((self.flops, self.bytes_moved), before, second, third, strict=True):
                slope = (at[2] - at[1]) - (at[1] - at[0])
                total[self.phase] = at[2] + between * (at[2] - at[1]) + slope * between * (between + 1) / 2
        yield from steps[3:][-1:]

    def _work(self) -> tuple[float, float]:
        return self.flops.get(self.phase, 0.0), self.bytes_moved.get(self.phase, 0.0)

    def number_of(self, tensor: Tensor) -> int | None:
        """Under which number a tensor's storage was noted; None where it was there before."""
        number, _ = self._alive.get(storage_number(tensor.untyped_storage()), (None, None))
        return number

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage_number(storage), storage.nbytes()
        if address in self._before or address in self._alive or not size:
            return
        self._count += 1
        number = self._count

        def forget(_: Any) -> None:
            self._alive.pop(address, None)
            self.entries.append(Entry(number, -size, self.phase))

        self.entries.append(Entry(number, size, self.phase))
        self._alive[address] = (number, weakref.ref(storage, forget))


# Not in the class: what torch finds there it hides from its compiler, which costs more than the rest of `see`.
Ledger.__torch_dispatch__ = Ledger.see


def _is_large(args: Any, kwargs: Any) -> bool:
    """Whether a tensor of floating-point numbers is made that nobody looks into: a mask, and no table of rates."""
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return bool(dtype.is_floating_point) and math.prod(args[0]) >= LARGE


def _answer(func: Any, tensor: Tensor) -> bool | int | float:
    if func is torch.ops.aten.equal.default or tensor.dtype == torch.bool:
        return True
    return 0.0 if tensor.is_floating_point() else 0


def _grouped_product(args: Any, kwargs: Any) -> tuple[Tensor, Work]:
    """Products with experts' weights: without values only bfloat16 is taken, with values every type."""

    def narrow(tensor: Tensor) -> Tensor:
        return tensor.to(torch.bfloat16) if tensor.is_meta and tensor.is_floating_point() else tensor

    made, work = asked(GROUPED_PRODUCT, tree_map_only(Tensor, narrow, args), tree_map_only(Tensor, narrow, kwargs))
    return made.to(args[0].dtype), work


def _without_values(tensor: Tensor) -> Tensor:
    """The same tensor on the meta device; a single number may stay where it is."""
    if tensor.is_meta or tensor.dim() == 0:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=META)


def _whole(given: list[Tensor], args: Any, kwargs: Any) -> bool:
    """Whether an operation with these arguments makes whole numbers."""
    dtype = kwargs.get("dtype")
    if dtype is not None:
        return dtype in WHOLE
    numbers = [v for v in tree_leaves(args) if isinstance(v, (int, float))]
    return all(t.dtype in WHOLE for t in given) and not any(isinstance(v, float) for v in numbers)
