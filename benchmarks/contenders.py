"""The same LoRA adapters in inlay and in Hugging Face PEFT: copies of one base, equal values."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import inlay
from inlay import LoRA
from inlay.core.contracts.method import Method


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama with random weights.

    Attributes:
        seed: of its weights, and of everything drawn for it.
    """

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0

    def build(self) -> Any:
        """The model, frozen."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(self.seed)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
        )
        return LlamaForCausalLM(config).to(self.dtype).requires_grad_(False)

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "dtype": str(self.dtype).removeprefix("torch.")}


LLAMA_135M = Shape(hidden=576, intermediate=1536, layers=30, heads=9, vocabulary=49_152)
LLAMA_58M = Shape(hidden=512, intermediate=1376, layers=8, heads=8, vocabulary=32_000)
# 16 blocks of 7 linear layers: as many adapted layers as a 7 B model with adapters on half of them.
LINEARS_112 = Shape(hidden=64, intermediate=128, layers=16, heads=4, vocabulary=256, dtype=torch.float32)


def with_inlay(
    base: nn.Module, method: Method, names: Sequence[str], *, seed: int, where: str | None = "all-linear"
) -> Any:
    """A copy of `base` with one adapter a name through inlay, on every linear layer if nothing else is said."""
    model = copy.deepcopy(base)
    torch.manual_seed(seed)
    for name in names:
        inlay.attach(model, method, name=name, where=where)
    return model


def with_peft(base: nn.Module, method: LoRA, names: Sequence[str]) -> Any:
    """The same through PEFT, with its defaults; the values are its own until `copy_values`."""
    import peft

    config = peft.LoraConfig(
        r=method.rank,
        lora_alpha=method.alpha,
        lora_dropout=method.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(copy.deepcopy(base), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model


def in_peft(ours: nn.Module, base: nn.Module) -> Any:
    """A copy of `base` with inlay's adapter in PEFT, with PEFT's defaults: what inlay wrote, PEFT reads."""
    import peft

    with tempfile.TemporaryDirectory() as folder:
        inlay.save(ours, next(iter(inlay.adapters(ours))), folder, format="peft")
        prompt = isinstance(peft.PeftConfig.from_pretrained(folder), peft.PromptLearningConfig)
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), folder, is_trainable=not prompt)
    if prompt:  # PEFT refuses to load those for training, and trains them all the same
        model.active_peft_config.inference_mode = False
        model.prompt_encoder.requires_grad_(True)
    return model


def copy_values(ours: nn.Module, theirs: nn.Module) -> None:
    """Give PEFT's adapters the values of inlay's.

    Raises:
        ValueError: the two have adapters at different layers, or of different shapes.
    """
    wanted = {n: p for n, p in theirs.named_parameters() if "lora_" in n}
    given = {}
    for name, adapter in inlay.adapters(ours).items():
        for key, value in adapter.tensors().items():
            _, site, matrix = key.split("/")
            given[f"base_model.model.{site}.lora_{matrix.upper()}.{name}.weight"] = value
    if wanted.keys() != given.keys():
        raise ValueError(f"adapters are at different places: {sorted(wanted.keys() ^ given.keys())[:6]}")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(given[name])


def randomise(model: nn.Module, *, seed: int, size: float = 0.05) -> None:
    """Fill the B matrices of inlay's adapters, which start at zero, so that every adapter does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in inlay.adapters(model).values():
            for key, value in adapter.tensors().items():
                if key.endswith("/b"):
                    value.copy_(torch.randn(value.shape, generator=generator) * size)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer gets."""
    return [p for p in model.parameters() if p.requires_grad]


def token_rows(shape: Shape, rows: int, tokens: int) -> Tensor:
    """Random tokens, (rows, tokens)."""
    generator = torch.Generator().manual_seed(shape.seed + 1)
    return torch.randint(shape.vocabulary, (rows, tokens), generator=generator)
