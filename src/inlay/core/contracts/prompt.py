"""The second contract: trained virtual positions, which callers of the model never see.

    TokenPrompt      vectors at the input, before the embedded text       (length, hidden)
    KeyValuePrompt   key/value pairs at attention, before the text's own   (key heads, length, head size)

A method says what the vectors are. The core (`core/prompts/virtual_positions.py`) owns lengths, masks, positions,
labels and caches: outputs keep the input's length, and virtual positions never show.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from inlay.core.model.view import ModelView

KeyValues = dict[str, tuple[Tensor, ...]]
"""Attention path → keys and values (key heads, length, head size).

Where `gated`, a third tensor holds one gate for each head. Where `weighed`, w (length, hidden) and b (length) follow:
for a token with input h to the attention module, key and value of pair j are multiplied by σ(w_j · h + b_j).
"""


class TokenPrompt(nn.Module, ABC):
    """Virtual tokens in front of the text. Abstract.

    In a decoder they are run through the model once a call and then used as key/value pairs, which is exact
    because no later token can change them; in an encoder they are part of the sequence.
    """

    length: int

    @abstractmethod
    def embeddings(self) -> Tensor:
        """The virtual tokens' input embeddings, (length, hidden)."""

    def initialise(self, view: ModelView) -> None:
        """Fill the parameters of a new prompt; not called when they will be read from a file."""


class KeyValuePrompt(nn.Module, ABC):
    """Key/value pairs in front of the text's own at some attention modules. Abstract.

    Class variables:
        gated: the pairs have a softmax of their own, whose output is multiplied by a gate and added; the text's
            attention and positions stay as they are (LLaMA-Adapter). Otherwise the pairs share the text's softmax,
            and its positions shift by `length`.
        weighed: each token of the text decides how much each pair counts for it (UniPELT).
    """

    gated: ClassVar[bool] = False
    weighed: ClassVar[bool] = False
    length: int

    @abstractmethod
    def keys_values(self) -> KeyValues:
        """The pairs for each attention module, as `KeyValues` describes, with as many tensors for every module."""

    def initialise(self, view: ModelView) -> None:
        """See `TokenPrompt.initialise`."""
