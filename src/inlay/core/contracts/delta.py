"""The first contract: a change to what one layer computes.

    x ── pre ──▶ layer ──▶ post ──▶ y          the activation view: row-wise, so rows may differ
    (w, b) ────▶ weight ───▶ (w', b')          the weight view: for merging; must agree with the first

Both views are given by the method and held equal by a law. `post` is given the `Site`,
because some methods (DoRA) read the frozen weight itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from inlay.core.model.site import Site


class Delta(nn.Module):
    """One trained piece at one site. Abstract; `__init__` makes storage, `initialise` fills it.

    Class variables:
        merges: whether it has a weight view.
        reads_span: whether it needs to know where each row's prompt lies (`core/prompts/span.py`).
    """

    merges: ClassVar[bool] = True
    reads_span: ClassVar[bool] = False

    def initialise(self, site: Site) -> None:
        """Fill the parameters of a fresh delta; not called when stored ones are about to be read in.

        Draws from torch's global generator. May read the base (`site.read_weight()`), never write it.
        """

    def pre(self, x: Tensor) -> Tensor:
        """What enters the layer. ``x``: (..., in)."""
        return x

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """What leaves the layer.

        Args:
            x: what entered it, after `pre`: (..., in), ids (...) for an embedding; at a site that reads other
                modules (`Site.sources`), what entered those, a tuple.
            y: what the base computed from it: (..., out), the part only where the site is a part.
            site: for `site.read_weight()`.
        """
        return y

    def post_into(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """`post`, where nobody else holds y: a fast path may write it. `post` stays as its oracle."""
        return self.post(x, y, site)

    def with_layer(self, x: Tensor, site: Site) -> Tensor | None:
        """The layer and this delta at once, (..., out), where a fast path computes both; else None.

        Asked only of a delta alone at a linear layer that runs no code but `torch.nn.Linear`'s.
        """
        return None

    @classmethod
    def grouped(cls, deltas: Sequence[Self], site: Site, dtype: torch.dtype) -> Grouped | None:
        """Deltas of this very class, of several adapters, as one object that computes them all, one a segment.

        Args:
            deltas: one a segment, in evaluation mode; one may stand for several segments.
            dtype: of the activations.

        Returns:
            None where these cannot be stacked; their rows are then computed one adapter after another.
        """
        return None

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The layer's new weight and bias, in canonical layout (`core/model/layer.py`) and the weight's dtype.

        Raises:
            NotImplementedError: no weight has this effect; `merges` is False then.
        """
        raise NotImplementedError(f"{type(self).__name__} has no weight view")


class Grouped:
    """Stacked deltas, one for each segment. Abstract. `pre` and `post` are a `Delta`'s, without gradients.

    Class variables:
        reads_base: whether the stacks hold something computed from the layer's own parameters.
    """

    reads_base: ClassVar[bool] = False

    def pre(self, x: Tensor) -> Tensor:
        """(segments, tokens, in) → the same shape; `x` is not written."""
        return x

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """(segments, tokens, in), (segments, tokens, out) → (segments, tokens, out); `y` may be written."""
        return y

    post_into = post


def says_itself(kind: type[Delta], form: str, *of: str) -> bool:
    """Whether a class has its own `form` of the very methods `of` that it has: no subclass inherits the fast form of
    what it computes otherwise."""
    order = [next(i for i, c in enumerate(kind.__mro__) if name in c.__dict__) for name in (form, *of)]
    return order[0] <= min(order[1:])


def groups_itself(kind: type[Delta]) -> bool:
    """Whether a class says how it is grouped for the very `pre` and `post` that it has."""
    return says_itself(kind, "grouped", "pre", "post")


def cast(parameter: Tensor, like: Tensor) -> Tensor:
    """An adapter's float32 parameter in the dtype of the activations it meets; gradients stay float32."""
    return parameter.to(like.dtype)
