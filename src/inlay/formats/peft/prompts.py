"""Soft prompts in PEFT's files: only what stands in front of the text once training is over.

    prompt_embeddings   (length, hidden)                     prompt tuning, P-tuning (its encoder is left out)
                        (length, layers · 2 · key width)     prefix tuning (its projection is left out)
    prefix_task_cols    (tasks, length, ranks)               multitask prompts: their product multiplies the prompt;
    prefix_task_rows    (tasks, ranks, hidden)               an adapter of ours is one of the tasks, of rank one

On a sequence-to-sequence model PEFT's prompt has twice the rows, and the second half is never used; its prefix enters
only the decoder, unlike the paper's, so it is refused. On an encoder PEFT puts the prompt where a classifier of whole
texts reads the first token; ours is hidden from the classifier, so that is refused as well (a head that reads each
token sees the same in both). Also refused are a prefix in an encoder, whose text PEFT shifts, and a prefix at attention
with a sliding window, which PEFT's prefix drops out of.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.pieces import PromptPiece
from inlay.core.contracts.prompt import KeyValuePrompt, TokenPrompt
from inlay.core.errors import UnsupportedError
from inlay.core.model.select import Places
from inlay.core.model.view import AttentionPlace, ModelView
from inlay.formats.archive import Archive
from inlay.formats.configuration import Config
from inlay.formats.exchange import Entry, Reading, Writing
from inlay.formats.peft import targets
from inlay.formats.peft.common import PROMPT_PREFIX, header
from inlay.formats.peft.copies import read_copies, write_copies

NAME = "prompt_embeddings"
EACH_TOKEN = ("ForTokenClassification", "ForQuestionAnswering")  # models whose heads do not read the first token only
INITIALISATION = (
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "init_weights",
    "encoder_hidden_size", "prefix_projection", "encoder_reparameterization_type", "encoder_num_layers",
    "encoder_dropout",
)  # fmt: skip


def read_prompt(config: Config, view: ModelView, archive: Archive) -> Reading:
    """PROMPT_TUNING, and P_TUNING without its encoder: the vectors themselves."""
    from inlay.methods.p_tuning import PTuning
    from inlay.methods.prompt_tuning import PromptTuning

    length = config.whole("num_virtual_tokens", 1)
    copies = _sizes(config, view, archive)
    modules = config.whole("num_transformer_submodules", 2 if _encoder_decoder(view) else 1)
    if modules != 1 and not _encoder_decoder(view):
        config.wrong.append(f"num_transformer_submodules is {modules}, but this model is no encoder–decoder")
    config.wrong += _misplaced(view)

    def entries(adapter: Adapter) -> Iterator[Entry]:
        for name, value in adapter.tensors().items():
            if name.endswith("/vectors"):
                shape = (length * modules, value.shape[1])
                yield Entry(name, {NAME: shape}, lambda t: t[:length])
            elif not name.startswith("copy/"):  # the anchors of P-tuning: PEFT has none
                yield Entry(name, {}, lambda value=value: value)
        yield from copies.entries(adapter)

    encoded = config.values["peft_type"] == "P_TUNING"
    method = PTuning(length=length, encoder="none") if encoded else PromptTuning(length=length, init="random")
    return Reading(method, Places(), entries, copies.paths, copies.checks)


def read_prefix(config: Config, view: ModelView, archive: Archive) -> Reading:
    """PREFIX_TUNING as a prefix without projection."""
    from inlay.methods.prefix_tuning import PrefixTuning

    length = config.whole("num_virtual_tokens", 1)
    copies = _sizes(config, view, archive)
    config.ignore("num_transformer_submodules")
    if _bidirectional(view) and not _encoder_decoder(view):
        config.wrong.append(
            "PEFT's prefix shifts the positions of an encoder's text by its length; prefix tuning as published does not"
        )
    elif not decoder_only(view):
        config.wrong.append(
            "PEFT's prefix enters only the decoder of this model, and its self- and cross-attention with the same "
            "keys; prefix tuning as published has no such form"
        )

    config.wrong += _windowed(view)

    def entries(adapter: Adapter) -> Iterator[Entry]:
        for name, value in adapter.tensors().items():
            if not name.startswith("copy/"):
                yield Entry(name, {NAME: tuple(value.shape)})
        yield from copies.entries(adapter)

    method = PrefixTuning(length=length, projection=None)
    return Reading(method, Places(), entries, copies.paths, copies.checks)


def read_multitask(config: Config, view: ModelView, archive: Archive) -> Reading:
    """One task of MULTITASK_PROMPT_TUNING."""
    from inlay.methods.multitask_prompt import MultitaskPromptTuning

    length, ranks = config.whole("num_virtual_tokens", 1), config.whole("num_ranks", 1)
    tasks, task = config.whole("num_tasks", 1), config.task or 0
    copies = _sizes(config, view, archive)
    config.ignore("prompt_tuning_init_state_dict_path", "prompt_tuning_init_task")
    if ranks != 1:
        config.wrong.append(f"num_ranks is {ranks}, expected 1: a task's share has rank one, as in the paper")
    if config.task is None and tasks > 1:
        config.wrong.append(f"the file holds {tasks} tasks: choose one, such as load(..., task=0)")
    if task >= tasks or task < 0:
        config.wrong.append(f"task is {task}, but the file has {tasks}, counted from 0")
    if config.whole("num_transformer_submodules", 2 if _encoder_decoder(view) else 1) != 1:
        config.wrong.append("PEFT's multitask prompt stands in the decoder too, unlike the published one")
    config.wrong += _misplaced(view)

    def entries(adapter: Adapter) -> Iterator[Entry]:
        width = next(t.shape[1] for n, t in adapter.tensors().items() if n.endswith("/vectors"))
        yield Entry("shared/prompt/vectors", {NAME: (length, width)})
        yield Entry("prompt/prompt/columns", {"prefix_task_cols": (tasks, length, 1)}, lambda t: t[task])
        yield Entry("prompt/prompt/rows", {"prefix_task_rows": (tasks, 1, width)}, lambda t: t[task])
        yield from copies.entries(adapter)

    return Reading(MultitaskPromptTuning(length=length, init="random"), Places(), entries, copies.paths, copies.checks)


def write_multitask(adapter: Adapter, view: ModelView) -> Writing:
    """The adapter's task, as the only one in its file."""
    wrong = _misplaced(view)
    if wrong:
        raise UnsupportedError(wrong[0])
    own = {n: t.detach() for n, t in adapter.tensors().items()}
    vectors = own["shared/prompt/vectors"]
    writing = prompt_file(
        adapter, view, "MULTITASK_PROMPT_TUNING", vectors,
        token_dim=vectors.shape[1], prompt_tuning_init="RANDOM", num_tasks=1, num_ranks=1,
    )  # fmt: skip
    writing.tensors["prefix_task_cols"] = own["prompt/prompt/columns"][None]
    writing.tensors["prefix_task_rows"] = own["prompt/prompt/rows"][None]
    return writing


def _sizes(config: Config, view: ModelView, archive: Archive) -> Any:
    config.ignore("token_dim", "num_attention_heads", "num_layers", *INITIALISATION)
    return read_copies(config, view, archive.shapes, PROMPT_PREFIX)


def write_prompt(adapter: Adapter, view: ModelView) -> Writing:
    """The final vectors of a token prompt."""
    prompt = the_prompt(adapter)
    assert isinstance(prompt, TokenPrompt)
    wrong = _misplaced(view)
    if wrong:
        raise UnsupportedError(wrong[0])
    with torch.no_grad():
        vectors = prompt.embeddings().detach()
    width = vectors.shape[1]
    if adapter.method.name == "p-tuning":  # PEFT builds an encoder of this size if training continues there
        return prompt_file(adapter, view, "P_TUNING", vectors, token_dim=width, encoder_hidden_size=width)
    return prompt_file(adapter, view, "PROMPT_TUNING", vectors, token_dim=width, prompt_tuning_init="RANDOM")


def write_prefix(adapter: Adapter, view: ModelView) -> Writing:
    """The computed keys and values of a prefix."""
    prompt = the_prompt(adapter)
    assert isinstance(prompt, KeyValuePrompt)
    places = view.attention_places()
    _check_prefix(adapter, view, places)
    with torch.no_grad():
        pairs = prompt.keys_values()
    # (layers, 2, key heads, length, head size) → (length, layers · 2 · key heads · head size)
    shaped = torch.stack([torch.stack(pairs[p.path][:2]) for p in places])
    flat = shaped.permute(3, 0, 1, 2, 4).reshape(prompt.length, -1)
    first = places[0]
    return prompt_file(
        adapter, view, "PREFIX_TUNING", flat,
        token_dim=first.heads * first.head_dim, num_attention_heads=first.heads, prefix_projection=False,
    )  # fmt: skip


def _check_prefix(adapter: Adapter, view: ModelView, places: list[AttentionPlace]) -> None:
    if not decoder_only(view):
        raise UnsupportedError(
            "PEFT puts a prefix only into a decoder-only model's attention as published; this prefix is also in an "
            "encoder, so PEFT's format cannot hold it"
        )
    if adapter.places.layers is not None:
        raise UnsupportedError("PEFT's prefix is in every layer, but this one was attached with `layers`")
    windowed = _windowed(view)
    if windowed:
        raise UnsupportedError(windowed[0])
    hidden = view.hidden_size
    if places[0].heads * places[0].head_dim != hidden:
        raise UnsupportedError(
            f"PEFT assumes the head size hidden size / heads = {hidden} / {places[0].heads}, but this model's is "
            f"{places[0].head_dim}, so its prefix cannot hold these keys"
        )


def prompt_file(adapter: Adapter, view: ModelView, peft_type: str, vectors: Tensor, **fields: Any) -> Writing:
    """The configuration and tensors of a prompt with these vectors."""
    saved, copied = write_copies(adapter, view, PROMPT_PREFIX)
    common = header(view, peft_type, saved)
    if common["task_type"] is None:
        heads = [p for p in view.modules if p in targets.HEADS["SEQ_CLS"]]
        raise UnsupportedError(
            "PEFT needs the task of a prompt, and then expects the model's head in the file"
            + (f"; attach with modules_to_save={heads}" if heads else f", but {type(view.model).__name__} has none")
        )
    places = view.attention_places()
    config = common | {
        "num_virtual_tokens": vectors.shape[0],
        "num_transformer_submodules": 1,
        "num_layers": len([p for p in places if p.stack == places[0].stack and not p.cross]),
        "num_attention_heads": places[0].heads,
        **fields,
    }
    return Writing(config, {NAME: vectors, **copied})


def the_prompt(adapter: Adapter) -> TokenPrompt | KeyValuePrompt:
    (piece,) = adapter.pieces
    assert isinstance(piece, PromptPiece)
    return piece.prompt


def _windowed(view: ModelView) -> list[str]:
    """Why PEFT's prefix differs at attention with a sliding window; empty if there is none."""
    usual = getattr(view.text_config, "sliding_window", None)
    windows = [getattr(place.module, "sliding_window", usual) for place in view.attention_places()]
    return [
        f"in PEFT a prefix is the oldest part of the text, which attention with a window of {window} tokens stops "
        "seeing; the published one is always seen"
        for window in windows
        if window
    ][:1]


def decoder_only(view: ModelView) -> bool:
    return not _encoder_decoder(view) and not _bidirectional(view)


def _encoder_decoder(view: ModelView) -> bool:
    return bool(getattr(view.config, "is_encoder_decoder", False))


def _bidirectional(view: ModelView) -> bool:
    """Whether the model reads its text in both directions."""
    try:
        return not all(getattr(p.module, "is_causal", True) for p in view.attention_places())
    except UnsupportedError:
        return True


def _misplaced(view: ModelView) -> list[str]:
    if _encoder_decoder(view) or not _bidirectional(view) or type(view.model).__name__.endswith(EACH_TOKEN):
        return []
    return [
        f"on an encoder ({type(view.model).__name__}) PEFT puts a prompt where the head reads the first token, "
        "and inlay hides it from the head: the two compute different things"
    ]
