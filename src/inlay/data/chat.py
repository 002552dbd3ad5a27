"""Chats as pieces of text: the assistant's turns are scored, the rest is not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from inlay.core.errors import ConfigError, DataError, UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]
Pieces = list[tuple[str, bool]]  # text, whether it is scored

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def chat_pieces(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, open_turn: bool = False) -> Pieces:
    """A chat as the tokenizer's template writes it, cut where scored text begins and ends.

    The text inside the template's ``{% generation %}`` blocks is scored. A template without them is rendered turn by
    turn: what an assistant turn adds to the text before it (with the generation prompt) is scored, up to the end token.
    That is exact if each text begins with the one before it; a template that rewrites earlier turns is refused.

    Args:
        messages: the turns.
        tokenizer: must have a chat template.
        open_turn: end with the beginning of an assistant turn, for generation.

    Raises:
        ConfigError: the tokenizer has no chat template.
        DataError: the template does not accept the chat.
        UnsupportedError: a template without generation blocks that rewrites earlier turns.
    """
    template = _template(tokenizer)
    if _GENERATION.search(template):
        return _marked(messages, tokenizer, template, open_turn)
    return _compared(messages, tokenizer, open_turn)


def split_last_turn(messages: Sequence[Message]) -> tuple[list[Message], str]:
    """The turns before the last assistant turn, and the text of that turn."""
    last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
    content = messages[last].get("content")
    if not isinstance(content, str):
        raise DataError("the last assistant turn is not plain text, so there is no reference to compare with")
    return list(messages[:last]), content


def _marked(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str, open_turn: bool) -> Pieces:
    from inlay.core.upstream import render_chats

    with _template_errors():
        texts, spans = render_chats(
            conversations=[list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=True,
            add_generation_prompt=open_turn,
            **tokenizer.special_tokens_map,
        )
    text, pieces, at = texts[0], list[tuple[str, bool]](), 0
    for start, end in spans[0]:
        if not at <= start <= end <= len(text):
            raise UnsupportedError(
                "the chat template's {% generation %} blocks overlap or stand inside a macro, so the text in "
                "them cannot be located. Put one block around each assistant turn's content, in the main loop"
            )
        pieces += [(text[at:start], False), (text[start:end], True)]
        at = end
    return _merged([*pieces, (text[at:], False)])


def _compared(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, open_turn: bool) -> Pieces:
    whole = _rendered(messages, tokenizer, open_turn)
    end_token = tokenizer.eos_token or ""
    pieces, at = list[tuple[str, bool]](), 0
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(messages[:place], tokenizer, True)
        after = _rendered(messages[: place + 1], tokenizer, False)
        if not (after.startswith(before) and whole.startswith(after) and len(before) >= at):
            raise UnsupportedError(
                f"the chat template writes message {place + 1} differently once other turns follow, "
                "so the loss cannot be limited to it exactly. Use a template with {% generation %} around "
                "assistant turns, or chats with one assistant turn"
            )
        said = after[len(before) :]
        if end_token and end_token in said:
            said = said[: said.rindex(end_token) + len(end_token)]
        pieces += [(whole[at : len(before)], False), (said, True)]
        at = len(before) + len(said)
    return _merged([*pieces, (whole[at:], False)])


def _rendered(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, open_turn: bool) -> str:
    if not messages and not open_turn:
        return ""
    from inlay.core.upstream import render_chats

    with _template_errors():
        # Not apply_chat_template: it refuses the empty chat in front of an assistant's opening turn.
        texts, _ = render_chats(
            conversations=[list(messages)],
            chat_template=_template(tokenizer),
            add_generation_prompt=open_turn,
            **tokenizer.special_tokens_map,
        )
    return str(texts[0])


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    if not tokenizer.chat_template:
        raise ConfigError(
            "the tokenizer has no chat template, so `messages` cannot be written as text. Use a base made "
            "for chats, set tokenizer.chat_template, or give the data as prompt and completion"
        )
    return str(tokenizer.get_chat_template())


class _template_errors:
    """Turns the errors of a template (roles that must alternate, missing fields) into a `DataError`."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        from jinja2 import TemplateError

        if isinstance(error, TemplateError | TypeError | KeyError):
            raise DataError(f"the chat template does not accept this chat: {error}") from error


def _merged(pieces: Pieces) -> Pieces:
    merged: Pieces = []
    for text, scored in pieces:
        if text and merged and merged[-1][1] == scored:
            merged[-1] = (merged[-1][0] + text, scored)
        elif text:
            merged.append((text, scored))
    return merged
