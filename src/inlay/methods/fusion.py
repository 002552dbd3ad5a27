"""AdapterFusion: attention over adapters that were trained on other tasks.

Pfeiffer et al. 2020, "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", arXiv:2005.00247,
section 3.2, equations 2–4.

    cₙ = adapterₙ(y) − y                       what each frozen adapter adds, for each token
    s = softmaxₙ((Q y)ᵀ (K cₙ))                Q, K (d, d) with biases
    y ← y + Σₙ sₙ V cₙ                          V (d, d) without; starts at the identity, 1e-6 off its diagonal

Q and K start normal with σ = 0.02 and zero biases; the loss pulls V to the identity, λ ‖V − I‖² with λ = 0.01,
which is added to V's gradient before every optimizer step. The paper draws each adapter's output with its residual;
the authors' code, which produced its results, fuses what the adapters add and puts the residual on afterwards. We
follow the code, whose dropout and temperature are off by default.

The adapters are copied when the fusion is attached, so that its file loads on the bare base. Their `modules_to_save`
are not taken over; a head for the new task is the fusion's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from inlay.authoring import (
    Adapter,
    AdapterNameError,
    Clock,
    Delta,
    DeltaPiece,
    Measured,
    Method,
    ModelView,
    Piece,
    Places,
    Recipe,
    SelectionError,
    UnsupportedError,
    find_roster,
    shared_in,
)
from inlay.methods._composition import restored
from inlay.methods._fused import Fused, PullToIdentity


@dataclass(frozen=True, kw_only=True)
class AdapterFusion(Method):
    """``AdapterFusion(adapters=("mnli", "qqp"))``: a mixture of adapters that the model has already.

    Attributes:
        adapters: names of attached adapters, or in `inlay train` their folders; all must be at the same places, which
            become the fusion's.
        methods: the adapters' methods, filled in when the fusion is attached; if given without `adapters`, new
            adapters of these methods are fused.
        regularisation: λ; the paper uses 0.01.
    """

    name: ClassVar[str] = "fusion"
    paper: ClassVar[str] = "arXiv:2005.00247"
    family: ClassVar[str] = "composition"
    table_order: ClassVar[int] = 60
    recipe: ClassVar[Recipe] = Recipe(learning_rate=5e-5)  # the paper's
    default_where: ClassVar[tuple[str, ...]] = ()
    expected_failures: ClassVar[Mapping[str, str]] = {"identity": "it starts as a mixture of trained adapters"}

    adapters: tuple[str, ...] = ()
    methods: tuple[Method, ...] = ()
    regularisation: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", tuple(self.adapters))
        object.__setattr__(self, "methods", tuple(restored(self.methods)))
        self.require(
            (not self.adapters or len(self.adapters) >= 2, f"adapters are {self.adapters}, expected at least two"),
            (self.regularisation >= 0, f"regularisation is {self.regularisation}, expected at least 0"),
        )

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "methods": [m.to_dict() for m in self.methods]}

    def inherit(self, model: nn.Module) -> Measured:
        if not self.adapters:
            return Measured(self)
        roster = find_roster(model)
        there = {} if roster is None else roster.adapters
        missing = [name for name in self.adapters if name not in there]
        if missing:
            raise AdapterNameError(
                f"no adapter {missing} on this model (there: {sorted(there) or 'none'}); attach first"
            )
        members = [there[name] for name in self.adapters]
        if any(m.places != members[0].places for m in members):
            raise SelectionError(
                "method 'fusion': the adapters are at different places; give adapters that are at the same ones"
            )
        values: dict[str, dict[str, Tensor]] = {}
        for number, member in enumerate(members):
            for piece, module in zip(member.pieces, member.modules(), strict=True):
                own = {f"members.{number}.{name}": value for name, value in module.state_dict().items()}
                values.setdefault(piece.key, {}).update(own)
        method = replace(self, methods=tuple(m.method for m in members))
        return Measured(method, values, members[0].places)

    def takes_over(self) -> tuple[str, ...]:
        return self.adapters

    def taking_over(self, names: Sequence[str]) -> AdapterFusion:
        return replace(self, adapters=tuple(names))

    def pieces(self, view: ModelView, places: Places) -> list[Piece]:
        if len(self.methods) < 2:
            raise SelectionError(
                "method 'fusion' needs at least two trained adapters in `adapters`: names of attached ones, or in "
                "inlay train their folders, --set adapters=PATH,PATH"
            )
        found: dict[str, dict[int, DeltaPiece]] = {}
        for number, method in enumerate(self.methods):
            for piece in method.pieces(view, places):
                found.setdefault(piece.key, {})[number] = _fusible(method, piece)
        return [DeltaPiece(next(iter(held.values())).site, Fused(held)) for held in found.values()]

    def clock(self, adapter: Adapter) -> Clock | None:
        return PullToIdentity(adapter)

    @classmethod
    def examples(cls) -> list[AdapterFusion]:
        from inlay.methods.houlsby import Houlsby
        from inlay.methods.pfeiffer import Pfeiffer

        return [cls(methods=(Pfeiffer(reduction=2), Houlsby(bottleneck=4)))]


def _fusible(method: Method, piece: Piece) -> DeltaPiece:
    if (
        not isinstance(piece, DeltaPiece)
        or piece.label
        or piece.delta.reads_span
        or type(piece.delta).pre is not Delta.pre
        or shared_in(piece.delta)
    ):
        raise UnsupportedError(
            f"method 'fusion' mixes what adapters add to a layer's output, and {method.name!r} at {piece.key} does "
            "something else; fuse bottleneck adapters (pfeiffer, houlsby, parallel), or compose with Stack"
        )
    return piece
