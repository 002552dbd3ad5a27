"""`transformers.Trainer` for a frozen base with one adapter.

Only these differ from the plain Trainer:

    checkpoint    the adapter, optimizer, schedule, random states and counters, never the base; complete or absent
    loss          the mean over all scored items of a step, however it is divided into micro-batches
    evaluation    the mean over all scored items, without keeping logits; it draws no random numbers
    rows          in `order.LengthGroupedOrder`
    memory        a step that runs out of memory is repeated in smaller micro-batches (`passes.py`)
    fp16          losses are scaled (`scaling.py`) and nothing is cast
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer

from inlay.core.contracts.adapter import Adapter, not_finite
from inlay.core.errors import ConfigError
from inlay.core.labels import IGNORED
from inlay.core.upstream import inputs_for, save_progress
from inlay.train.folder import RunFolder, write_beside
from inlay.train.order import LengthGroupedOrder
from inlay.train.passes import Passes
from inlay.train.scaling import Scaling

ADAPTER_FILE = "adapter.safetensors"
STATE_FILE = "trainer_state.json"
PASSES_FILE = "passes.json"


class AdapterTrainer(Trainer):
    """The training loop of `inlay train`.

    Args:
        adapter: the adapter to train.
        folder: the run's folder, for checkpoints.
        task: decides what a scored item is: a token or a row.
        patience: training ends after so many evaluations without a better score; None is never.
        told: callback during evaluations: (rows done, all rows).
        shrunk: callback when memory ran out: (rows of a micro-batch from now on).
        serving: context manager that yields the arguments of the model's call for a batch; stays open until the
            backward pass is over.
        skipped: for a base in fp16: losses are scaled, and this is called for each step that overflows.
    """

    def __init__(
        self,
        *,
        adapter: Adapter,
        folder: RunFolder,
        task: str,
        patience: int | None = None,
        told: Callable[[int, int], None] | None = None,
        shrunk: Callable[[int], None] | None = None,
        serving: Callable[[dict[str, Tensor]], AbstractContextManager[dict[str, Tensor]]] = nullcontext,
        skipped: Callable[[], None] | None = None,
        **options: Any,
    ) -> None:
        self.adapter, self.folder, self.task, self.patience, self.told = adapter, folder, task, patience, told
        self.serving = serving
        self.passes = Passes(discard=self._drop_gradients, told=shrunk or (lambda rows: None))
        self.scoring = Passes(discard=lambda: None, told=lambda rows: None)
        self.control: Any
        self.optimizer: Any
        super().__init__(**options)
        self.loss_is_scaled_for_ga = True  # `compute_loss` weighs each pass by its share of the step
        if skipped is not None:
            self.add_callback(Scaling(self.accelerator, skipped))

    # -- rows ---------------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedOrder:
        lengths = [len(ids) for ids in self.train_dataset["input_ids"]]
        return LengthGroupedOrder(lengths, self.args.train_batch_size, self.args.seed)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of one step, and the number of scored items in all of them (on all devices)."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        items = torch.tensor(sum(self.items(batch) for batch in batches), device=device)
        if self.args.world_size > 1:
            items = self.accelerator.gather(items).sum()
        self.passes.begin()
        return batches, items

    def items(self, batch: dict[str, Tensor]) -> int:
        """The number of scored items of a batch: rows for a classifier, else predicted tokens."""
        labels = batch["labels"]
        if self.task in ("classification", "regression"):
            return int(labels.shape[0])
        # A decoder predicts each token from the ones before it, so it never predicts the first.
        return int((labels[:, 1:] if self.task == "causal" else labels).ne(IGNORED).sum())

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward of one micro-batch, in parts if memory ran out before."""
        step = super().training_step

        def run(part: dict[str, Any]) -> Tensor:
            with self.serving(inputs_for(self, part)) as given:
                loss: Tensor = step(model, given, num_items_in_batch)
            return loss

        return torch.stack(self.passes.run(inputs, run)).sum()

    def _drop_gradients(self) -> None:
        for parameter in self.adapter.parameters():
            parameter.grad = None

    # -- loss ---------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the step's mean loss.

        Models differ in whether they use ``num_items_in_batch``; all return the mean over their own items.

        Raises:
            ConfigError: the loss is NaN or infinite.
        """
        outputs = model(**inputs)
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
        if model.training:
            if not torch.isfinite(loss):
                raise diverged(f"the loss is {loss.item()} at step {self.state.global_step + 1}")
            if num_items_in_batch is not None:
                loss = loss * (self.items(inputs) / num_items_in_batch) * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """Create the optimizer over the adapter's parameters only, each at the rate that its method asks for."""
        if self.optimizer is None:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            groups = self.adapter.parameter_groups(self.args.learning_rate, self.args.weight_decay)
            self.optimizer = cls(groups, **options)
        return self.optimizer

    # -- evaluation ---------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Score the held-out rows, record whether they are the best yet, and end training if patience is used up."""
        with torch.random.fork_rng():
            scores = {f"{metric_key_prefix}_{name}": value for name, value in self.measure().items()}
        name, greater = criterion(self.task)
        score, best = scores[f"{metric_key_prefix}_{name}"], self.state.best_metric
        ready = self.adapter.method.ready(self.adapter)
        if ready and math.isfinite(score) and (best is None or (score > best if greater else score < best)):
            self.state.best_metric, self.state.best_global_step = score, self.state.global_step
            self._keep_best()
        self.log(scores)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, scores)
        if patience_used_up(self.state, self.patience):
            self.control.should_training_stop = True
        return scores

    def measure(self) -> dict[str, float]:
        """Loss over all held-out items; accuracy too for a classifier."""
        self.model.eval()
        loss, items, right, done = 0.0, 0, 0, 0
        total = len(self.eval_dataset)
        for raw in self.get_eval_dataloader():
            batch = inputs_for(self, raw)
            self.scoring.begin()
            for part_loss, part_items, part_right in self.scoring.run(batch, self._scored):
                loss, items, right = loss + part_loss, items + part_items, right + part_right
            done += int(batch["position_ids"].eq(0).sum()) if "position_ids" in batch else len(batch["labels"])
            if self.told is not None:
                self.told(done, total)
        scores = {"loss": loss / max(items, 1)}
        return scores | ({"accuracy": right / items} if self.task == "classification" else {})

    def _scored(self, batch: dict[str, Any]) -> tuple[float, int, int]:
        """The loss summed over the scored items, their number, and the number of rows a classifier gets right."""
        count = self.items(batch)
        with torch.no_grad(), self.serving(batch) as given:
            outputs = self.model(**given)
        right = 0
        if self.task == "classification":
            right = int((outputs["logits"].argmax(-1) == batch["labels"]).sum())
        return float(outputs["loss"]) * count if count else 0.0, count, right

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the Trainer, but steps are only kept in metrics.jsonl; the state only keeps evaluations."""
        super().log(logs, start_time)
        self.state.log_history = [entry for entry in self.state.log_history if "eval_loss" in entry]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Zero: the Trainer would go through every module at each step for an estimate that nobody reads."""
        return 0

    # -- checkpoints --------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        path = self.folder.checkpoint(self.state.global_step)
        if not self.args.should_save:
            return
        write_beside(path, self._write_checkpoint)
        self.folder.keep_only(path)

    def _write_checkpoint(self, part: Path) -> None:
        part.mkdir()
        write_tensors(self.adapter, part / ADAPTER_FILE)
        save_progress(self, str(part))
        self.state.save_to_json(str(part / STATE_FILE))
        (part / PASSES_FILE).write_text(json.dumps({"rows": self.passes.rows}), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        read_tensors(self.adapter, folder / ADAPTER_FILE)
        self.passes.rows = json.loads((folder / PASSES_FILE).read_text(encoding="utf-8"))["rows"]
        if self.passes.rows is not None:
            self.passes.told(self.passes.rows)

    def _keep_best(self) -> None:
        write_beside(self.folder.best, lambda part: write_tensors(self.adapter, part))

    def load_best(self) -> None:
        """Restore the best adapter's values, if an evaluation found one.

        Raises:
            ConfigError: there is none, and the last step left infinite or NaN values.
        """
        if self.state.best_global_step not in (None, self.state.global_step):
            read_tensors(self.adapter, self.folder.best)
        if not_finite(self.adapter):
            raise diverged(f"step {self.state.global_step} left infinite or NaN values in the adapter")


def diverged(what: str) -> ConfigError:
    """The error for a training that diverged."""
    return ConfigError(
        f"{what}: training diverged. Lower --learning-rate, or give --precision fp32 if the run computes in 16 bits, "
        "and --overwrite"
    )


def criterion(task: str) -> tuple[str, bool]:
    """The score that decides which adapter is best, and whether higher is better."""
    return ("accuracy", True) if task == "classification" else ("loss", False)


def patience_used_up(state: Any, patience: int | None) -> bool:
    """Whether the last `patience` evaluations brought no better score; the state tells, even in a resumed run."""
    if patience is None or state.best_global_step is None:
        return False
    later = [entry for entry in state.log_history if "eval_loss" in entry and entry["step"] > state.best_global_step]
    return len(later) >= patience


def write_tensors(adapter: Adapter, path: Path) -> None:
    """Write every tensor of an adapter as it is in training, including encoders of prompts."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in adapter.tensors().items()}, path)


def read_tensors(adapter: Adapter, path: Path) -> None:
    """Read the tensors of `write_tensors` into the attached adapter."""
    stored, targets = load_file(path), adapter.tensors()
    if {n: t.shape for n, t in stored.items()} != {n: t.shape for n, t in targets.items()}:
        raise ConfigError(
            f"{path} does not fit this run's adapter: method, places or base changed. Start again with --overwrite"
        )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(stored[name])
