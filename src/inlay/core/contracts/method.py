"""What a method is: a frozen dataclass of hyper-parameters that says what to build, never where.

A method's file defines one subclass of `DeltaMethod`, `PromptMethod` or `SubsetMethod`, whose pieces fulfil one of the
three contracts (`delta.py`, `prompt.py`, `subset.py`). Class variables hold the facts from which tables, the command
line and the training defaults are derived; the fields are the hyper-parameters.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor, nn

from inlay.core.contracts.delta import Delta
from inlay.core.contracts.pieces import DeltaPiece, Piece, PromptPiece, SubsetPiece
from inlay.core.contracts.prompt import KeyValuePrompt, TokenPrompt
from inlay.core.contracts.subset import DenseDifference, Difference
from inlay.core.errors import ConfigError, SelectionError, UnsupportedError, nearest, problems
from inlay.core.model.layer import Kind, store_of
from inlay.core.model.select import Places, select
from inlay.core.model.site import Site
from inlay.core.model.view import ModelView

if TYPE_CHECKING:  # an adapter has a method, whose hooks get the adapter: the only two files that import each other
    from inlay.core.contracts.adapter import Adapter, Clock

Batches = Iterable[Mapping[str, Any]]
"""Batches, each the keyword arguments of one call of the model's forward."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The training defaults of a method, used where the user says nothing.

    Attributes:
        learning_rate: peak rate of AdamW.
        schedule: a `transformers` scheduler name (``linear``, ``cosine``, ``constant_with_warmup``).
        warmup: share of the steps over which the rate rises.
        weight_decay: AdamW's decoupled decay.
    """

    learning_rate: float
    schedule: str = "linear"
    warmup: float = 0.06
    weight_decay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Hyper-parameters of one published method. Abstract; subclasses are final.

    Class variables:
        name: registry key, file name, command-line word and documentation row.
        paper: where it was published.
        family: heading in the methods table.
        table_order: where its row stands among its family's; rows that say nothing stand last, by name.
        recipe: training defaults.
        default_where: the places of the paper, as roles (`core/model/roles.py`) that hold for every architecture.
        needs_data: whether `attach` must be given batches to initialise from (`core/measure.py`).
        expected_failures: law name → why the method cannot obey it; an unexpected pass fails.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    family: ClassVar[str]
    table_order: ClassVar[int] = 1000
    recipe: ClassVar[Recipe]
    default_where: ClassVar[str | tuple[str, ...]]
    needs_data: ClassVar[bool] = False
    expected_failures: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        """Build everything this method puts into a model, without touching the model.

        Args:
            view: read-only access to the model: sites, attention places, parameters.
            places: the user's `where` and `layers`; the method's default applies where they are None.

        Raises:
            SelectionError: the places match nothing, or something the method cannot adapt.
        """

    def measure(self, model: nn.Module, places: Places, data: Batches) -> Measured:
        """Look at the data before anything is built; called only where `needs_data`."""
        return Measured(self)

    def foreseen(self, view: ModelView, places: Places) -> Self:
        """This method with the sizes that `measure` would give it, so that a plan can count without data."""
        return self

    def inherit(self, model: nn.Module) -> Measured:
        """Take over the adapters this method is made of from those attached to `model` (AdapterFusion)."""
        return Measured(self)

    def takes_over(self) -> tuple[str, ...]:
        """Names of the adapters that `inherit` looks for; in `inlay train`, their folders."""
        return ()

    def taking_over(self, names: Sequence[str]) -> Self:
        """This method, made of the adapters with these names."""
        return self

    def clock(self, adapter: Adapter) -> Clock | None:
        """What happens around the optimizer's steps for this adapter (`core/contracts/adapter.py`); None is nothing."""
        return None

    def rate_of(self, name: str) -> float:
        """Factor on the learning rate of the tensor stored as `name`."""
        return 1.0

    def ready(self, adapter: Adapter) -> bool:
        """Whether the adapter could be a run's result now; False while a schedule that shapes it is not over."""
        return True

    def stored(self, adapter: Adapter) -> tuple[Method, dict[str, Tensor]]:
        """The method and tensors to store; what only training needed may be left out once a schedule is over.

        The returned method must build exactly the returned tensors.
        """
        return self, adapter.tensors()

    def account(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Facts about an adapter that can be read off its tensors; `inlay inspect` shows them."""
        return {}

    def for_steps(self, total: int) -> Self:
        """This method for a run of `total` optimizer steps; fills in `total_steps` where it is None."""
        fields = {f.name for f in dataclasses.fields(self)}
        if "total_steps" in fields and getattr(self, "total_steps") is None:  # noqa: B009 - not every method has it
            return dataclasses.replace(self, total_steps=total)  # type: ignore[call-arg]
        return self

    @classmethod
    @abstractmethod
    def examples(cls) -> list[Self]:
        """Small instances on which the laws are run; together they take every branch of the method."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for YAML, JSON and file headers: the registry key and every field."""
        return {"method": self.name, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Unknown or ill-typed keys are errors with the nearest name."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        given = {k: v for k, v in values.items() if k != "method"}
        wrong = [f"unknown hyper-parameter {k!r}{nearest(k, known)}" for k in given if k not in known]
        if wrong:
            raise ConfigError(problems(f"method {cls.name!r}", wrong))
        return cls._of({k: _plain(v) for k, v in given.items()})

    @classmethod
    def _of(cls, fields: Mapping[str, Any]) -> Self:
        """Make the method from its fields; overridden where the constructor takes other arguments."""
        return cls(**fields)

    def require(self, *checks: tuple[bool, str]) -> None:
        """Raise one `ConfigError` that lists the message of every check that is false."""
        wrong = [message for holds, message in checks if not holds]
        if wrong:
            raise ConfigError(problems(f"method {self.name!r}", wrong))


@dataclass(frozen=True)
class Measured:
    """What `Method.measure` found out about the data, or `Method.inherit` about attached adapters.

    Attributes:
        method: the one to build and store, with the sizes that depend on the data filled in.
        values: piece key (``Site.key``, parameter name) → name in the piece's state → initial value.
        places: the places, where they follow from what was found and not from the user; else None.
    """

    method: Method
    values: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    places: Places | None = None


@dataclass(frozen=True, kw_only=True)
class DeltaMethod(Method, ABC):
    """A method that builds one `Delta` per selected site."""

    kinds: ClassVar[tuple[Kind, ...]] = ("linear",)

    @abstractmethod
    def build(self, site: Site) -> Delta:
        """A delta for `site` with uninitialised parameters."""

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        return [DeltaPiece(s, self.build(s)) for s in select(view, places, self.default_where, self.kinds)]


@dataclass(frozen=True, kw_only=True)
class PromptMethod(Method, ABC):
    """A method that builds one prompt for the whole model."""

    @abstractmethod
    def build(self, view: ModelView, layers: tuple[int, ...] | None) -> TokenPrompt | KeyValuePrompt:
        """A prompt with uninitialised parameters.

        Args:
            layers: numbers of the layers that get a prompt; None means those of the paper.

        Raises:
            UnsupportedError: on this model no prompt can be put in front of the text exactly.
        """

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        if places.where is not None:
            raise SelectionError(
                f"method {self.name!r} stands in front of the text, so it takes no `where`; `layers` chooses layers"
            )
        return [PromptPiece("prompt", self.build(view, places.layers))]


@dataclass(frozen=True, kw_only=True)
class SubsetMethod(Method, ABC):
    """A method that trains chosen parameters of the base."""

    @abstractmethod
    def choose(self, view: ModelView, places: Places) -> list[str]:
        """Full names of the parameters to train, in the order of the model.

        Raises:
            SelectionError: nothing is chosen.
        """

    def difference(self, name: str, value: Tensor) -> Difference:
        """The trained difference of one parameter; dense unless the method says otherwise."""
        return DenseDifference(value)

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        found: list[Piece] = []
        for name in self.choose(view, places):
            path, _, parameter = name.rpartition(".")
            value = view.modules[path]._parameters[parameter]
            assert value is not None
            store = store_of(view.modules[path])
            if store is not None and (parameter == "weight" or not value.is_floating_point()):
                raise UnsupportedError(
                    f"method {self.name!r} trains the base's own weights, but {name} is quantised ({store.name}) and "
                    "cannot be changed in small steps. Load the base without quantisation, or choose a method that "
                    "adds to it (lora)"
                )
            found.append(SubsetPiece(path, parameter, self.difference(name, value)))
        return found


def _plain(value: Any) -> Any:
    """Turn lists from YAML and JSON into tuples, so that the method stays hashable."""
    return tuple(_plain(v) for v in value) if isinstance(value, list) else value
