"""Rows for decoders: one sequence, in which some tokens are scored (have a label)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from inlay.core.errors import DataError, UnsupportedError
from inlay.core.labels import IGNORED
from inlay.data.chat import chat_pieces
from inlay.data.job import Encoded, Job
from inlay.data.joining import Joiner
from inlay.data.prompting import completions_of, prompts_of
from inlay.data.rows import Rows

_BEFORE = "Give a prompt, or a template with a separator: the first token of a text cannot be scored."
_CHANGE = "Change the chat, or the template."


def encode_completions(rows: Rows, job: Job, joiner: Joiner) -> list[list[Encoded] | None]:
    """Prompt, separator, completion and end token; the last two are scored.

    A row that is too long loses the beginning of its prompt first, then the end of its completion.
    """
    both = zip(prompts_of(rows, job.layout, job.template), completions_of(rows, job.layout, job.named), strict=True)
    texts = {
        row: (prompt + job.template.separator, completion)
        for row, (prompt, completion) in enumerate(both)
        if prompt is not None and completion is not None
    }
    lead, end = joiner.lead, job.end
    out: list[list[Encoded] | None] = [None] * len(rows)
    for row, (before, after) in _tokens(rows, joiner, texts).items():
        if not lead and not before:
            rows.found.add(f"{rows.places[row]}: there is nothing before the completion", _BEFORE)
            continue
        if after[len(after) - len(end) :] != end:
            after = after + end
        length = len(lead) + len(before) + len(after)
        after = after[: job.max_length - max(len(lead), 1)]  # at least one token must come before it
        room = job.max_length - len(lead) - len(after)
        before = before[max(len(before) - room, 0) :]
        labels = [IGNORED] * (len(lead) + len(before)) + after
        out[row] = [Encoded(lead + before + after, labels, length)]
    return out


def encode_chats(rows: Rows, job: Job, joiner: Joiner) -> list[list[Encoded] | None]:
    """Chats as the template writes them; assistant turns are scored. Too long ones lose their end."""
    texts: dict[int, list[str]] = {}
    scored: dict[int, list[bool]] = {}
    for row in range(len(rows)):
        messages = rows.chat(row, job.layout.column("messages"))
        if messages is None:
            continue
        try:
            pieces = chat_pieces(messages, job.tokenizer)
        except (DataError, UnsupportedError) as error:
            rows.found.add(f"{rows.places[row]}: {error}", _CHANGE)
            continue
        texts[row] = [text for text, _ in pieces]
        scored[row] = [said for _, said in pieces]
    out: list[list[Encoded] | None] = [None] * len(rows)
    for row, tokens in _tokens(rows, joiner, texts).items():
        ids = [token for piece in tokens for token in piece]
        labels = [
            token if said else IGNORED for piece, said in zip(tokens, scored[row], strict=True) for token in piece
        ]
        labels[: min(len(labels), 1)] = [IGNORED] * min(len(labels), 1)  # nothing comes before the first token
        out[row] = [Encoded(ids[: job.max_length], labels[: job.max_length], len(ids))]
    return out


def encode_texts(rows: Rows, job: Job, joiner: Joiner) -> list[list[Encoded] | None]:
    """Plain text and the end token, all scored; too long texts lose their end, or are split into rows.

    If the tokenizer puts no token in front of a text, each row of a split text begins with the last token of the row
    before, so that every token except the first is scored exactly once.
    """
    column = job.layout.column("text")
    texts = {row: text for row in range(len(rows)) if (text := rows.text(row, column)) is not None}
    lead, end = joiner.lead, job.end
    room = job.max_length - len(lead)
    overlap = 0 if lead else 1
    out: list[list[Encoded] | None] = [None] * len(rows)
    for row, tokens in zip(texts, joiner.plain(list(texts.values())), strict=True):
        body = tokens if tokens[len(tokens) - len(end) :] == end else tokens + end
        last = max(len(body) - overlap, 1) if job.on_long == "split" else 1
        windows = [body[start : start + room] for start in range(0, last, room - overlap)]
        out[row] = [_text_row(lead, window, len(lead) + len(body)) for window in windows]
    return out


def _text_row(lead: Sequence[int], window: Sequence[int], length: int) -> Encoded:
    ids = [*lead, *window]
    unscored = max(len(lead), 1)
    return Encoded(ids, [IGNORED] * unscored + ids[unscored:], length)


def _tokens(rows: Rows, joiner: Joiner, texts: Mapping[int, Sequence[str]]) -> dict[int, list[list[int]]]:
    """Tokens of each row's pieces; rows whose pieces cannot be separated are reported and left out."""
    try:
        return dict(zip(texts, joiner.pieces(list(texts.values())), strict=True))
    except UnsupportedError:
        out = {}
    for row, pieces in texts.items():
        try:
            out[row] = joiner.pieces([pieces])[0]
        except UnsupportedError as error:
            rows.found.add(f"{rows.places[row]}: {error}", "Or use a base with a byte-level tokenizer.")
    return out
