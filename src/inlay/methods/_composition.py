"""Shared by the compositions: methods inside a method.

The members' pieces stay pieces of their own, each labelled with its member's number (`_member.py`), so that files,
counts, initialisation from data and learning rates work as they do for the member alone. How several deltas at one
module combine is in `core/forward/chain.py`; prompts stand one after another; differences to one parameter add up.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from inlay.authoring import (
    Adapter,
    Batches,
    Branch,
    Clock,
    Measured,
    Method,
    ModelView,
    Piece,
    Places,
    PromptMethod,
    Recipe,
    SelectionError,
    UnsupportedError,
)
from inlay.methods._member import Clocks, Member, pieces_of


@dataclass(frozen=True, init=False)
class Composition(Method, ABC):
    """Several methods that make one adapter. Abstract.

    The recipe is that of the member with the smallest learning rate, because all of them are trained at one rate.

    Attributes:
        methods: the members. Each keeps its own default places; the user's `where` applies to all that take one.
    """

    family: ClassVar[str] = "composition"
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-3)  # an instance has its member's
    default_where: ClassVar[tuple[str, ...]] = ()

    methods: tuple[Method, ...]

    def _hold(self, methods: Sequence[Method]) -> None:
        wrong = [m for m in methods if not isinstance(m, Method)]
        self.require((not wrong, f"{wrong} are not methods; give instances such as LoRA(rank=4)"))
        self.require((len(methods) >= 1, "it has no methods; give at least one"))
        failures: dict[str, str] = {}
        for method in methods:
            failures = {**method.expected_failures, **failures}
        facts = {
            "methods": tuple(methods),
            "recipe": min((m.recipe for m in methods), key=lambda r: r.learning_rate),
            "needs_data": any(m.needs_data for m in methods),
            "expected_failures": failures,
        }
        for name, value in facts.items():  # set on the instance; a plain method has them on its class
            object.__setattr__(self, name, value)

    def with_members(self, methods: Sequence[Method]) -> Self:
        """The same composition with other members."""
        return type(self)(*methods)

    def branch(self, number: int) -> Branch | None:
        """The branch on which a member's deltas stand; None if each wraps the ones before it."""
        return None

    @classmethod
    def _of(cls, fields: Mapping[str, Any]) -> Self:
        return cls(*restored(fields.get("methods", ())))

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "methods": [m.to_dict() for m in self.methods]}

    def for_steps(self, total: int) -> Self:
        return self.with_members([m.for_steps(total) for m in self.methods])

    def rate_of(self, name: str) -> float:
        kind, _, rest = name.partition("/")
        number, _, own = rest.partition("/")
        return 1.0 if kind == "copy" else self.methods[int(number)].rate_of(f"{kind}/{own}")

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        found: list[Piece] = []
        for number, (method, own) in enumerate(self._placed(places)):
            found += pieces_of(method, number, self.branch(number), view, own)
        return found

    def _placed(self, places: Places) -> Iterator[tuple[Method, Places]]:
        """Each member with the places that apply to it."""
        if callable(places.where):
            raise SelectionError(
                f"method {self.name!r}: a predicate cannot be stored for several methods; give names or a pattern"
            )
        if places.where is not None and not takes_where(self):
            raise SelectionError(f"method {self.name!r}: none of its methods takes `where`; leave it out")
        for method in self.methods:
            yield method, places if takes_where(method) else replace(places, where=None)

    def measure(self, model: nn.Module, places: Places, data: Batches) -> Measured:
        batches = list(data)
        return self._measured(
            [m.measure(model, p, batches) if m.needs_data else Measured(m) for m, p in self._placed(places)]
        )

    def inherit(self, model: nn.Module) -> Measured:
        found = [m.inherit(model) for m in self.methods]
        if any(measured.places is not None for measured in found):
            raise UnsupportedError(
                f"method {self.name!r}: a method made of attached adapters stands at their places, so it cannot be "
                "a member of a composition; attach it by itself"
            )
        return self._measured(found)

    def _measured(self, found: Sequence[Measured]) -> Measured:
        """The members' findings combined."""
        values = {f"{i}/{key}": state for i, measured in enumerate(found) for key, state in measured.values.items()}
        return Measured(self.with_members([measured.method for measured in found]), values)

    def ready(self, adapter: Adapter) -> bool:
        return all(m.ready(Member(adapter, number)) for number, m in enumerate(self.methods))

    def stored(self, adapter: Adapter) -> tuple[Method, dict[str, Tensor]]:
        found = [m.stored(Member(adapter, number)) for number, m in enumerate(self.methods)]
        tensors = {f"copy/{name}": value.detach() for name, value in adapter.copies.items()}
        for number, (_, own) in enumerate(found):
            tensors |= {f"{kind}/{number}/{rest}": t for n, t in own.items() for kind, _, rest in [n.partition("/")]}
        return self.with_members([method for method, _ in found]), tensors

    def clock(self, adapter: Adapter) -> Clock | None:
        clocks = [m.clock(Member(adapter, number)) for number, m in enumerate(self.methods)]
        return Clocks(adapter, [c for c in clocks if c is not None]) if any(clocks) else None


def takes_where(method: Method) -> bool:
    """Whether the user's `where` applies to a method; it does not to a prompt."""
    if isinstance(method, Composition):
        return any(takes_where(m) for m in method.methods)
    return not isinstance(method, PromptMethod)


def restored(values: Sequence[Any]) -> list[Method]:
    """Methods made from the plain data in a file."""
    from inlay.methods import method_named

    return [v if isinstance(v, Method) else method_named(str(v["method"])).from_dict(v) for v in values]
