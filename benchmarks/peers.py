"""Peers other than PEFT: AdapterHub's bottleneck, and TRL's SFTTrainer as it comes."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import inlay


class HubBottleneck(nn.Module):
    """A block with an adapter behind it, computed as AdapterHub's `adapters` 1.3 does it.

    That package wants transformers 4.57, which cannot be installed beside transformers 5, so its forward is written
    again here: `Adapter.forward` of its `methods/modeling.py` for the configuration of Pfeiffer et al. with the block's
    own output as input (``original_ln_before=False``), in modules of PyTorch and in the base's type.
    """

    def __init__(self, block: nn.Module, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> None:
        super().__init__()
        self.block = block
        dtype = next(block.parameters()).dtype
        self.adapter_down = nn.Sequential(_linear(down, down_bias, dtype), nn.ReLU())
        self.adapter_up = _linear(up, up_bias, dtype)
        self.scaling, self.dropout = 1.0, nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.block(x)
        up = self.adapter_up(self.adapter_down(residual)) * self.scaling
        return self.dropout(up) + residual


def hub_bottleneck(ours: nn.Module, base: nn.Module) -> Any:
    """A copy of `base` with inlay's bottlenecks in AdapterHub's modules."""
    model = copy.deepcopy(base)
    values: dict[str, dict[str, Tensor]] = {}
    for key, value in next(iter(inlay.adapters(ours).values())).tensors().items():
        _, path, name = key.split("/")
        values.setdefault(path.split(".mlp")[0], {})[name] = value.detach()
    for path, tensors in values.items():
        layer: Any = model.get_submodule(path)
        layer.mlp = HubBottleneck(layer.mlp, **tensors)
    return model


def _linear(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], dtype=dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(bias)
    return made


def sft_step(base: nn.Module, rank: int, batch: dict[str, Tensor], rate: float) -> Callable[[], Tensor]:
    """A training step of SFTTrainer with LoRA, all else as it comes, on the rows of `batch`.

    The trainer's loop between the steps is left out, to its favour.
    """
    import peft
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from inlay.train.quiet import quiet_libraries

    labels = batch["labels"]
    rows = [
        {"input_ids": ids.tolist(), "labels": kept.tolist()}
        for ids, kept in zip(batch["input_ids"], labels, strict=True)
    ]
    model: Any = copy.deepcopy(base)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        arguments = SFTConfig(
            output_dir=folder, per_device_train_batch_size=len(rows), max_steps=1, learning_rate=rate, report_to=[],
            disable_tqdm=True, use_cpu=not torch.cuda.is_available(), save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(rows), peft_config=config,
            processing_class=_word_tokenizer(base.config.vocab_size),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()  # one step, through which the trainer prepares model and optimizer
    given = next(iter(trainer.get_train_dataloader()))
    optimizer, scored = trainer.optimizer, int((given["labels"][:, 1:] != -100).sum())
    assert optimizer is not None

    def step() -> Tensor:
        trainer.model_wrapped.train()
        optimizer.zero_grad()
        loss: Tensor = trainer.training_step(trainer.model_wrapped, dict(given), torch.tensor(scored))
        optimizer.step()
        return loss.detach()

    return step


def _word_tokenizer(size: int) -> Any:
    """A tokenizer, which the trainer wants even for rows that are tokens already."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<unk>": 0, "<eos>": 1} | {str(n): n for n in range(2, size)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
