"""The second contract: trained positions that no one sees.

    TokenPrompt      vectors at the input, before the embedded text       (length, hidden)
    KeyValuePrompt   key/value pairs at attention, before the text's own   (key heads, length, head size)

A method says what the vectors are. The core (`core/prompts/prompting.py`) owns lengths, masks, positions, labels
and caches: outputs keep the input's length, and virtual positions never show.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from inlay.core.model.view import ModelView

KeyValues = dict[str, tuple[Tensor, ...]]
"""Attention path → keys and values (key heads, length, head size).

Behind them a gate a head, where gated; or, where the text weighs the pairs, w (length, hidden) and b (length):
for a token with h entering the attention module, pair j is multiplied by σ(w_j · h + b_j), keys and values alike.
"""


class TokenPrompt(nn.Module, ABC):
    """Virtual tokens in front of the text. Abstract.

    On a decoder they are run through the model once a call and served as key/value pairs, which is exact
    because no later token can change them; on an encoder they take part in the sequence.
    """

    length: int

    @abstractmethod
    def embeddings(self) -> Tensor:
        """The virtual tokens' input embeddings, (length, hidden)."""

    def initialise(self, view: ModelView) -> None:
        """Fill the parameters of a fresh prompt; not called when stored ones are about to be read in."""


class KeyValuePrompt(nn.Module, ABC):
    """Key/value pairs in front of the text's own at some attention modules. Abstract.

    Class variables:
        gated: the pairs have a softmax of their own, whose output is added times a gate; the text's attention
            and its positions stay as they are (LLaMA-Adapter). Otherwise they share the text's softmax, and
            its positions move on by `length`.
        weighed: each token of the text weighs the pairs that it sees (UniPELT).
    """

    gated: ClassVar[bool] = False
    weighed: ClassVar[bool] = False
    length: int

    @abstractmethod
    def keys_values(self) -> KeyValues:
        """The pairs of each attention module, as `KeyValues` says; of every module with the same number of tensors."""

    def initialise(self, view: ModelView) -> None:
        """As `TokenPrompt.initialise`."""
