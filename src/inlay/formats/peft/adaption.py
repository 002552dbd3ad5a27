"""LLaMA-Adapter in PEFT's files.

    <attention>.adaption_prompt (1, length, hidden)    <attention>.adaption_gate (1)

PEFT has one gate for all heads of a layer and no tanh around it, so gates that differ from head to head have no
counterpart there. On GPT-2 PEFT adds the prompts' attention after the output projection instead of before it, and if
that projection has a bias it adds the bias twice. Neither is what was published, and both are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from inlay.core.contracts.adapter import Adapter
from inlay.core.errors import UnsupportedError
from inlay.core.model.roles import layer_of
from inlay.core.model.select import Places
from inlay.core.model.view import ModelView
from inlay.formats.archive import Archive
from inlay.formats.configuration import Config
from inlay.formats.exchange import Entry, Reading, Writing
from inlay.formats.peft.common import PREFIX, header
from inlay.formats.peft.copies import read_copies, write_copies
from inlay.formats.peft.prompts import the_prompt

KNOWN = ("llama", "mistral")  # model types on which PEFT computes what was published


def read(config: Config, view: ModelView, archive: Archive) -> Reading:
    from inlay.methods.llama_adapter import LLaMAAdapter

    copies = read_copies(config, view, archive.shapes, PREFIX)
    length, depth = config.whole("adapter_len", 10), config.whole("adapter_layers", 1)
    config.ignore("target_modules")
    config.wrong += _unknown(view)
    own = [p for p in _attention(view) if p in _top(view, depth)]
    names = {p.replace(".", "_"): p for p in own}

    def entries(adapter: Adapter) -> Iterator[Entry]:
        for name, value in adapter.tensors().items():
            if name.startswith("copy/"):
                continue
            kind, _, place = name.removeprefix("prompt/prompt/").partition(".")
            path, shape = f"{PREFIX}{names[place]}", tuple(value.shape)
            if kind == "prompts":
                yield Entry(name, {f"{path}.adaption_prompt": (1, *shape)}, lambda t: t[0])
            else:
                yield Entry(name, {f"{path}.adaption_gate": (1,)}, lambda t, shape=shape: t.expand(shape))
        yield from copies.entries(adapter)

    method = LLaMAAdapter(length=length, depth=depth, gate="raw")
    return Reading(method, Places(), entries, copies.paths, copies.checks)


def write(adapter: Adapter, view: ModelView) -> Writing:
    unknown = _unknown(view)
    if unknown:
        raise UnsupportedError(unknown[0])
    prompt: Any = the_prompt(adapter)
    tensors: dict[str, Tensor] = {}
    for name, place in prompt.places.items():
        gates = prompt.gates[name].detach()
        gates = torch.tanh(gates) if prompt.tanh else gates
        path = place.attention.path
        if not torch.equal(gates, gates[:1].expand_as(gates)):
            raise UnsupportedError(
                f"{path}: PEFT has one gate for all heads of a layer, but these gates differ from head to head, as in "
                "the paper; PEFT's format cannot hold them"
            )
        tensors[f"{PREFIX}{path}.adaption_prompt"] = prompt.prompts[name].detach()[None]
        tensors[f"{PREFIX}{path}.adaption_gate"] = gates[:1]
    paths = [p.attention.path for p in prompt.places.values()]
    if set(paths) != {p for p in _attention(view) if p in _top(view, len(paths))}:
        raise UnsupportedError(
            "PEFT has adaption prompts in the top layers only, but these were attached with `layers`"
        )
    saved, copied = write_copies(adapter, view, PREFIX)
    config = header(view, "ADAPTION_PROMPT", saved) | {
        "adapter_len": prompt.length,
        "adapter_layers": len(paths),
        "target_modules": paths[0].rpartition(".")[2],
    }
    config.pop("modules_to_save")
    if saved:
        raise UnsupportedError("PEFT's adaption prompts cannot be saved together with whole modules (modules_to_save)")
    return Writing(config, tensors | copied)


def _attention(view: ModelView) -> list[str]:
    return [p.path for p in view.attention_places() if not p.cross]


def _top(view: ModelView, depth: int) -> list[str]:
    """The attention modules of the last `depth` layers."""
    paths = [p for p in _attention(view) if layer_of(p) is not None]
    return paths[len(paths) - depth :] if depth <= len(paths) else []


def _unknown(view: ModelView) -> list[str]:
    kind = str(getattr(view.text_config, "model_type", ""))
    if kind in KNOWN:
        biased = [s.path for s in view.by_role("attention_output") if s.bias]
        return [f"{p} has a bias, which PEFT's adaption prompts add a second time" for p in biased[:1]]
    return [
        f"PEFT computes adaption prompts as published on {', '.join(KNOWN)} models only, and this is a {kind!r}: "
        "the adapter has no exact counterpart"
    ]
