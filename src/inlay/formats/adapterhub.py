"""AdapterHub's files: `adapter_config.json` with the architecture under ``config``, and the tensors by module.

    <layer>.attention.output.adapters.<name>.adapter_down.0.weight      BERT and its kin: after attention,
    <layer>.output.adapters.<name>.adapter_up.weight                    after the feed-forward
    <layer>.attention_adapters.adapters.<name>…, <layer>.output_adapters.adapters.<name>…     other models
    <linear>.loras.<name>.lora_A (r, in), lora_B (out, r)               LoRA; with ``scale``, lora_B alone: (IA)³
    …prefix_tunings.<name>.<place>.wte.weight, control_trans.0.…, .2.…  prefix tuning with its projection
    prompt_tuning.base_model.prompt_tuning.<name>.prompt_embedding.weight

Only what inlay computes in the same way is read. AdapterHub's sequential adapter (`SeqBnConfig`) reads the norm of its
input plus the residual: s + A(norm(s)) in front of that norm, or s + A(s) at the end of the layer if the norm comes
first. That is Pfeiffer at other places. Its parallel adapter reads the residual stream, and its prefix does not shift a
decoder's positions; where the method here computes something else, the adapter is refused and the message names the
difference. Prediction heads are files of their own there and are not read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from inlay.core.contracts.adapter import Adapter
from inlay.core.contracts.method import Method
from inlay.core.contracts.pieces import DeltaPiece
from inlay.core.errors import AdapterFileError, UserError, problems
from inlay.core.model.roles import layer_of
from inlay.core.model.select import Places
from inlay.core.model.view import ModelView
from inlay.formats.archive import Archive, open_archive
from inlay.formats.configuration import FILE, HUB_WEIGHTS, Config, read_config
from inlay.formats.exchange import CRASHES, Entry, Reading, restore

POST_NORM = (
    "bert",
    "roberta",
    "xlm-roberta",
    "electra",
    "distilbert",
)  # their feed-forward reads the residual itself
# What AdapterHub's forwards pass to the adapter after the feed-forward: the norm that follows the sum, or none.
NORM_BEHIND = ("bert", "roberta", "xlm-roberta", "electra", "deberta", "deberta-v2", "bert-generation", "distilbert",
               "bart", "plbart")  # fmt: skip
NO_NORM_BEHIND = ("gpt2", "gptj", "llama", "mistral", "mbart", "t5", "mt5", "whisper")
NORMS = {"output_adapters": ("output_layer_norm", "final_layer_norm"),
         "attention_adapters": ("sa_layer_norm", "self_attn_layer_norm")}  # fmt: skip
PROMPTED = ("llama", "mistral")  # models whose prompt enters after the embedding, so that its tokens have positions
TRAINING = ("dropout", "init_weights", "architecture", "stochastic_depth", "dtype", "leave_out", "is_parallel")
BOTTLENECK = {"down": "adapter_down.0.weight", "down_bias": "adapter_down.0.bias", "up": "adapter_up.weight",
              "up_bias": "adapter_up.bias"}  # fmt: skip
NONLINEAR = {"relu": "relu", "gelu": "gelu", "swish": "silu", "silu": "silu"}
NOT_HERE = "has no counterpart in inlay"


def read(model: nn.Module, folder: Path, *, name: str | None, trainable: bool, allow_pickle: bool) -> Adapter:
    """Attach an adapter from AdapterHub's files, strictly."""
    whole = read_config(folder)
    archive = open_archive(folder, *HUB_WEIGHTS, allow_pickle=allow_pickle)
    config = Config(dict(whole["config"]), folder / FILE)
    hub = Hub(config, ModelView(model), archive, str(whole.get("name", "")))
    width = whole.get("hidden_size")
    if isinstance(width, int) and width != hub.view.hidden_size:
        config.wrong.append(f"hidden_size is {width}, but this model's is {hub.view.hidden_size}: another base")
    architecture = config.get("architecture") or "bottleneck"
    if architecture not in READERS:
        raise AdapterFileError(
            f"{folder / FILE}: architecture {architecture!r} {NOT_HERE}; known: {', '.join(READERS)}"
        )
    config.ignore(*TRAINING)
    try:
        reading = READERS[str(architecture)](hub)
    except (UserError, *CRASHES) as error:
        found = [*config.wrong, f"{type(error).__name__}: {error}"]
        raise AdapterFileError(problems(f"{config.path} cannot be used on this model", found)) from error
    config.finish()
    if reading is None:
        raise AdapterFileError(problems(f"{archive.path} does not fit this model", config.wrong))
    chosen = name or re.sub(r"[^A-Za-z0-9_-]", "-", hub.name) or "default"
    return restore(model, reading, archive, name=chosen, trainable=trainable, wrong=config.wrong)


@dataclass(frozen=True)
class Hub:
    """What every reader gets."""

    config: Config
    view: ModelView
    archive: Archive
    name: str

    @property
    def kind(self) -> str:
        """The model's type, from its configuration."""
        return str(getattr(self.view.text_config, "model_type", ""))

    def found(self, pattern: str) -> dict[str, tuple[str, str]]:
        """Stored name → (place, part), for the names with this adapter's name in the middle."""
        regex = re.compile(rf"(.*)\.{pattern}\.{re.escape(self.name)}\.(.*)")
        hits = ((n, regex.fullmatch(n)) for n in self.archive.shapes)
        return {n: (hit[1], hit[2]) for n, hit in hits if hit}

    def settled(self, **expected: Any) -> None:
        """Note a problem for every key that is neither absent nor has this value."""
        for key, value in expected.items():
            there = self.config.get(key, value)
            if there != value:
                self.config.wrong.append(f"{key} is {there!r}, which {NOT_HERE}; expected {value!r}")


@dataclass(frozen=True)
class Bottlenecks:
    """What the configuration and the shapes say about a bottleneck adapter.

    Attributes:
        attention, feed_forward: whether it stands after this sublayer.
        size: inner size of the bottleneck.
        stored: stored name → (place, part).
    """

    hub: Hub
    attention: bool
    feed_forward: bool
    size: int
    nonlinearity: str
    scaling: float
    stored: Mapping[str, tuple[str, str]]

    @property
    def reduction(self) -> int | None:
        """The hidden size divided by the inner size; None if that is not a whole number."""
        hidden = self.hub.view.hidden_size
        return next((r for r in (hidden // self.size,) if r and hidden // r == self.size), None)

    @property
    def layers(self) -> list[int]:
        return sorted({at[1] for place, _ in self.stored.values() if (at := layer_of(place)) is not None})

    def reading(self, method: Method, places: Places, place_of: Callable[[str], str | None]) -> Reading:
        """The adapter with every tensor of every piece, read from the place in the file that belongs to its site."""

        def entries(adapter: Adapter) -> Iterator[Entry]:
            for piece in adapter.pieces:
                assert isinstance(piece, DeltaPiece)
                place = place_of(piece.site.path) or f"{piece.site.path}.(no adapter)"
                for name, value in piece.delta.state_dict().items():
                    theirs = f"{place}.adapters.{self.hub.name}.{BOTTLENECK[name.rpartition('.')[2]]}"
                    yield Entry(f"delta/{piece.key}/{name}", {theirs: tuple(value.shape)})

        return Reading(method, places, entries)


def _bottleneck(hub: Hub) -> Reading | None:
    """DoubleSeqBn (Houlsby), SeqBn (Pfeiffer) before or after the layer's norm, ParBn."""
    config = hub.config
    hub.settled(
        cross_adapter=False, inv_adapter=None, ln_after=False, ln_before=False, phm_layer=False, use_gating=False,
        original_ln_after=True,
    )  # fmt: skip
    config.ignore("adapter_residual_before_ln")  # has an effect only together with options that are refused here
    config.ignore(*(k for k in config.values if "phm" in k or k.startswith(("factorized", "hypercomplex", "inv_"))))
    parallel, normed = bool(config.get("is_parallel", False)), bool(config.get("original_ln_before", False))
    found = _sizes(hub, parallel)
    if not normed or parallel:  # a parallel adapter always reads the residual stream
        config.ignore("residual_before_ln")
    if found is None:
        return None
    return _parallel(found) if parallel else _behind_residual(found) if normed else _serial(found)


def _sizes(hub: Hub, parallel: bool) -> Bottlenecks | None:
    config = hub.config
    nonlinearity = NONLINEAR.get(str(config.get("non_linearity", "relu")).lower())
    if nonlinearity is None:
        config.wrong.append(f"non_linearity is {config.get('non_linearity')!r}, which {NOT_HERE}")
    scaling = config.get("scaling", 1.0)
    if isinstance(scaling, str) or (not parallel and scaling != 1.0):
        config.wrong.append(f"scaling is {scaling!r}, which {NOT_HERE} for this adapter")
        scaling = 1.0
    attention, feed_forward = bool(config.get("mh_adapter", False)), bool(config.get("output_adapter", True))
    stored = hub.found("adapters")
    sizes = {hub.archive.shapes[n][0] for n, (_, part) in stored.items() if part == BOTTLENECK["down"]}
    config.get("reduction_factor")
    if len(sizes) != 1:
        config.wrong.append(f"the adapters' inner sizes are {sorted(sizes)}, expected one size in every layer")
        return None
    return Bottlenecks(hub, attention, feed_forward, sizes.pop(), nonlinearity or "relu", float(scaling), stored)


def _parallel(found: Bottlenecks) -> Reading:
    from inlay.methods.parallel import ParallelAdapter

    if found.attention or found.hub.kind not in POST_NORM:
        found.hub.config.wrong.append(
            f"a parallel adapter reads the residual stream, which is the feed-forward's input only on {POST_NORM}; "
            f"on a {found.hub.kind!r}, or beside attention, it has no exact counterpart"
        )
    method = ParallelAdapter(bottleneck=found.size, scale=found.scaling, nonlinearity=found.nonlinearity)
    places = {layer_of(p): p for p, _ in found.stored.values()}
    return found.reading(method, Places.of(None, found.layers), lambda path: places.get(layer_of(path)))


def _serial(found: Bottlenecks) -> Reading:
    """After a sublayer, before its residual: h ← h + A(h)."""
    from inlay.methods.houlsby import Houlsby
    from inlay.methods.pfeiffer import Pfeiffer

    view = found.hub.view
    method: Method = Houlsby(bottleneck=found.size, nonlinearity=found.nonlinearity)
    if not found.attention and found.reduction is not None:
        method = Pfeiffer(reduction=found.reduction, nonlinearity=found.nonlinearity)
    words = [
        w for w, on in (("attention_sublayer", found.attention), ("mlp_sublayer", found.feed_forward)) if on
    ]  # fmt: skip
    attention_paths = {s.path for s in view.by_role("attention_sublayer")}
    if found.attention and len(attention_paths) > len({layer_of(p) for p in attention_paths}):
        found.hub.config.wrong.append(
            "this model's layers have two attentions; the file adapts only the first, but inlay's method adapts both"
        )
    places = {(layer_of(p), _behind_attention(p)): p for p, _ in found.stored.values()}
    return found.reading(
        method, Places.of(words, found.layers), lambda path: places.get((layer_of(path), path in attention_paths))
    )


def _behind_residual(found: Bottlenecks) -> Reading | None:
    """After the residual: s ← s + A(norm(s)) in front of the norm that the model has there, else s ← s + A(s)."""
    from inlay.methods.pfeiffer import Pfeiffer

    hub, config = found.hub, found.hub.config
    if config.get("residual_before_ln", True) is not True:
        config.wrong.append(
            f"residual_before_ln is {config.get('residual_before_ln')!r}: the adapter's residual would start after "
            "the layer's, so that its input is added twice; no method of inlay computes that"
        )
    if found.reduction is None:
        config.wrong.append(f"the inner size {found.size} does not divide the hidden size")
        return None
    method = Pfeiffer(reduction=found.reduction, nonlinearity=found.nonlinearity)
    stored = list(dict.fromkeys(place for place, _ in found.stored.values()))
    if hub.kind in NORM_BEHIND:
        norms = {_norm_behind(hub.view, place): place for place in stored}
        lost = norms.pop(None, None)
        if lost is not None:
            config.wrong.append(f"{lost} is adapted in the file, but this model has no layer norm after it")
            return None
        return found.reading(method, Places.of([n for n in norms if n], None), norms.get)
    if hub.kind not in NO_NORM_BEHIND or found.attention:
        config.wrong.append(
            f"original_ln_before is true: what the adapter reads depends on the model, and for a {hub.kind!r}"
            f"{' behind attention' if found.attention else ''} inlay knows no exact counterpart; known are "
            f"{', '.join(NORM_BEHIND)}, and behind the feed-forward alone {', '.join(NO_NORM_BEHIND)}"
        )
        return None
    blocks = {layer_of(place): place for place in stored}
    return found.reading(
        method, Places.of("block_output", found.layers), lambda path: blocks.get(layer_of(path))
    )  # fmt: skip


def _norm_behind(view: ModelView, place: str) -> str | None:
    """The layer norm that AdapterHub's forward gives to the adapter at `place`."""
    parent, _, last = place.rpartition(".")
    named = [f"{parent}.{n}" for n in NORMS.get(last, ())] or [f"{place}.LayerNorm"]
    return next((path for path in named if path in view.layers), None)


def _behind_attention(place: str) -> bool:
    last = place.split(".")[-2:]
    return last[-1] == "attention_adapters" or last == ["attention", "output"]


def _lora(hub: Hub) -> Reading | None:
    from inlay.methods.ia3 import IA3
    from inlay.methods.lora import LoRA

    config = hub.config
    hub.settled(use_gating=False, vera_d=None, vera_b=None)
    config.ignore("attn_matrices", "selfattn_lora", "intermediate_lora", "output_lora")
    rank, alpha = config.whole("r", 8), config.number("alpha", 8)
    mode = config.get("composition_mode", "add")
    if mode == "scale" and alpha != 1:
        config.wrong.append(f"alpha is {alpha} for rescaling vectors, expected 1")
    stored = hub.found("loras")
    paths = list(dict.fromkeys(p for p, _ in stored.values()))
    absent = [p for p in paths if p not in hub.view.layers]
    config.wrong += [f"{p} is adapted in the file, but this model has no such layer" for p in absent]
    if not paths or absent or mode not in ("add", "scale"):
        config.wrong += [] if mode in ("add", "scale") else [f"composition_mode is {mode!r}, which {NOT_HERE}"]
        return None
    scaled = mode == "scale"

    def entries(adapter: Adapter) -> Iterator[Entry]:
        for piece in adapter.pieces:
            assert isinstance(piece, DeltaPiece)
            for name, value in piece.delta.state_dict().items():
                theirs = f"{piece.site.path}.loras.{hub.name}.{'lora_B' if name != 'a' else 'lora_A'}"
                shape = (*value.shape, 1) if scaled else tuple(value.shape)
                yield Entry(f"delta/{piece.key}/{name}", {theirs: shape}, lambda t: t.flatten() if scaled else t)

    method: Method = IA3(entering=()) if scaled else LoRA(rank=rank, alpha=alpha)
    return Reading(method, Places.of(paths, None), entries)


def _prefix(hub: Hub) -> Reading | None:
    from inlay.methods.prefix_tuning import PrefixTuning

    config = hub.config
    hub.settled(use_gating=False, non_linearity="tanh", encoder_prefix=True)
    config.ignore("cross_prefix", "shared_gating")
    length, flat = config.whole("prefix_length", 30), bool(config.get("flat", False))
    inner = config.whole("bottleneck_size", 512)
    causal = any(getattr(p.module, "is_causal", True) for p in hub.view.attention_places())
    if causal or getattr(hub.view.config, "is_encoder_decoder", False):
        config.wrong.append(
            "AdapterHub's prefix does not shift the positions of a decoder's text, but the published one shifts them "
            "by its length: only an encoder's prefix has an exact counterpart"
        )
    stored = hub.found("prefix_tunings")
    heads = {f"{p}.prefix_tunings.{hub.name}.{part.split('.')[0]}" for p, part in stored.values()}
    if len(heads) != 1:
        config.wrong.append(f"expected the prefix of one stack, found {len(heads)}")
        return None
    head = heads.pop()
    names = {"table": "wte.weight", "inner.weight": "control_trans.0.weight", "inner.bias": "control_trans.0.bias",
             "outer.weight": "control_trans.2.weight", "outer.bias": "control_trans.2.bias"}  # fmt: skip

    def entries(adapter: Adapter) -> Iterator[Entry]:
        for name, value in adapter.tensors().items():
            own, shape = name.split("/")[-1].split(".", 2)[-1], tuple(value.shape)
            if flat:
                yield Entry(name, {f"{head}.control_trans": (value.numel(),)}, lambda t, shape=shape: t.view(shape))
            else:
                yield Entry(name, {f"{head}.{names[own]}": shape})

    return Reading(PrefixTuning(length=length, projection=None if flat else inner), Places(), entries)


def _prompt(hub: Hub) -> Reading | None:
    from inlay.methods.prompt_tuning import PromptTuning

    config = hub.config
    hub.settled(combine="prefix")
    config.ignore("prompt_init", "prompt_init_text", "random_uniform_scale", "exclude_cls_token")
    length = config.whole("prompt_length", 10)
    if hub.kind not in PROMPTED:
        config.wrong.append(
            f"on a {hub.kind!r} AdapterHub's prompt has no positions, or stands where the head reads its token; it "
            f"has an exact counterpart on {', '.join(PROMPTED)} only"
        )
    ending = f".{hub.name}.prompt_embedding.weight"
    stored = [n for n in hub.archive.shapes if n.endswith(ending)]
    if len(stored) != 1:
        config.wrong.append(f"expected one prompt_embedding.weight of {hub.name!r}, found {len(stored)}")
        return None

    def entries(adapter: Adapter) -> Iterator[Entry]:
        for name, value in adapter.tensors().items():
            yield Entry(name, {stored[0]: tuple(value.shape)})

    return Reading(PromptTuning(length=length, init="random"), Places(), entries)


READERS: Mapping[str, Callable[[Hub], Reading | None]] = {
    "bottleneck": _bottleneck,
    "lora": _lora,
    "prefix_tuning": _prefix,
    "prompt_tuning": _prompt,
}
