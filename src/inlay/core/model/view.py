"""A read-only view of a model's places, for a method to look at before anything is changed."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from inlay.core.errors import UnsupportedError
from inlay.core.model import roles
from inlay.core.model.fused_part import Part
from inlay.core.model.layer import LATE, LayerShape, shape_of
from inlay.core.model.site import Site


@dataclass(frozen=True)
class AttentionPlace:
    """One attention module that key/value pairs can enter.

    Attributes:
        stack: path prefix of the layer stack, e.g. ``decoder.block``.
        layer: number within the stack.
        cross: whether keys and values come from another sequence.
        heads, key_heads, head_dim: as the attention function sees them (grouped keys unrepeated).
    """

    path: str
    module: nn.Module
    stack: str
    layer: int
    cross: bool
    heads: int
    key_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Stack:
    """The numbered layers that hidden states pass through.

    Attributes:
        blocks: their paths, in order.
        end: the norm behind the last block; the last block's output if there is no norm.
    """

    blocks: tuple[str, ...]
    end: Site


class ModelView:
    """Sites, attention places and parameters of a model, found by structure.

    Modules that an adapter added are left out, whatever their names: they are recognised by their place in the tree
    (below a host's `inlay` child), so a second adapter sees the bare base.
    """

    def __init__(self, model: nn.Module) -> None:
        for register in LATE:
            register()
        self.model = model
        self.config: Any = getattr(model, "config", None)

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """Every module of the base by path, the root under the empty path; a shared one under its first path."""
        return {path: module for path, module in self._reached if self.names[path] == path}

    @cached_property
    def names(self) -> dict[str, str]:
        """Every path of a module → its path in `modules`."""
        first: dict[int, str] = {}
        return {path: first.setdefault(id(module), path) for path, module in self._reached}

    @cached_property
    def _reached(self) -> list[tuple[str, nn.Module]]:
        found: list[tuple[str, nn.Module]] = []
        stack: list[tuple[str, nn.Module]] = [("", self.model)]
        while stack:
            path, module = stack.pop()
            found.append((path, module))
            children = [(n, c) for n, c in module._modules.items() if c is not None]
            for name, child in reversed(children):
                if not getattr(type(child), "inlay_storage", False):
                    stack.append((f"{path}.{name}" if path else name, child))
        return found

    @cached_property
    def layers(self) -> dict[str, Site]:
        """Whole layers that a delta could adapt, by path, in the order of the model."""
        shapes = ((path, module, shape_of(module)) for path, module in self.modules.items())
        return {path: _site(path, module, shape) for path, module, shape in shapes if shape is not None}

    @cached_property
    def output_head(self) -> nn.Module | None:
        """The layer that turns hidden states into logits over the vocabulary, if the model names one."""
        get = getattr(self.model, "get_output_embeddings", None)
        return get() if get is not None else None

    @cached_property
    def input_embedding(self) -> nn.Module | None:
        get = getattr(self.model, "get_input_embeddings", None)
        try:
            return get() if get is not None else None
        except (NotImplementedError, AttributeError):
            return None

    def in_blocks(self, path: str) -> bool:
        """Whether `path` lies in a numbered layer: not an embedding, a pooler or a head."""
        return roles.layer_of(path) is not None and self.modules[path] is not self.output_head

    def by_role(self, role: str) -> list[Site]:
        """The sites of a role. ``query``, ``key`` and ``value`` resolve to parts of a fused matrix;
        ``attention_sublayer`` and ``mlp_sublayer`` to the sublayer's output before the residual is added;
        ``mlp_block`` to the whole feed-forward, from its input to its output; ``block_output`` to the residual
        stream behind each numbered layer."""
        if role in ("attention_sublayer", "mlp_sublayer"):
            return [self._sublayer(s) for s in self._feeds(role)]
        if role == "mlp_block":
            return self._blocks()
        if role == "block_output":
            return self._block_outputs()
        found = list(self._in_role(role))
        if role in ("query", "key", "value"):
            found += [self._part(s, role) for s in self._in_role("qkv")]
            found.sort(key=lambda s: list(self.modules).index(s.path))
        return found

    def stack(self) -> Stack:
        """The layers between input and output head; in an encoder–decoder, those of the decoder.

        Raises:
            UnsupportedError: the model has no numbered layers, several stacks of them, or uses one several times.
        """
        within = ""
        if getattr(self.config, "is_encoder_decoder", False):
            decoder: Any = self.model.get_decoder()  # type: ignore[operator]
            within = next(p for p, m in self.modules.items() if m is decoder)
        roots = {s.path for s in self.layers.values() if s.role in (*roles.ATTENTION, *roles.MLP)}
        found = {at[0]: None for p in roots if p.startswith(within) and (at := roles.layer_of(p)) and at[0]}
        if len(found) != 1:
            raise UnsupportedError(
                f"{type(self.model).__name__} has {len(found)} stacks of numbered layers ({', '.join(found)}), "
                "expected one that leads from the input to the output; choose another method for this model"
            )
        path = next(iter(found))
        blocks = tuple(p for p in self.modules if roles.layer_of(p) is not None and p.rpartition(".")[0] == path)
        said = _first(self.text_config, ("num_decoder_layers", "decoder_layers", "num_hidden_layers", "n_layer"))
        if said is not None and said != len(blocks):
            raise UnsupportedError(
                f"{type(self.model).__name__} passes {said} layers but has {len(blocks)} at {path}: they are used more "
                "than once, so what enters a layer is not one tensor; choose another method for this model"
            )
        beside = path.rpartition(".")[0]
        norms = [
            s for p, s in self.layers.items()
            if s.kind == "norm" and p.rpartition(".")[0] == beside and roles.FINAL_NORM.fullmatch(p.rpartition(".")[2])
        ]  # fmt: skip
        return Stack(blocks, norms[0] if len(norms) == 1 else self._output(blocks[-1]))

    def _output(self, path: str) -> Site:
        """A site at the output of a module that returns hidden states."""
        held = next(self.modules[path].parameters())
        return _site(
            path,
            self.modules[path],
            LayerShape("output", self.hidden_size, self.hidden_size, False, held.dtype, held.device),
        )

    def _block_outputs(self) -> list[Site]:
        inside = (s.path for s in self.layers.values() if s.role in (*roles.ATTENTION, *roles.MLP))
        paths = dict.fromkeys(f"{at[0]}.{at[1]}" for path in inside if (at := roles.layer_of(path)) and at[0])
        return [self._output(path) for path in paths]

    def _in_role(self, role: str) -> Iterator[Site]:
        for site in self.layers.values():
            if site.role == role and site.kind == "linear":
                yield site

    def _feeds(self, role: str) -> list[Site]:
        if role == "attention_sublayer":
            return list(self._in_role("attention_output"))
        return list(self._in_role("down")) + self._experts()

    def _experts(self) -> list[Site]:
        """Feed-forwards whose experts are stored as one tensor: only the whole block can be a site."""
        found = []
        for path, module in self.modules.items():
            if roles.role_of(path) != "experts" or not self.in_blocks(path):
                continue
            inside = [s for p, s in self.layers.items() if p.startswith(path + ".") and s.role == "down"]
            if not inside and next(module.parameters(), None) is not None:
                found.append(self._output(path))
        return found

    def _sublayer(self, site: Site) -> Site:
        """The site whose output is the sublayer's: the dropout behind the projection, or the projection."""
        parent = site.path.rpartition(".")[0]
        names = self.modules[parent]._modules if parent else {}
        behind = [f"{parent}.{n}" for n in names if roles.SUBLAYER_DROPOUT.fullmatch(f"{parent}.{n}")]
        path = behind[0] if behind else site.path
        return replace(
            site, path=path, module=self.modules[path], kind="output", in_features=site.out_features, bias=False
        )

    def _blocks(self) -> list[Site]:
        """Each feed-forward, from the input of its first matrix to the output of its last."""
        entries: dict[tuple[str, int] | None, Site] = {}
        for site in self.layers.values():
            if site.role in ("up", "gate") and site.kind == "linear":
                entries.setdefault(roles.layer_of(site.path), site)
        found = []
        for down in self._in_role("down"):
            entry = entries.get(roles.layer_of(down.path))
            if entry is not None:
                exit_ = self._sublayer(down)
                found.append(replace(exit_, source=entry.path, in_features=entry.in_features))
        return found + self._experts()

    def _part(self, site: Site, name: str) -> Site:
        """The query, key or value rows of a fused matrix."""
        heads, key_heads, head_dim = self._head_shape(site)
        index = ("query", "key", "value").index(name)
        if roles.FUSED[site.path.rpartition(".")[2]].interleaved:
            if site.out_features != 3 * heads * head_dim:
                raise UnsupportedError(
                    f"{site.path} has {site.out_features} outputs, which is not 3 × {heads} heads × {head_dim}: its "
                    f"{name} rows cannot be told apart; name the whole layer in `where`"
                )
            part = Part(name, heads, index * head_dim, (index + 1) * head_dim)
        else:
            edges = [0, heads * head_dim, (heads + key_heads) * head_dim, (heads + 2 * key_heads) * head_dim]
            if edges[-1] != site.out_features:
                raise UnsupportedError(
                    f"{site.path} has {site.out_features} outputs, which is not {heads} + 2 × {key_heads} heads × "
                    f"{head_dim}: its {name} rows cannot be told apart; name the whole layer in `where`"
                )
            part = Part(name, 1, edges[index], edges[index + 1])
        return replace(site, out_features=part.features, part=part, role=name)

    @property
    def hidden_size(self) -> int:
        config = self.text_config
        for name in ("hidden_size", "d_model", "n_embd", "dim"):
            value = getattr(config, name, None)
            if isinstance(value, int):
                return value
        raise UnsupportedError(f"the configuration of {type(self.model).__name__} names no hidden size")

    @property
    def text_config(self) -> Any:
        get = getattr(self.config, "get_text_config", None)
        return get() if get is not None else self.config

    def _head_shape(self, site: Site) -> tuple[int, int, int]:
        """(heads, key heads, head size) of the attention that the value or fused layer `site` belongs to."""
        module = self.modules[site.path.rpartition(".")[0]]
        config = getattr(module, "config", None) or self.text_config
        heads = _first(module, ("num_heads", "n_heads", "num_attention_heads")) or _first(
            config, ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")
        )
        if heads is None:
            raise UnsupportedError(f"the number of heads of {site.path} is not known")
        head_dim = _first(module, ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size"))
        head_dim = head_dim or _first(config, ("head_dim",)) or self.hidden_size // heads
        if site.role == "qkv":
            key_heads = _first(config, ("num_key_value_heads",)) or heads
        else:
            key_heads = site.out_features // head_dim
        return heads, key_heads, head_dim

    def attention_places(self) -> list[AttentionPlace]:
        """Every attention module, in the order of the model.

        Raises:
            UnsupportedError: the model computes attention in code of its own, which key/value pairs cannot enter.
        """
        places = []
        for site in self.layers.values():
            if site.role not in ("value", "qkv") or site.kind != "linear":
                continue
            path = site.path.rpartition(".")[0]
            stack = roles.layer_of(path)
            if stack is None:
                continue
            heads, key_heads, head_dim = self._head_shape(site)
            places.append(
                AttentionPlace(
                    path,
                    self.modules[path],
                    stack[0],
                    stack[1],
                    bool(roles.CROSS_ATTENTION.match(path)),
                    heads,
                    key_heads,
                    head_dim,
                    site.dtype,
                    site.device,
                )
            )
        closed = sorted({type(p.module).__name__ for p in places if not calls_interface(p.module)})
        if closed or not places:
            what = ", ".join(closed) or type(self.model).__name__
            raise UnsupportedError(
                f"{what} computes attention in its own code, not through transformers' attention interface, so "
                "key/value pairs cannot enter it exactly; on this model use a method that adapts layers (lora, ia3, …)"
            )
        return places


def calls_interface(module: nn.Module) -> bool:
    """Whether an attention module looks its function up in transformers' registry."""
    base: Any = next(c for c in type(module).__mro__ if not getattr(c, "inlay_adapted", False))
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(base.forward).__code__.co_names


def _first(owner: Any, names: tuple[str, ...]) -> int | None:
    return next((v for n in names if isinstance(v := getattr(owner, n, None), int)), None)


def _site(path: str, module: nn.Module, shape: LayerShape) -> Site:
    return Site(
        path, module, shape.kind, shape.in_features, shape.out_features, shape.bias, shape.dtype, shape.device,
        role=roles.role_of(path),
    )  # fmt: skip
