"""Tokenizing pieces of text, so that every token belongs to exactly one piece.

A completion is scored token by token, so no token may span prompt and completion, and the prompt's tokens must be those
from which generation starts. Tokenizing the whole text and cutting by characters gives neither (``Assistant: `` +
``Yes`` has a token `` Yes``); tokenizing each piece alone can insert spaces (SentencePiece marks the start of every
text). So the text up to the end of a piece is tokenized: if the text before the piece keeps its tokens, the rest are
the piece's tokens; if not, the piece is tokenized alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from inlay.core.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORD_STARTS = ("▁", "Ġ")  # how SentencePiece and byte-level vocabularies write a space


class Joiner:
    """Tokenizes texts made of pieces, with one tokenizer.

    Attributes:
        lead: tokens that the tokenizer itself puts in front of every text (a BOS token); often none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        alone = self.plain(["a"])[0]
        whole = list(tokenizer("a")["input_ids"])
        at = next((i for i in range(len(whole)) if whole[i : i + len(alone)] == alone), 0)
        self.lead: list[int] = whole[:at]
        first = str(tokenizer.convert_ids_to_tokens(alone)[0])
        self._marks_start = first.startswith(_WORD_STARTS)

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text, without special tokens."""
        if not texts:
            return []
        # verbose=False: lengths are checked by inlay, with a clearer message than the tokenizer's warning
        out = self._tokenizer(list(texts), add_special_tokens=False, verbose=False, return_attention_mask=False)
        return [list(ids) for ids in out["input_ids"]]

    def pieces(self, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """For each row, a list of pieces, each piece's own tokens.

        Their concatenation is a tokenization of the joined text; a row's first pieces have the same tokens,
        whatever follows them.

        Raises:
            UnsupportedError: the tokenizer would insert a space between two pieces.
        """
        grown = [text for row in rows for text in accumulate(row)]
        tokens = iter(self.plain(grown))
        return [self._cut(row, [next(tokens) for _ in row]) for row in rows]

    def _cut(self, row: Sequence[str], grown: Sequence[list[int]]) -> list[list[int]]:
        cut: list[list[int]] = []
        before: list[int] = []
        for text, ids in zip(row, grown, strict=True):
            piece = ids[len(before) :] if ids[: len(before)] == before else self._alone(text)
            cut.append(piece)
            before = before + piece
        return cut

    def _alone(self, text: str) -> list[int]:
        if not text:
            return []
        if not self._marks_start:
            return self.plain([text])[0]
        # After a line end no space is inserted; the line end's own tokens are removed again.
        anchor, whole = self.plain(["\n", "\n" + text])
        if whole[: len(anchor)] == anchor:
            return whole[len(anchor) :]
        raise UnsupportedError(
            f"the tokenizer joins {text[:20]!r} with the text before it, so the loss cannot be cut there. "
            "End prompts (or the template's separator) with a line end, and start completions with a letter"
        )
