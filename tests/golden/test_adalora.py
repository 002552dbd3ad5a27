"""AdaLoRA against the paper written out by hand, in three training loops, at the paper's size, and against PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import inlay
from inlay.core.errors import ConfigError
from inlay.methods.adalora import AdaLoRA
from inlay.testing.models import ZOO
from inlay.train import load_base
from tests import tiny
from tests.golden.hand import close, inputs, shake, with_weights, zoo_model

TOY = {
    "rank": 4, "target_rank": 2, "alpha": 6.0, "warmup_steps": 3, "final_steps": 5, "interval": 2,
    "beta1": 0.8, "beta2": 0.7, "orthogonality": 0.3, "total_steps": 20,
}  # fmt: skip


def toy() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def formula(step: int, matrices: int, values: dict[str, Any]) -> int:
    """b(t), as the official code computes it; `step` counts from 1."""
    start, target = matrices * values["rank"], matrices * values["target_rank"]
    first, final, total = values["warmup_steps"], values["final_steps"], values["total_steps"]
    if step <= first:
        return start
    if step >= total - final:
        return target
    return int(target + (start - target) * (1 - (step - first) / (total - first - final)) ** 3)


class Paper:
    """Two matrices by hand: the regulariser is part of the loss, and its gradient is autograd's."""

    def __init__(self, base: nn.Sequential, start: dict[str, Tensor]) -> None:
        self.base = [(base[i].weight.detach(), base[i].bias.detach()) for i in (0, 2)]
        self.q, self.p, self.e = ([start[f"delta/{i}/{n}"] for i in (0, 2)] for n in "abe")
        self.all = [*self.q, *self.p, *self.e]
        self.i = {id(w): torch.zeros_like(w) for w in self.all}
        self.u = {id(w): torch.zeros_like(w) for w in self.all}
        self.optimizer = torch.optim.AdamW(self.all, lr=0.03, weight_decay=0.02)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        for k, (weight, bias) in enumerate(self.base):
            x = x @ (weight + 6.0 / 4 * self.p[k] @ torch.diag(self.e[k]) @ self.q[k]).T + bias
            x = torch.tanh(x) if k == 0 else x
        return (x - y).square().mean()

    def step(self, t: int, x: Tensor, y: Tensor) -> None:
        norms = [torch.linalg.norm(p.T @ p - torch.eye(4)) for p in self.p]
        norms += [torch.linalg.norm(q @ q.T - torch.eye(4)) for q in self.q]
        self.optimizer.zero_grad()
        (self.loss(x, y) + 0.3 * sum(norms) / 4).backward()
        if t < 15:
            for w in self.all:
                now = (w.detach() * w.grad).abs()
                self.i[id(w)] = 0.8 * self.i[id(w)] + 0.2 * now
                self.u[id(w)] = 0.7 * self.u[id(w)] + 0.3 * (now - self.i[id(w)]).abs()
        self.optimizer.step()
        if t >= 15 or (t > 3 and t % 2 == 0):
            self.prune(formula(t, 2, TOY))

    def prune(self, budget: int) -> None:
        s = {k: self.i[k] * self.u[k] for k in self.i}
        scores = [
            s[id(e)] + s[id(p)].mean(0) + s[id(q)].mean(1) for q, p, e in zip(self.q, self.p, self.e, strict=True)
        ]
        threshold = torch.cat(scores).sort(descending=True).values[budget - 1]
        for e, score in zip(self.e, scores, strict=True):
            e.data[score < threshold] = 0.0


def test_a_whole_schedule_equals_the_papers() -> None:
    model = toy()
    adapter = inlay.attach(model, AdaLoRA(**TOY), where=["0", "2"])
    paper = Paper(toy(), numbers_of_training(adapter))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=0.03, weight_decay=0.02)
    generator = torch.Generator().manual_seed(3)
    counts = []
    for t in range(1, 21):
        x, y = torch.randn(7, 6, generator=generator), torch.randn(7, 3, generator=generator)
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        close(loss, paper.loss(x, y))
        loss.backward()
        optimizer.step()
        paper.step(t, x, y)
        stored = adapter.tensors()
        for name, tensors in (("a", paper.q), ("b", paper.p), ("e", paper.e)):
            for site, wanted in zip((0, 2), tensors, strict=True):
                close(stored[f"delta/{site}/{name}"], wanted)
                torch.testing.assert_close(
                    stored[f"delta/{site}/{name}_sensitivity"], paper.i[id(wanted)], atol=1e-7, rtol=1e-3
                )
                torch.testing.assert_close(
                    stored[f"delta/{site}/{name}_uncertainty"], paper.u[id(wanted)], atol=1e-7, rtol=1e-3
                )
        masks = [stored[f"delta/{site}/e"] == 0 for site in (0, 2)]
        assert all(torch.equal(mask, e == 0) for mask, e in zip(masks, paper.e, strict=True))
        counts.append(8 - int(sum(mask.sum() for mask in masks)))
    assert counts[:3] == [8, 8, 8] and counts[14:] == [4] * 6
    assert [counts[t - 1] for t in range(4, 15, 2)] == [formula(t, 2, TOY) for t in range(4, 15, 2)]
    assert [counts[t - 1] for t in range(5, 14, 2)] == [8] * 5, "pruned triplets are trained until the end begins"


def numbers_of_training(adapter: inlay.Adapter) -> dict[str, Tensor]:
    trained = ("/a", "/b", "/e")
    stored = {n: t for n, t in adapter.tensors().items() if n.endswith(trained)}
    return {n: t.detach().clone().requires_grad_() for n, t in stored.items()}


def test_initialisation() -> None:
    torch.manual_seed(0)
    model: Any = transformers.BertModel(transformers.BertConfig(num_hidden_layers=1))
    adapter = inlay.attach(model, AdaLoRA(total_steps=10))
    stored = adapter.tensors()
    assert len(adapter.pieces) == 6
    for piece in adapter.pieces:
        assert (stored[f"delta/{piece.key}/e"] == 0).all()
        for name in "ab":
            drawn = stored[f"delta/{piece.key}/{name}"]
            assert 0.019 < float(drawn.std()) < 0.021 and abs(float(drawn.mean())) < 1e-3
    assert float(stored["shared/schedule/done"]) == 0


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_forward_and_gradients(name: str) -> None:
    model: Any = zoo_model(name)
    batch = inputs(name)
    adapter = shake(inlay.attach(model, AdaLoRA(rank=3, target_rank=1, alpha=2.0, total_steps=9)))
    leaves = numbers_of_training(adapter)

    def change(parameter: str, value: Tensor) -> Tensor:
        site = f"delta/{parameter.removesuffix('.weight')}"
        if f"{site}/a" not in leaves:
            return value
        return value + 2 / 3 * leaves[f"{site}/b"] @ torch.diag(leaves[f"{site}/e"]) @ leaves[f"{site}/a"]

    agree_trained(adapter, model(**batch).logits, with_weights(zoo_model(name), change, batch).logits, leaves)


def agree_trained(adapter: Any, actual: Tensor, expected: Tensor, leaves: dict[str, Tensor]) -> None:
    """`hand.agree` without the buffers, which get no gradients."""
    close(actual, expected)
    actual.square().sum().backward()
    expected.square().sum().backward()
    by_address = {p.data_ptr(): p for p in adapter.parameters()}
    for name, tensor in adapter.tensors().items():
        if name in leaves:
            gradient, wanted = by_address[tensor.data_ptr()].grad, leaves[name].grad
            assert gradient is not None and wanted is not None
            close(gradient, wanted, 1e-4)


# -- loops --------------------------------------------------------------------------------------------------

LOOP: dict[str, Any] = {
    "rank": 3,
    "target_rank": 1,
    "warmup_steps": 1,
    "final_steps": 2,
    "interval": 1,
    "total_steps": 6,
}


@contextmanager
def watched(adapter: inlay.Adapter) -> Iterator[list[int]]:
    """How many triplets are alive after each step of the adapter's optimizer."""
    seen: list[int] = []
    mine = {id(p) for p in adapter.parameters()}

    def look(optimizer: Any, *_: Any) -> None:
        if any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            seen.append(sum(int((t != 0).sum()) for n, t in adapter.tensors().items() if n.endswith("/e")))

    handle = register_optimizer_step_post_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("base") / "llama", dropout=0.0)


def wanted(adapter: inlay.Adapter) -> list[int]:
    return [formula(t, len(adapter.pieces), LOOP) for t in range(1, 7)]


def test_budget_in_a_plain_loop(llama: Path) -> None:
    model, tokenizer, _ = load_base(llama)
    adapter = inlay.attach(model, AdaLoRA(**LOOP))
    batch = tokenizer([row["text"] for row in tiny.rows("text", 4)], return_tensors="pt", padding=True)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-2))
    with watched(adapter) as seen:
        for _ in range(6):
            model(**batch, labels=batch["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert seen == wanted(adapter) and seen[-1] == len(adapter.pieces)


def test_budget_in_transformers_trainer(llama: Path, tmp_path: Path) -> None:
    model, tokenizer, _ = load_base(llama)
    adapter = inlay.attach(model, AdaLoRA(**LOOP))
    rows = [{"input_ids": tokenizer(row["text"])["input_ids"]} for row in tiny.rows("text", 24)]
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        ),
        train_dataset=rows,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )  # fmt: skip
    with watched(adapter) as seen:
        trainer.train()
    assert seen == wanted(adapter)


@pytest.mark.slow
def test_budget_in_trl(llama: Path, tmp_path: Path) -> None:
    import trl
    from datasets import Dataset

    model, tokenizer, _ = load_base(llama)
    adapter = inlay.attach(model, AdaLoRA(**LOOP))
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-2, max_length=tiny.CONTEXT, report_to=[], save_strategy="no", bf16=False,
        ),
        train_dataset=Dataset.from_list(tiny.rows("completion", 24)),
        processing_class=tokenizer,
    )  # fmt: skip
    with watched(adapter) as seen:
        trainer.train()
    assert seen == wanted(adapter)


def test_the_length_of_the_run_must_be_known_and_suffice(llama: Path) -> None:
    model, tokenizer, _ = load_base(llama)
    batch = tokenizer(["the cat"], return_tensors="pt")
    for method, word in ((AdaLoRA(), "total_steps"), (AdaLoRA(**LOOP | {"total_steps": 3}), "at least 4")):
        adapter = inlay.attach(model, method)
        optimizer = torch.optim.AdamW(adapter.parameters())
        model(**batch, labels=batch["input_ids"]).loss.backward()
        with pytest.raises(ConfigError, match=word):
            optimizer.step()
        adapter.method = AdaLoRA().for_steps(40)
        optimizer.step()
        inlay.detach(model, "default")


def test_a_finished_adapter_is_written_without_what_was_pruned(llama: Path, tmp_path: Path) -> None:
    model, tokenizer, _ = load_base(llama)
    adapter = inlay.attach(model, AdaLoRA(**LOOP))
    batch = tokenizer([row["text"] for row in tiny.rows("text", 4)], return_tensors="pt", padding=True)
    optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-2))
    for t in range(6):
        if t == 2:
            inlay.save(model, "default", tmp_path / "unfinished")
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    inlay.save(model, "default", tmp_path / "finished")
    expected = model.eval()(**batch).logits
    again = load_base(llama).model.eval()
    loaded = inlay.load(again, tmp_path / "finished")
    close(again(**batch).logits, expected)
    n = len(adapter.pieces)
    assert isinstance(loaded.method, AdaLoRA) and sum(dict(loaded.method.rank_pattern).values()) == n
    assert {name.rpartition("/")[2] for name in loaded.tensors()} == {"a", "b", "e"}
    assert sum(t.numel() for name, t in loaded.tensors().items() if name.endswith("/e")) == n
    assert loaded.clock is None
    inlay.save(again, "default", tmp_path / "again")
    assert inlay.load(load_base(llama).model, tmp_path / "again").digest == loaded.digest
    unfinished = inlay.load(load_base(llama).model, tmp_path / "unfinished", trainable=True)
    assert int(unfinished.tensors()["shared/schedule/done"]) == 2 and unfinished.clock is not None


# -- the paper's size, PEFT ---------------------------------------------------------------------------------


def test_deberta_v3_base_has_72_matrices() -> None:
    config = transformers.DebertaV2Config(
        vocab_size=128100, hidden_size=768, num_hidden_layers=12, intermediate_size=3072
    )
    with torch.device("meta"):
        model = transformers.DebertaV2ForSequenceClassification(config)
    for target, total in ((8, 576), (4, 288), (2, 144)):
        rank = target * 3 // 2  # the paper's initial budget
        adapter = inlay.attach(model, AdaLoRA(rank=rank, target_rank=target, total_steps=1000))
        assert len(adapter.pieces) == 72
        assert adapter.count == 1_327_104 * rank // 8 + 72 * rank
        method = adapter.method
        assert isinstance(method, AdaLoRA)
        assert [method.budget(t, 72) for t in (1, 100, 500, 1000)] == [total * 3 // 2, total * 3 // 2, total, total]
        assert method.budget(300, 72) == total + int(total / 2 * 0.5**3)
        inlay.detach(model, "default")


def test_budget_and_logits_are_pefts() -> None:
    import peft

    model: Any = ZOO["bert"].build()
    adapter = shake(inlay.attach(model, AdaLoRA(**TOY), where=["query", "value"]))
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=6,
        tinit=3,
        tfinal=5,
        deltaT=2,
        total_step=20,
        target_modules=["query", "value"],
    )
    theirs = peft.get_peft_model(ZOO["bert"].build(), config)
    values = numbers_of_training(adapter)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            for ending, own in (("lora_A.default", "a"), ("lora_B.default", "b"), ("lora_E.default", "e")):
                if name.endswith(ending):
                    site = name.removeprefix("base_model.model.").removesuffix(f".{ending}")
                    parameter.copy_(values[f"delta/{site}/{own}"].reshape(parameter.shape))
    batch = inputs("bert")
    close(model(**batch).logits, theirs.eval()(**batch).logits)
    allocator = theirs.base_model.rankallocator
    method = adapter.method
    assert isinstance(method, AdaLoRA)
    for t in range(1, 21):
        if t != 15:  # the paper's end begins here, the code's a step later, with the same budget
            assert allocator.budget_schedule(t)[0] == method.budget(t, len(adapter.pieces)) == formula(t, 4, TOY)
