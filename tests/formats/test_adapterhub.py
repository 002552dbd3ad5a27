"""AdapterHub's files, written here under their documented names, against forwards made by hand.

AdapterHub's library needs transformers 4 and cannot be installed beside 5, so these files are not its own: the names
and the meaning of the configuration are those that its documentation and source give.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import inlay
from inlay.core.errors import AdapterFileError
from inlay.testing.models import ZOO
from tests.formats.peft_hand import logits

SIZE, INNER = 32, 4
BOTTLENECK = {
    "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True,
    "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert",
    "inv_adapter": None, "inv_adapter_reduction_factor": None, "is_parallel": False, "learn_phm": True,
    "leave_out": [], "ln_after": False, "ln_before": False, "mh_adapter": True, "non_linearity": "swish",
    "original_ln_after": True, "original_ln_before": False, "output_adapter": True, "phm_bias": True,
    "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False, "phm_rank": 1,
    "reduction_factor": 8, "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False,
    "shared_phm_rule": True, "stochastic_depth": 0.0, "use_gating": False,
}  # fmt: skip
LORA = {
    "architecture": "lora", "alpha": 6, "attn_matrices": ["q", "v"], "composition_mode": "add", "dropout": 0.0,
    "init_weights": "lora", "intermediate_lora": False, "leave_out": [], "output_lora": False, "r": 3,
    "selfattn_lora": True, "use_gating": False, "vera_d": None, "vera_b": None, "dtype": None,
}  # fmt: skip
PREFIX = {
    "architecture": "prefix_tuning", "bottleneck_size": 6, "cross_prefix": True, "dropout": 0.0,
    "encoder_prefix": True, "flat": False, "leave_out": [], "non_linearity": "tanh", "prefix_length": 3,
    "shared_gating": True, "use_gating": False,
}  # fmt: skip


def written(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], **more: Any) -> dict[str, Tensor]:
    """A folder as AdapterHub writes it; returns the tensors."""
    generator = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        "config": config, "config_id": "9076f36a74755ac4", "hidden_size": SIZE, "model_class": "Any", "model_name": "",
        "model_type": "any", "name": "mine", "version": "adapters.1.3.0", **more,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    save_file(tensors, folder / "adapter.safetensors")
    return tensors


def bottleneck(place: str) -> dict[str, tuple[int, ...]]:
    at = f"{place}.adapters.mine"
    return {
        f"{at}.adapter_down.0.weight": (INNER, SIZE), f"{at}.adapter_down.0.bias": (INNER,),
        f"{at}.adapter_up.weight": (SIZE, INNER), f"{at}.adapter_up.bias": (SIZE,),
    }  # fmt: skip


def inner(tensors: dict[str, Tensor], place: str, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    at = f"{place}.adapters.mine"
    tensors = {name: value.to(x.dtype) for name, value in tensors.items()}
    low = function(F.linear(x, tensors[f"{at}.adapter_down.0.weight"], tensors[f"{at}.adapter_down.0.bias"]))
    return F.linear(low, tensors[f"{at}.adapter_up.weight"], tensors[f"{at}.adapter_up.bias"])


def loaded(name: str, folder: Path) -> Tensor:
    model = ZOO[name].build()
    assert inlay.load(model, folder).name == "mine"
    return logits(name, model)


def close(actual: Tensor, expected: Tensor, name: str) -> None:
    assert (actual - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    assert (logits(name, ZOO[name].build()) - expected).abs().max() > 0.05


def serial(
    name: str, places: dict[str, str], tensors: dict[str, Tensor], function: Callable[[Tensor], Tensor]
) -> Tensor:
    """The bare model with h + f(h) behind the modules of `places` (module → place in the file)."""
    model = ZOO[name].build()
    for path, place in places.items():
        model.get_submodule(path).register_forward_hook(
            lambda _, __, y, place=place: y + inner(tensors, place, y, function)
        )
    return logits(name, model)


def test_double_sequential_on_bert(tmp_path: Path) -> None:
    places = {f"bert.encoder.layer.{i}.{p}.dense": f"bert.encoder.layer.{i}.{p}" for i in (0, 1)
              for p in ("attention.output", "output")}  # fmt: skip
    shapes = {n: s for place in places.values() for n, s in bottleneck(place).items()}
    tensors = written(tmp_path, BOTTLENECK, shapes)
    close(loaded("bert", tmp_path), serial("bert", places, tensors, F.silu), "bert")


def test_double_sequential_on_llama(tmp_path: Path) -> None:
    places = {}
    for i in (0, 1):
        places[f"model.layers.{i}.self_attn.o_proj"] = f"model.layers.{i}.attention_adapters"
        places[f"model.layers.{i}.mlp.down_proj"] = f"model.layers.{i}.output_adapters"
    shapes = {n: s for place in places.values() for n, s in bottleneck(place).items()}
    tensors = written(tmp_path, BOTTLENECK | {"non_linearity": "relu"}, shapes)
    close(loaded("llama", tmp_path), serial("llama", places, tensors, F.relu), "llama")


SEQ_BN = BOTTLENECK | {"original_ln_before": True, "mh_adapter": False, "non_linearity": "relu", "reduction_factor": 8}


class Theirs(torch.nn.Module):
    """AdapterHub's `BottleneckLayer` around one adapter, in a sublayer's last step: `pre_forward`, `forward` and
    `post_forward` of its `Adapter` with ``original_ln_before`` and ``residual_before_ln``."""

    def __init__(self, tensors: dict[str, Tensor], place: str) -> None:
        super().__init__()
        self.tensors, self.place = tensors, place

    def forward(self, hidden_states: Tensor, input_tensor: Tensor, layer_norm: torch.nn.Module | None) -> Tensor:
        residual = hidden_states
        hidden_states = hidden_states + input_tensor
        if layer_norm is not None:
            hidden_states = layer_norm(hidden_states)
        output = inner(self.tensors, self.place, hidden_states, F.relu) + residual
        return output + input_tensor if layer_norm is None else layer_norm(output + input_tensor)


def their_output(own: Any, adapter: Theirs, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
    """`BertOutputWithAdapters.forward`, and `BertSelfOutput`'s."""
    return adapter(own.dense(hidden_states), input_tensor, own.LayerNorm)


def test_sequential_on_bert(tmp_path: Path) -> None:
    """The default: `BertOutput.forward` with the adapter between its dropout and its norm."""
    places = [f"bert.encoder.layer.{i}.output" for i in (0, 1)]
    tensors = written(tmp_path, SEQ_BN, {n: s for place in places for n, s in bottleneck(place).items()})
    model: Any = ZOO["bert"].build()
    for place in places:
        output = model.get_submodule(place)
        output.forward = partial(their_output, output, Theirs(tensors, place))
    close(loaded("bert", tmp_path), logits("bert", model), "bert")


def test_sequential_behind_attention_too(tmp_path: Path) -> None:
    places = [f"bert.encoder.layer.{i}.{p}" for i in (0, 1) for p in ("attention.output", "output")]
    config = SEQ_BN | {"mh_adapter": True}
    tensors = written(tmp_path, config, {n: s for place in places for n, s in bottleneck(place).items()})
    model: Any = ZOO["bert"].build()
    for place in places:
        output = model.get_submodule(place)
        output.forward = partial(their_output, output, Theirs(tensors, place))
    close(loaded("bert", tmp_path), logits("bert", model), "bert")


def behind_feed_forwards(model: Any, tensors: dict[str, Tensor], steps: dict[str, tuple[str, str, str]]) -> Any:
    """A model whose norm stands behind the sum: `steps` is place → (first matrix, last matrix, norm).

    The sum is what enters the norm, so what left the last matrix is the sum less what entered the first.
    """
    entering: dict[str, Tensor] = {}
    for place, (first, _, norm) in steps.items():
        model.get_submodule(first).register_forward_pre_hook(lambda _, args, p=place: entering.update({p: args[0]}))
        module, adapter = model.get_submodule(norm), Theirs(tensors, place)
        own = module.forward
        module.forward = lambda s, p=place, a=adapter, own=own: a(s - entering[p], entering[p], own)
    return model


def test_sequential_on_distilbert_and_bart(tmp_path: Path) -> None:
    kinds: dict[str, dict[str, tuple[str, str, str]]] = {
        "distilbert": {
            f"{at}.output_adapters": (f"{at}.ffn.lin1", f"{at}.ffn.lin2", f"{at}.output_layer_norm")
            for at in (f"distilbert.transformer.layer.{i}" for i in (0, 1))
        },
        "bart": {
            f"{at}.output_adapters": (f"{at}.fc1", f"{at}.fc2", f"{at}.final_layer_norm")
            for at in (f"model.{side}.layers.{i}" for i in (0, 1) for side in ("encoder", "decoder"))
        },
    }
    for name, steps in kinds.items():
        shapes = {n: s for place in steps for n, s in bottleneck(place).items()}
        tensors = written(tmp_path / name, SEQ_BN, shapes)
        model = behind_feed_forwards(ZOO[name].build(), tensors, steps)
        close(loaded(name, tmp_path / name), logits(name, model), name)


NORM_FIRST = {
    "gpt2": {f"transformer.h.{i}.output_adapters": f"transformer.h.{i}" for i in (0, 1)},
    "llama": {f"model.layers.{i}.output_adapters": f"model.layers.{i}" for i in (0, 1)},
    "t5": {f"{s}.block.{i}.layer.{n}": f"{s}.block.{i}" for s, n in (("encoder", 1), ("decoder", 2)) for i in (0, 1)},
}


@pytest.mark.parametrize("name", NORM_FIRST)
def test_sequential_where_norms_come_first(name: str, tmp_path: Path) -> None:
    """Their layers hand the adapter no norm: it reads the sum, which is what leaves the layer."""
    tensors = written(tmp_path, SEQ_BN, {n: s for place in NORM_FIRST[name] for n, s in bottleneck(place).items()})
    model: Any = ZOO[name].build()
    for place, block in NORM_FIRST[name].items():
        theirs = Theirs(tensors, place)

        def behind(_: Any, __: Any, output: Any, adapter: Theirs = theirs) -> Any:
            whole = output[0] if isinstance(output, tuple) else output
            # Any cut of the sum into hidden states and residual gives the same.
            new = adapter(0.25 * whole, 0.75 * whole, None)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        model.get_submodule(block).register_forward_hook(behind)
    close(loaded(name, tmp_path), logits(name, model), name)


def test_one_layer_left_out(tmp_path: Path) -> None:
    places = {"bert.encoder.layer.1.output.dense": "bert.encoder.layer.1.output"}
    config = BOTTLENECK | {"mh_adapter": False, "leave_out": [0], "non_linearity": "gelu"}
    tensors = written(tmp_path, config, bottleneck("bert.encoder.layer.1.output"))
    close(loaded("bert", tmp_path), serial("bert", places, tensors, F.gelu), "bert")


def test_parallel_on_bert(tmp_path: Path) -> None:
    config = BOTTLENECK | {"mh_adapter": False, "is_parallel": True, "scaling": 4.0, "non_linearity": "relu"}
    places = [f"bert.encoder.layer.{i}.output" for i in (0, 1)]
    tensors = written(tmp_path, config, {n: s for place in places for n, s in bottleneck(place).items()})
    model = ZOO["bert"].build()
    entering: dict[str, Tensor] = {}
    for place in places:
        first = model.get_submodule(place.replace("output", "intermediate") + ".dense")
        first.register_forward_pre_hook(lambda _, args, place=place: entering.update({place: args[0]}))
        model.get_submodule(f"{place}.dense").register_forward_hook(
            lambda _, __, y, place=place: y + 4.0 * inner(tensors, place, entering[place], F.relu)
        )
    close(loaded("bert", tmp_path), logits("bert", model), "bert")


def test_lora(tmp_path: Path) -> None:
    paths = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"]
    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        out = 32 if path.endswith("q_proj") else 16
        shapes |= {f"{path}.loras.mine.lora_A": (3, SIZE), f"{path}.loras.mine.lora_B": (out, 3)}
    tensors = written(tmp_path, LORA, shapes)
    model = ZOO["llama"].build()
    with torch.no_grad():
        for path in paths:
            a, b = (tensors[f"{path}.loras.mine.lora_{n}"] for n in "AB")
            model.get_submodule(path).weight += 2.0 * b @ a  # type: ignore[operator]
    close(loaded("llama", tmp_path), logits("llama", model), "llama")


def test_ia3(tmp_path: Path) -> None:
    """AdapterHub rescales what leaves the named layer, the second feed-forward matrix included."""
    paths = [f"model.layers.{i}.{p}" for i in (0, 1) for p in ("self_attn.k_proj", "mlp.down_proj")]
    shapes = {f"{p}.loras.mine.lora_B": (16 if "k_proj" in p else 32, 1) for p in paths}
    config = LORA | {"composition_mode": "scale", "r": 1, "alpha": 1, "init_weights": "ia3", "intermediate_lora": True}
    tensors = written(tmp_path, config, shapes)
    model = ZOO["llama"].build()
    with torch.no_grad():
        for path in paths:
            model.get_submodule(path).weight *= tensors[f"{path}.loras.mine.lora_B"]  # type: ignore[operator]
    close(loaded("llama", tmp_path), logits("llama", model), "llama")


@pytest.mark.parametrize("flat", [False, True])
def test_prefix_on_bert(flat: bool, tmp_path: Path) -> None:
    """Keys and values in front of the text's, at every layer, by plain attention."""
    at, width = "bert.prefix_tuning.prefix_tunings.mine.self_prefix", 2 * 2 * SIZE
    shapes: dict[str, tuple[int, ...]] = {f"{at}.control_trans": (3 * width,)}
    if not flat:
        shapes = {
            f"{at}.wte.weight": (3, SIZE),
            f"{at}.control_trans.0.weight": (6, SIZE),
            f"{at}.control_trans.0.bias": (6,),
            f"{at}.control_trans.2.weight": (width, 6),
            f"{at}.control_trans.2.bias": (width,),
        }
    tensors = written(tmp_path, PREFIX | {"flat": flat}, shapes)
    if flat:
        table = tensors[f"{at}.control_trans"].view(3, width)
    else:
        t = {n.removeprefix(f"{at}."): v for n, v in tensors.items()}
        low = torch.tanh(F.linear(t["wte.weight"], t["control_trans.0.weight"], t["control_trans.0.bias"]))
        table = F.linear(low, t["control_trans.2.weight"], t["control_trans.2.bias"])
    pairs = table.view(3, 2, 2, 4, 8).permute(1, 2, 3, 0, 4)  # (layers, 2, heads, length, head size)
    model: Any = ZOO["bert"].build()
    for layer, pair in zip(model.bert.encoder.layer, pairs, strict=True):
        own = layer.attention.self

        def forward(hidden: Tensor, *args: Any, own: Any = own, pair: Tensor = pair, **kwargs: Any) -> Any:
            mask = kwargs.get("attention_mask", args[0] if args else None)
            rows, tokens = hidden.shape[:2]
            heads = [f(hidden).view(rows, tokens, 4, 8).transpose(1, 2) for f in (own.query, own.key, own.value)]
            keys, values = (
                torch.cat([p.expand(rows, -1, -1, -1), h], dim=2) for p, h in zip(pair, heads[1:], strict=True)
            )
            scores = heads[0] @ keys.mT / 8**0.5
            if mask is not None:
                blocked = (~mask if mask.dtype == torch.bool else mask < 0).expand(rows, 1, tokens, tokens)
                scores[..., 3:] = scores[..., 3:].masked_fill(blocked, -1e30)
            return (scores.softmax(-1) @ values).transpose(1, 2).flatten(2), None

        own.forward = forward
    close(loaded("bert", tmp_path), logits("bert", model), "bert")


def test_prompt_on_llama(tmp_path: Path) -> None:
    config = {"architecture": "prompt_tuning", "combine": "prefix", "prompt_init": "random_uniform",
              "prompt_init_text": None, "prompt_length": 3, "random_uniform_scale": 0.5}  # fmt: skip
    name = "model.prompt_tuning.prompt_tunings.mine.prompt_embedding.weight"
    tensors = written(tmp_path, config, {name: (3, SIZE)})
    model: Any = ZOO["llama"].build()

    def forward(own: Callable[..., Any] = model.forward, **batch: Any) -> Any:
        rows = batch["input_ids"].shape[0]
        embeds = torch.cat([tensors[name].expand(rows, -1, -1), model.model.embed_tokens(batch["input_ids"])], 1)
        mask = F.pad(batch["attention_mask"], (3, 0), value=1)
        return own(inputs_embeds=embeds, attention_mask=mask)

    model.forward = forward
    close(loaded("llama", tmp_path), logits("llama", model), "llama")


@pytest.mark.parametrize(
    "name, config, more, said",
    [
        ("bert", SEQ_BN | {"residual_before_ln": "post_add"}, {}, "residual_before_ln is 'post_add'"),
        ("bert", SEQ_BN | {"residual_before_ln": False}, {}, "its input is added twice"),
        ("llama", SEQ_BN | {"mh_adapter": True}, {}, "for a 'llama' behind attention inlay knows no exact"),
        ("opt", SEQ_BN, {}, "for a 'opt' inlay knows no exact counterpart"),
        ("bert", BOTTLENECK | {"phm_layer": True, "ln_after": True}, {}, "ln_after is True"),
        ("bert", BOTTLENECK | {"scaling": "learned"}, {}, "scaling is 'learned'"),
        ("bert", BOTTLENECK | {"non_linearity": "mish"}, {}, "non_linearity is 'mish'"),
        ("bert", BOTTLENECK | {"something": 3}, {}, "something is 3"),
        ("bert", BOTTLENECK, {"hidden_size": 64}, "hidden_size is 64"),
        ("bert", BOTTLENECK, {"name": "another"}, "inner sizes"),
        ("bert", {"architecture": "reft"}, {}, "architecture 'reft'"),
        ("llama", BOTTLENECK | {"is_parallel": True, "mh_adapter": False}, {}, "residual stream"),
        ("llama", PREFIX, {}, "only an encoder's prefix"),
        ("bert", LORA | {"composition_mode": "blend"}, {}, "composition_mode is 'blend'"),
    ],
)
def test_what_is_refused(name: str, config: dict[str, Any], more: dict[str, Any], said: str, tmp_path: Path) -> None:
    written(tmp_path, config, bottleneck("bert.encoder.layer.0.output"), **more)
    model = ZOO[name].build()
    with pytest.raises(AdapterFileError, match=said):
        inlay.load(model, tmp_path)
    assert not inlay.adapters(model)


def test_a_layer_that_is_missing(tmp_path: Path) -> None:
    shapes = bottleneck("bert.encoder.layer.0.output") | bottleneck("bert.encoder.layer.0.attention.output")
    shapes.pop("bert.encoder.layer.0.output.adapters.mine.adapter_up.bias")
    written(tmp_path, BOTTLENECK, shapes | {"extra": (2,)})
    with pytest.raises(AdapterFileError, match="2 problems") as said:
        inlay.load(ZOO["bert"].build(), tmp_path)
    assert "adapter_up.bias is missing" in str(said.value)
    assert "extra is stored, but nothing here takes it" in str(said.value)
