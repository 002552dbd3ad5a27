"""What operations on tensors without values answer, kept: most of a step's operations are the same in every layer.

For many operations torch finds the shape of the result in Python, in up to a millisecond each, and a step of a few
layers has ten thousand of them. Shape and work follow from the operands' shapes, strides and types and from the other
arguments alone, so torch is asked once for each of these, and afterwards its answer is given again.

Left to torch every time are views, which must share their operand's storage and are quick, and operations on tensors
that have values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from inlay.core.upstream import schema_of, storage_number

META = torch.device("meta")
MOST = 50_000  # answers kept; a plan of all methods has some thousands
_PLAIN = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}


class Work(NamedTuple):
    """Of one operation: products are counted, everything else is taken to wait for memory."""

    flops: float
    bytes_moved: float


class _Kind(NamedTuple):
    """What an operator's schema says.

    Attributes:
        makes: ``new`` tensors and changes none, ``views`` of operands, the operands that it has ``written`` into, or
            ``other`` things.
        written: the operands that are returned, by place or by name.
    """

    makes: str
    written: tuple[int | str, ...] = ()


class _Answer(NamedTuple):
    """Attributes:
    made: size, stride and type of every new tensor; None where operands are returned.
    """

    made: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...] | None
    work: Work


class _Unknown(Exception):
    """An argument under which no answer can be kept."""


NOTHING = Work(0.0, 0.0)
_ANSWERS: dict[Any, _Answer] = {}
_KINDS: dict[Any, _Kind] = {}


def recalled(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Work, Sequence[Tensor]] | None:
    """What ``func(*args, **kwargs)`` returns, how much work it is, and the new tensors among what it returns.

    None where torch was not asked this before.
    """
    kind = _KINDS.get(func)
    if kind is None or kind.makes not in ("new", "written"):
        return None
    try:
        known = _ANSWERS.get(_key(func, args, kwargs))
    except (_Unknown, TypeError):
        return None
    if known is None:
        return None
    if known.made is None:
        written = [args[at] if isinstance(at, int) else kwargs[at] for at in kind.written]
        return (written[0] if len(written) == 1 else tuple(written)), known.work, ()
    made = [torch.empty_strided(size, stride, dtype=dtype, device=META) for size, stride, dtype in known.made]
    return (made[0] if len(made) == 1 else tuple(made)), known.work, made


def asked(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Work]:
    """The same, by running it; kept where it may be."""
    kind = _KINDS.get(func)
    if kind is None:
        kind = _KINDS[func] = _kind_of(func)
    out = func(*args, **kwargs)
    if kind.makes == "views":
        return out, NOTHING
    work = _work(func, args, kwargs, out)
    if kind.makes != "other" and len(_ANSWERS) < MOST:
        _keep(kind, func, args, kwargs, out, work)
    return out, work


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among an operator's arguments or results, which hold lists at most one deep."""
    if isinstance(values, Tensor):
        return [values]
    found: list[Tensor] = []
    for value in values if isinstance(values, (list, tuple)) else ():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [v for v in value if isinstance(v, Tensor)]
    return found


def _work(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Work:
    count = flop_registry.get(func.overloadpacket)
    if count is not None:
        return Work(float(count(*args, **kwargs, out_val=out)), 0.0)
    outputs = tensors_in(out)
    given = [*tensors_in(args), *tensors_in([*kwargs.values()])]
    if not schema_of(func).is_mutable and _shares(outputs, given):
        return NOTHING
    return Work(0.0, float(sum(t.numel() * t.element_size() for t in (*given, *outputs))))


def _shares(outputs: Sequence[Tensor], given: Sequence[Tensor]) -> bool:
    """Whether nothing was made: every output lies in an operand's storage, or has nothing in it."""
    own = {storage_number(t.untyped_storage()) for t in given}
    return all(storage_number(t.untyped_storage()) in own or not t.untyped_storage().nbytes() for t in outputs)


def _key(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the answer depends on. Operators live as long as the process; their own hash is slow.

    Raises:
        _Unknown: an argument that is not known to be all that it shows.
    """
    if not kwargs:
        return (id(func), *map(_described, args))
    return (id(func), *map(_described, args), *kwargs, *map(_described, kwargs.values()))


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.device.type != "meta" or value.layout is not torch.strided:
            raise _Unknown
        return value.shape, value.stride(), value.dtype
    kind = type(value)
    if kind in _PLAIN:
        return kind, value  # with its type: 1 == 1.0 == True
    if kind is list or kind is tuple:
        return tuple(map(_described, value))
    raise _Unknown


def _kind_of(func: Any) -> _Kind:
    schema = schema_of(func)
    if not schema.returns or any(str(r.type) not in ("Tensor", "Tensor[]") for r in schema.returns):
        return _Kind("other")
    returned = [r.alias_info for r in schema.returns]
    if not schema.is_mutable:
        if all(alias is not None for alias in returned):
            return _Kind("views")
        plain = all(alias is None for alias in returned) and all(str(r.type) == "Tensor" for r in schema.returns)
        return _Kind("new" if plain else "other")
    taken = [(a.name if a.kwarg_only else at, a.alias_info) for at, a in enumerate(schema.arguments)]
    written: list[int | str] = []
    for alias in returned:
        if alias is None or not alias.is_write:
            return _Kind("other")
        written += [at for at, own in taken if own is not None and own.before_set == alias.before_set]
    return _Kind("written", tuple(written)) if len(written) == len(returned) else _Kind("other")


def _keep(kind: _Kind, func: Any, args: Any, kwargs: Any, out: Any, work: Work) -> None:
    """Keep an answer, where nothing came of the call that a new tensor of that shape would not give."""
    outputs = [out] if isinstance(out, Tensor) else list(out)
    if not all(isinstance(t, Tensor) and t.is_meta for t in outputs):
        return
    try:
        key = _key(func, args, kwargs)
        hash(key)
    except (_Unknown, TypeError):
        return
    if kind.makes == "written":
        _ANSWERS[key] = _Answer(None, work)
        return
    storages = {storage_number(t.untyped_storage()) for t in (*tensors_in(args), *tensors_in([*kwargs.values()]))}
    for tensor in outputs:
        storage = tensor.untyped_storage()
        if storage_number(storage) in storages or storage.nbytes() != _reach(tensor):
            return  # a view that its schema does not tell of
        storages.add(storage_number(storage))
    _ANSWERS[key] = _Answer(tuple((t.shape, t.stride(), t.dtype) for t in outputs), work)


def _reach(tensor: Tensor) -> int:
    """Bytes from a tensor's first number to its last."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + last) * tensor.element_size()
