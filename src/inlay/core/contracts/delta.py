"""The first contract: a change to what one layer computes.

    x ── pre ──▶ layer ──▶ post ──▶ y          the activation view: row-wise, so rows may differ
    (w, b) ────▶ weight ───▶ (w', b')          the weight view: for merging; must agree with the first

The method gives both views, and a law checks that they are equal. `post` gets the `Site` because some methods (DoRA)
read the frozen weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from inlay.core.model.site import Site


class Delta(nn.Module):
    """One trained piece at one site. Abstract; `__init__` creates its parameters, `initialise` fills them.

    Class variables:
        merges: whether it has a weight view.
        reads_span: whether it needs to know where each row's prompt lies (`core/prompts/span.py`).
    """

    merges: ClassVar[bool] = True
    reads_span: ClassVar[bool] = False

    def initialise(self, site: Site) -> None:
        """Fill the parameters of a new delta; not called when they will be read from a file.

        Draws from torch's global generator. May read the base (`site.read_weight()`), never write it.
        """

    def pre(self, x: Tensor) -> Tensor:
        """The changed input of the layer. ``x``: (..., in)."""
        return x

    def post(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """The changed output of the layer.

        Args:
            x: the layer's input, after `pre`: (..., in), or ids (...) for an embedding; at a site that reads other
                modules (`Site.sources`), the tuple of their inputs.
            y: what the base computed from it: (..., out), or the part alone where the site is a part of a layer.
            site: for `site.read_weight()`.
        """
        return y

    def post_into(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """`post` for a y that nothing else uses, so that a fast path may overwrite it; tested against `post`."""
        return self.post(x, y, site)

    def with_layer(self, x: Tensor, site: Site) -> Tensor | None:
        """The layer and this delta in one computation, (..., out), where there is a fast path for it; else None.

        Called only where this delta is the only one at a layer that runs exactly the code of `torch.nn.Linear`.
        """
        return None

    @classmethod
    def grouped(cls, deltas: Sequence[Self], site: Site, dtype: torch.dtype) -> Grouped | None:
        """Stack deltas of exactly this class, from several adapters, into one object that computes all of them.

        Args:
            deltas: one for each segment of rows, in evaluation mode; the same one may serve several segments.
            dtype: of the activations.

        Returns:
            None where they cannot be stacked; the rows are then computed one adapter after another.
        """
        return None

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The layer's new weight and bias, in canonical layout (`core/model/layer.py`) and the weight's dtype.

        Raises:
            NotImplementedError: no weight has this effect, and `merges` is False.
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
    """Whether a class's fast `form` belongs to the methods `of` that it has: a subclass that overrides one of these
    must not inherit the fast form of its parent's."""
    order = [next(i for i, c in enumerate(kind.__mro__) if name in c.__dict__) for name in (form, *of)]
    return order[0] <= min(order[1:])


def groups_itself(kind: type[Delta]) -> bool:
    """Whether a class's `grouped` belongs to the `pre` and `post` that it has."""
    return says_itself(kind, "grouped", "pre", "post")


def cast(parameter: Tensor, like: Tensor) -> Tensor:
    """An adapter's float32 parameter in the dtype of the activations it meets; gradients stay float32."""
    return parameter.to(like.dtype)


def widened(parameter: Tensor) -> Tensor:
    """At least float32, for what 16 bits have no operator of: decompositions nowhere, an LSTM on some processors only.

    An adapter's parameters are float32 already, unless their model was cast with them inside.
    """
    return parameter.float() if parameter.dtype in (torch.float16, torch.bfloat16) else parameter
