"""Layers computed at the positions that are read give what the model's own way gives, and stand aside elsewhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

import inlay
from inlay import LoRA
from inlay.core.contracts.delta import Delta
from inlay.core.errors import UnsupportedError
from inlay.kernels.read_positions import calls, modules, trial
from inlay.kernels.read_positions.index import Index
from inlay.methods._low_rank import LowRank
from inlay.testing.models import ZOO
from inlay.testing.specimen import PAD
from tests.golden.hand import shake

ROWS = 12  # of 12 tokens: more positions than `calls.FEWEST`
INDEX_OF, TWIN_OF = Index.of, trial.twin_of
LAST = ("attention.output.dense", "attention.self.query", "intermediate", "output.dense")
METHODS: dict[str, inlay.core.contracts.method.Method] = {
    "lora": LoRA(rank=2),
    "dora": inlay.DoRA(rank=2),
    "ia3": inlay.IA3(),
    "houlsby": inlay.Houlsby(bottleneck=4),
    "oft": inlay.OFT(block_size=4),
    "bitfit": inlay.BitFit(),
    "stack": inlay.Stack(LoRA(rank=2), inlay.IA3()),
}


def attached(name: str = "bert", method: Any = None, **config: Any) -> Any:
    """A model of the zoo with an adapter, every trained value random."""
    model: Any = ZOO[name].build()
    for key, value in config.items():
        setattr(model.config, key, value)
    head = [n for n in ("classifier", "score") if hasattr(model, n)]
    torch.manual_seed(0)
    shake(inlay.attach(model, method or LoRA(rank=2), modules_to_save=head), 0.1)
    return model


def batch(name: str = "bert", side: str | None = "right", rows: int = ROWS) -> dict[str, Tensor]:
    """`side` None is without padding."""
    return ZOO[name].batch(rows, 3, ragged=side is not None, padding_side=side or "right")  # type: ignore[arg-type]


def found(model: nn.Module) -> list[trial.Found | None]:
    """What the trials of a model showed."""
    return list(calls._SEEN[model].found.values()) if model in calls._SEEN else []


class Took:
    """How many positions were taken out of tensors."""

    def __init__(self) -> None:
        self.positions = 0


@pytest.fixture
def took(monkeypatch: pytest.MonkeyPatch) -> Took:
    """Counts what the short way gathers in forwards of models, not in trials."""
    counter, plain = Took(), modules.Short._of

    def counted(self: Any, x: Tensor, index: Index) -> Tensor:
        counter.positions += index.needed.numel()
        return plain(self, x, index)

    def apart(*args: Any) -> Any:
        before = counter.positions
        answer = trial.tried(*args)
        counter.positions = before
        return answer

    monkeypatch.setattr(modules.Short, "_of", counted)
    monkeypatch.setattr(calls, "tried", apart)
    return counter


def results(model: Any, given: dict[str, Any], *, on: bool = True) -> list[Tensor]:
    """Loss, logits and every gradient; the same masks of dropout each time."""
    model.zero_grad()
    torch.manual_seed(1)
    with nullcontext() if on else inlay.fast_paths(False):
        out = model(**given)
        out.loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [out.loss.detach(), out.logits.detach().clone(), *(g.clone() for g in grads)]


def equal(some: list[Tensor], others: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(some) == len(others) > 2
    largest = max(float(other.abs().max()) for other in others[2:])  # a key's bias has a gradient of rounding only
    for one, other in zip(some, others, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * largest)


# -- it is the same, and shorter --------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left", None])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "deberta-v2"])
def test_loss_logits_and_gradients(name: str, side: str | None, took: Took) -> None:
    model, given = attached(name), batch(name, side)
    equal(results(model, given), results(model, given, on=False))
    assert took.positions > 0, "the plain way was taken"


@pytest.mark.parametrize("key", METHODS)
def test_every_kind_of_method(key: str, took: Took) -> None:
    model, given = attached(method=METHODS[key]), batch()
    equal(results(model, given), results(model, given, on=False))
    assert took.positions > 0


def test_what_is_found_in_an_encoder() -> None:
    model = attached()
    results(model, batch())
    (only,) = found(model)
    assert only is not None and not only.agreeing
    assert only.first == {f"bert.encoder.layer.1.{end}" for end in LAST}
    lower = {f"bert.encoder.layer.0.{end}" for end in (*LAST, "attention.self.key", "attention.self.value")}
    assert only.masked == lower | {f"bert.encoder.layer.1.attention.self.{end}" for end in ("key", "value")}
    assert only.handed == {f"bert.encoder.layer.{n}.intermediate" for n in (0, 1)}


def test_layers_see_fewer_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = attached(), batch()
    results(model, given)
    seen: list[int] = []
    plain = LowRank.with_layer

    def noted(self: Any, x: Tensor, site: Any) -> Tensor | None:
        seen.append(x[..., 0].numel())
        return plain(self, x, site)

    monkeypatch.setattr(LowRank, "with_layer", noted)
    results(model, given)
    padded = int(given["attention_mask"].sum())
    assert seen == [padded, padded, ROWS, padded]  # query and value of the first layer, and of the last one


def test_masks_of_dropout_stay(took: Took) -> None:
    model, given = attached(), batch()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    model.train()
    shorter = results(model, given)
    assert took.positions > 0
    with inlay.fast_paths(False, "read-positions"):
        equal(shorter, results(model, given))


def test_a_delta_may_draw(took: Took) -> None:
    model, given = attached(method=LoRA(rank=2, dropout=0.5)), batch()
    model.train()
    results(model, given)
    assert took.positions > 0


def test_a_decoder_that_padding_tokens_decide(took: Took) -> None:
    """It reads the last token that is not padding: the mask must say the same."""
    model, given = attached("llama-classifier"), batch("llama-classifier") | {"use_cache": False}
    equal(results(model, given), results(model, given, on=False))
    (only,) = found(model)
    assert took.positions > 0 and only is not None and only.agreeing and not only.first
    before = took.positions
    given["attention_mask"][2, -3:] = 0
    given["input_ids"][2] = 7
    equal(results(model, given), results(model, given, on=False))
    assert took.positions == before


def test_keys_that_are_returned_are_read() -> None:
    model, given = attached("llama-classifier"), batch("llama-classifier")
    results(model, given)
    assert found(model) == [None]


def test_positional_arguments_and_embeddings(took: Took) -> None:
    model, given = attached(), batch()
    embedded = model.get_input_embeddings()(given["input_ids"]).detach().requires_grad_()
    for args, rest in (
        ((given["input_ids"], given["attention_mask"]), {}),
        ((), {"inputs_embeds": embedded, "attention_mask": given["attention_mask"]}),
    ):
        before = took.positions
        short = model(*args, **rest).logits
        assert took.positions > before
        with inlay.fast_paths(False):
            torch.testing.assert_close(model(*args, **rest).logits, short, rtol=1e-5, atol=1e-5)
    short.sum().backward()
    padded = given["attention_mask"] == 0
    assert embedded.grad is not None and not embedded.grad[padded].any() and embedded.grad[~padded].any()


def test_without_a_mask_the_last_block_is_shorter(took: Took) -> None:
    model, given = attached(), batch(side=None)
    del given["attention_mask"]
    equal(results(model, given), results(model, given, on=False))
    (only,) = found(model)
    assert took.positions > 0 and only is not None and only.first and not only.masked


@pytest.mark.parametrize("rows", [2, 20])
def test_long_rows(rows: int, took: Took, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial has a quarter of the positions at most; the copy's calls, large enough too, are not tried in turn."""
    model, made = attached(), []
    monkeypatch.setattr(trial, "twin_of", lambda *args: made.append(1) or TWIN_OF(*args))
    ids = torch.randint(3, 97, (rows, 64), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(64) < 30 + torch.arange(rows)[:, None]).long()
    given = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 5}
    given["position_ids"] = torch.arange(64)[None]
    equal(results(model, given), results(model, given, on=False))
    assert took.positions > 0 and len(made) == 1


def test_without_an_adapter(took: Took) -> None:
    model, given = attached(), batch()
    with inlay.use(model, None):
        short = model(**given).logits
        assert took.positions > 0
        with inlay.fast_paths(False):
            torch.testing.assert_close(short, model(**given).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["autocast", "weights"])
def test_half_precision(precision: str, took: Took) -> None:
    model, given = attached(), batch()
    if precision == "weights":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    context: AbstractContextManager[Any] = torch.autocast("cpu", torch.bfloat16)
    with context if precision == "autocast" else nullcontext():
        short = results(model, given)
        assert took.positions > 0
        equal(short, results(model, given, on=False), 0.1)


def test_in_a_trainer(tmp_path: Any, took: Took) -> None:
    from transformers import Trainer, TrainingArguments

    given = batch(rows=24)
    rows = [{name: value[i] for name, value in given.items()} for i in range(24)]
    losses = []
    for on in (True, False):
        model = attached()
        arguments = TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=12, report_to=[], save_strategy="no",
            logging_steps=1, disable_tqdm=True, use_cpu=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
        before = took.positions
        with inlay.fast_paths(on, "read-positions"):
            trainer.train()
        assert (took.positions > before) == on
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_second_derivatives() -> None:
    model, given = attached(), batch()
    model.set_attn_implementation("eager")
    model(**given)
    outs = []
    for on in (True, False):
        with inlay.fast_paths(on, "read-positions"):
            loss = model(**given).loss
            trained = [p for p in model.parameters() if p.requires_grad]
            grads = torch.autograd.grad(loss, trained, create_graph=True, allow_unused=True)
            penalty = torch.stack([g.square().sum() for g in grads if g is not None]).sum()
            outs.append([penalty.detach(), *torch.autograd.grad(penalty, trained, allow_unused=True)])
    for one, other in zip(*outs, strict=True):
        if other is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


# -- outputs that show positions --------------------------------------------------------------------


def exposing(name: str) -> tuple[Any, dict[str, Any]]:
    from transformers import BertForTokenClassification, BertModel

    given: dict[str, Any] = {n: v for n, v in batch().items() if n != "labels"}
    if name == "hidden states":
        return attached(), given | {"output_hidden_states": True}
    if name == "attention":
        return attached(attn_implementation="eager"), given | {"output_attentions": True}
    kind = BertModel if name == "last hidden state" else BertForTokenClassification
    model = kind(ZOO["bert"].build().config).eval()
    inlay.attach(model, LoRA(rank=2))
    return model, given


@pytest.mark.parametrize("name", ["hidden states", "last hidden state", "scores of tokens"])
def test_what_shows_positions_is_computed(name: str) -> None:
    """Of masked positions that are returned, only keys and values reach nothing: no attention sees them."""
    model, given = exposing(name)
    tries = [model(**given) for _ in range(2)]
    (only,) = found(model)
    assert only is not None and not only.first and all(path.endswith(("key", "value")) for path in only.masked)
    with inlay.fast_paths(False, "read-positions"):
        expected = model(**given)
    for out in tries:
        for one, other in zip(tree_leaves(out), tree_leaves(expected), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_language_models_are_not_asked() -> None:
    model = attached("llama")
    assert inlay.fast_paths(model=model)["read-positions"].places == 0
    assert inlay.fast_paths(model=attached())["read-positions"].places > 0


def test_a_configuration_that_asks_for_more_later() -> None:
    model, given = attached(), batch()
    model(**given)
    model.config.output_hidden_states = True
    out = model(**given)
    with inlay.fast_paths(False):
        expected = model(**given)
    for one, other in zip(out.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# -- readers that a careless trial would miss -------------------------------------------------------


class Encoder(nn.Module):
    """One block of attention, and a head that reads what `pool` says."""

    def __init__(self, pool: str) -> None:
        super().__init__()
        self.pool, self.config = pool, SimpleNamespace(pad_token_id=None, vocab_size=97, eos_token_id=2)
        self.embed, self.query, self.key = nn.Embedding(97, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.value, self.up, self.act, self.down = nn.Linear(16, 16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)
        self.score, self.gate = nn.Linear(16, 5), nn.Linear(16, 5, bias=False)
        nn.init.zeros_(self.gate.weight)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> Any:
        x = self.embed(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        seen = None if self.pool == "unmasked" else mask[:, None, None].bool()
        parts = (layer(x).unsqueeze(1) for layer in (self.query, self.key, self.value))
        x = x + nn.functional.scaled_dot_product_attention(*parts, attn_mask=seen).squeeze(1)
        x = x + self.down(self.act(self.up(x)))
        return {"logits": self.read(x, mask, input_ids, token_type_ids)}

    def read(self, x: Tensor, mask: Tensor, ids: Tensor, kinds: Tensor | None) -> Tensor:
        rows, by_mask = torch.arange(len(x)), mask.to(x.dtype)[..., None]
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        if self.pool == "last of all":
            return self.score(x[:, -1])
        if self.pool == "last of the text":
            return self.score(x[rows, last])
        if self.pool == "mean":
            return self.score((x * by_mask).sum(1) / by_mask.sum(1))
        if self.pool == "largest":
            return self.score(x.masked_fill(by_mask == 0, -1e4).amax(1))
        if self.pool == "largest of all":
            return self.score(x.amax(1))
        if self.pool == "end token":  # the first where there is none
            return self.score(x[rows, ids.eq(2).int().argmax(1)])
        if self.pool == "kind" and kinds is not None:
            return self.score(x[rows, kinds.argmax(1)])
        if self.pool == "first":
            return self.score(x[:, 0])
        if self.pool == "smallest":
            return self.score(x[rows, x.square().sum(-1).argmin(1)])
        return self.score(x[:, 0]) + self.gate(x.mean(1))


ALL = {"query", "key", "value", "up", "act", "down"}
# Which modules may leave out masked positions: all, or keys and values only, whose states no attention sees.
POOLS = {
    "mean": ALL, "largest": ALL, "last of the text": ALL, "unmasked": set(), "gate": {"key", "value"},
    "last of all": {"key", "value"}, "largest of all": {"key", "value"}, "smallest": {"key", "value"},
    "end token": {"key", "value"},
}  # fmt: skip


def encoder(pool: str, **more: Any) -> Any:
    torch.manual_seed(0)
    model = Encoder(pool)
    adapter = inlay.attach(model, LoRA(rank=2), where=["query", "value"], modules_to_save=["score", "gate"])
    shake_deltas_only(adapter)
    return model


def shake_deltas_only(adapter: inlay.Adapter) -> None:
    """The head's copies stay as a fresh model's: the gate is closed."""
    with torch.no_grad():
        for module in adapter.modules():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)


def texts(rows: int = ROWS, tokens: int = 12) -> dict[str, Tensor]:
    """Padded at the right, without end tokens, of one kind."""
    ids = torch.randint(3, 97, (rows, tokens), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(tokens) < 4 + torch.arange(rows)[:, None] % (tokens - 4)).long()
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


@pytest.mark.parametrize("pool", POOLS)
def test_what_a_head_reads_is_found(pool: str) -> None:
    model, given = encoder(pool), texts()
    model(**given)
    (only,) = found(model)
    assert (set() if only is None else only.masked) == POOLS[pool] and (only is None or not only.first)
    with inlay.fast_paths(False):
        expected = model(**given)["logits"]
    torch.testing.assert_close(model(**given)["logits"], expected, rtol=1e-5, atol=1e-5)


def test_first_where_nothing_else_is_read() -> None:
    model = encoder("first")
    model(**texts())
    (only,) = found(model)
    assert only is not None and only.first == {"query", "up", "act", "down"} and only.masked == {"key", "value"}


def test_what_was_all_the_same_and_is_no_more_is_tried_again() -> None:
    """Kinds of tokens decide what is read; those of the first batch told nothing of it."""
    model, given = encoder("kind"), texts()
    model(**given)
    (of_one_kind,) = found(model)
    assert of_one_kind is not None and of_one_kind.first
    given["token_type_ids"] = (torch.arange(12) > torch.arange(ROWS)[:, None] % 8).long()
    short = model(**given)["logits"]
    with inlay.fast_paths(False):
        torch.testing.assert_close(short, model(**given)["logits"], rtol=1e-5, atol=1e-5)
    assert len(found(model)) == 2


def test_a_reader_that_comes_later_is_noticed() -> None:
    """An attribute that no configuration holds: a backward pass finds gradients where none may come from."""
    model, given = encoder("mean"), texts()
    model(**given)["logits"].sum().backward()
    model.pool = "last of all"
    with pytest.raises(UnsupportedError, match="read positions that were not computed"):
        model(**given)["logits"].sum().backward()


def test_numbers_that_are_none_raise_nothing() -> None:
    model, given = encoder("mean"), texts()
    model(**given)
    (model(**given)["logits"].sum() * float("nan")).backward()


def test_another_module_is_tried_again() -> None:
    model, given = attached(), batch()
    model(**given)

    class Mean(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return hidden.mean(1)

    model.bert.pooler = Mean()
    short = model(**given).logits
    with inlay.fast_paths(False):
        torch.testing.assert_close(short, model(**given).logits, rtol=1e-5, atol=1e-5)


def test_another_attention_is_tried_again(took: Took) -> None:
    model, given = attached(), batch()
    model(**given)
    before = calls._SEEN[model].trials
    model.set_attn_implementation("eager")
    model(**given)
    assert calls._SEEN[model].trials == before + 1


def test_trials_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "MOST_TRIALS", 3)
    model, given = attached(), batch()
    model(**given)
    for number in range(calls.MOST_TRIALS + 2):
        model.config.counter = number
        model(**given)
    assert calls._SEEN[model].trials == calls.MOST_TRIALS


class Mixing(LowRank):
    """Breaks the contract: what it adds to a position comes from its row's others. Nothing, while `b` is zero."""

    post_into = Delta.post_into

    def post(self, x: Tensor, y: Tensor, site: Any) -> Tensor:
        return y + self.scale * (x.mean(-2, keepdim=True) @ self.a.t() @ self.b.t())


def test_a_delta_that_mixes_positions_is_found(monkeypatch: pytest.MonkeyPatch, took: Took) -> None:
    monkeypatch.setattr("inlay.methods.lora.low_rank", Mixing)
    model: Any = ZOO["bert"].build()
    inlay.attach(model, LoRA(rank=2))
    assert any(type(d) is Mixing for d in inlay.adapters(model)["default"].modules())
    given = batch()
    results(model, given)
    (only,) = found(model)
    assert only is None or not any(path.endswith(("query", "value")) for path in only.masked | only.first)
    shake(inlay.adapters(model)["default"])
    equal(results(model, given), results(model, given, on=False))


# -- where it stands aside --------------------------------------------------------------------------


def hook_below(model: Any) -> Any:
    return model.bert.encoder.layer[0].register_forward_hook(lambda *_: None).remove


def hook_on_a_delta(model: Any) -> Any:
    return inlay.adapters(model)["default"].modules()[0].register_forward_pre_hook(lambda *_: None).remove


def hook_everywhere(model: Any) -> Any:
    return register_module_forward_hook(lambda *_: None).remove


def own_forward(model: Any) -> Any:
    layer = model.bert.encoder.layer[0].output.dense
    plain = layer.forward
    layer.forward = lambda x: plain(x)
    return lambda: delattr(layer, "forward")


def unequal_modes(model: Any) -> Any:
    model.bert.encoder.layer[0].train()
    return lambda: model.eval()


def trained_base(model: Any) -> Any:
    model.bert.embeddings.LayerNorm.weight.requires_grad_(True)
    return lambda: model.bert.embeddings.LayerNorm.weight.requires_grad_(False)


def checkpoints(model: Any) -> Any:
    model.gradient_checkpointing_enable()
    model.train()
    return lambda: (model.gradient_checkpointing_disable(), model.eval())


def merged(model: Any) -> Any:
    inlay.merge(model, "default")
    return lambda: inlay.unmerge(model)


def prompted(model: Any) -> Any:
    inlay.attach(model, inlay.PrefixTuning(length=2), name="prompt")
    return lambda: inlay.detach(model, "prompt")


def reads_a_span(model: Any) -> Any:
    inlay.attach(model, inlay.LoReFT(rank=2), name="span")
    return lambda: inlay.detach(model, "span")


def fed(model: Any) -> Any:
    inlay.attach(model, inlay.ParallelAdapter(bottleneck=4), name="beside")
    return lambda: inlay.detach(model, "beside")


ASIDE: dict[str, Callable[[Any], Callable[[], object]]] = {
    "a hook": hook_below, "a hook on a delta": hook_on_a_delta, "a hook on all modules": hook_everywhere,
    "a forward of the user's": own_forward, "a trained base": trained_base, "modes": unequal_modes,
    "checkpoints": checkpoints, "a merge": merged, "a prompt": prompted, "positions of a prompt": reads_a_span,
    "inputs of another module": fed,
}  # fmt: skip


@pytest.mark.parametrize("what", ASIDE)
def test_stands_aside_for(what: str, took: Took) -> None:
    model, given = attached(), batch()
    model(**given)
    assert took.positions > 0
    undo = ASIDE[what](model)
    try:
        for _ in range(2):
            took.positions = 0
            loss = model(**given).loss
            assert took.positions == 0, what
            if loss.requires_grad:
                loss.backward()
    finally:
        undo()
    if what not in ("a prompt", "positions of a prompt", "inputs of another module"):
        model(**given)
        assert took.positions > 0, "it does not come back"


def test_stands_aside_for_several_adapters(took: Took) -> None:
    model, given = attached(), batch()
    inlay.attach(model, LoRA(rank=2), name="other")
    with inlay.use(model, ["default", "other"] * (ROWS // 2)):
        model(**given)
    assert took.positions == 0 and not found(model)
    with inlay.use(model, ["default"] * ROWS):
        model(**given)
    assert took.positions > 0


def unusual() -> Iterator[tuple[str, dict[str, Any]]]:
    given = batch()
    mask = given["attention_mask"]
    yield "a row of padding", {**given, "attention_mask": mask.index_fill(0, torch.tensor([3]), 0)}
    yield "shares", {**given, "attention_mask": mask.float() * 0.5}
    yield "a mask of pairs", {**given, "attention_mask": mask[:, None, None].bool().expand(-1, 1, mask.shape[1], -1)}
    yield "few positions", {name: value[:2] for name, value in given.items()}
    yield "an argument of another kind", {**given, "num_items_in_batch": [ROWS]}


@pytest.mark.parametrize(("what", "given"), list(unusual()), ids=lambda v: v if isinstance(v, str) else "")
def test_stands_aside_for_calls_with(what: str, given: dict[str, Any], took: Took) -> None:
    model = attached()
    model(**given)
    assert took.positions == 0 and not found(model)


def test_stands_aside_under_transforms_and_where_switched_off(took: Took) -> None:
    model, given = attached(), batch()
    model(**given)
    before = took.positions
    values = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    torch.func.grad(lambda v: torch.func.functional_call(model, v, (), given).loss)(values)
    with inlay.fast_paths(False, "read-positions"):
        model(**given)
    assert took.positions == before


def test_nothing_to_leave_out(took: Took) -> None:
    """One masked position in a hundred costs less than gathering the rest."""
    model, given = attached("llama-classifier"), batch("llama-classifier", None) | {"use_cache": False}
    given["attention_mask"][0, -1:], given["input_ids"][0, -1:] = 0, PAD
    model(**given)
    assert took.positions == 0 and found(model) != [None]


def test_a_teacher_inside_another_model(took: Took) -> None:
    """Paths of modules are the same in both; what is asked of one is not asked of the other."""
    teacher, given = attached(), batch()
    model = attached()
    with inlay.fast_paths(False), torch.no_grad():
        expected = teacher.bert(given["input_ids"], given["attention_mask"]).last_hidden_state
    seen = []

    class Telling(type(model.classifier)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                seen.append(teacher.bert(given["input_ids"], given["attention_mask"]).last_hidden_state)
            out: Tensor = super().forward(x)
            return out

    model = ZOO["bert"].build()
    model.classifier.__class__ = Telling
    inlay.attach(model, LoRA(rank=2))
    model(**given)
    assert took.positions > 0
    torch.testing.assert_close(seen[-1], expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any, took: Took) -> None:
    model, given = attached(), batch()
    with mode():
        short = model(**given).logits.clone()
        with inlay.fast_paths(False):
            torch.testing.assert_close(short, model(**given).logits, rtol=1e-5, atol=1e-5)
    assert took.positions > 0
    model(**given).loss.backward()  # what was tried without holds with gradients, too


def test_threads_do_not_see_one_another() -> None:
    model, sides = attached(), ("right", "left", None)
    given = {side: batch(side=side) for side in sides}
    with inlay.fast_paths(False), torch.no_grad():
        expected = {side: model(**given[side]).logits for side in sides}

    def serve(side: Any) -> None:
        with torch.no_grad():
            for _ in range(5):
                torch.testing.assert_close(model(**given[side]).logits, expected[side], rtol=1e-5, atol=1e-5)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(serve, sides))


def test_an_error_leaves_nothing_behind() -> None:
    model, given = attached(), batch()
    model(**given)
    with pytest.raises(IndexError):
        model(**{**given, "input_ids": given["input_ids"] + 10**6})
    assert modules._ASKED.get() is None


# -- a trial leaves no trace ------------------------------------------------------------------------


def test_a_trial_leaves_no_trace() -> None:
    model: Any = ZOO["bert"].build()
    model.classifier = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 5))
    model.train()
    adapter = inlay.attach(model, LoRA(rank=2))
    before = copy.deepcopy(model.state_dict()), torch.get_rng_state(), adapter.digest
    given = {n: v for n, v in batch().items() if n != "labels"}
    trial.tried(model, adapter, calls._batch(model.__dict__["_inlay_host"], (), given))  # type: ignore[arg-type]
    assert torch.equal(before[1], torch.get_rng_state()) and before[2] == adapter.digest
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[0][name]), name
    assert all(p.grad is None for p in model.parameters())


def test_a_copy_shares_what_is_not_trained() -> None:
    model = attached()
    inlay.attach(model, LoRA(rank=2), name="other")
    adapter = inlay.adapters(model)["default"]
    twin = trial.twin_of(model, adapter)
    own = {id(p) for p in adapter.parameters()}
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        assert (theirs[name] is parameter) == (id(parameter) not in own), name
    assert not any(torch.equal(a, b) for a, b in zip(
        adapter.parameters(), inlay.adapters(twin)["default"].parameters(), strict=True
    ))  # fmt: skip


# -- faults that must be caught ---------------------------------------------------------------------


def one_further(chosen: Tensor) -> Index:
    return INDEX_OF(chosen.roll(1, 1))


def one_back(chosen: Tensor) -> Index:
    index = INDEX_OF(chosen)
    return Index(index.rows, index.tokens, index.needed, index.back.roll(1), index.unread)


@pytest.mark.parametrize("wrong", [one_further, one_back])
def test_a_wrong_index_is_caught(wrong: Callable[[Tensor], Index], monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = attached(), batch()
    expected = results(model, given, on=False)
    monkeypatch.setattr(Index, "of", staticmethod(wrong))
    equal(results(model, given), expected)  # a trial sees it
    assert found(model) == [None]
    monkeypatch.setattr(Index, "of", staticmethod(INDEX_OF))
    calls.forget(model)
    results(model, given)
    monkeypatch.setattr(Index, "of", staticmethod(wrong))
    with pytest.raises((AssertionError, UnsupportedError)):  # and so do the tests above, and a backward pass
        equal(results(model, given), expected)


def test_what_is_handed_over_must_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = attached(), batch()
    model(**given)
    monkeypatch.setattr(modules.Short, "finish", lambda self: None)
    plain = modules.Short.at

    def lost(self: Any, host: Any, *rest: Any) -> Any:
        return plain(self, host, *rest) if not host.path.endswith("1.output.dense") else rest[0](*rest[1], **rest[2])

    monkeypatch.setattr(modules.Short, "at", lost)
    with pytest.raises(UnsupportedError, match="read positions that were not computed"):
        model(**given).loss.backward()
    monkeypatch.undo()
    monkeypatch.setattr(modules.Short, "at", lost)
    with pytest.raises(UnsupportedError, match="in another order"):
        model(**given)


def test_taking_and_putting_back() -> None:
    chosen = torch.tensor([[True, False, True], [False, True, True]])
    index = Index.of(chosen)
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(index.take(x)[0], x[chosen]) and torch.equal(index.put(index.take(x)), x * chosen[..., None])
    torch.autograd.gradcheck(lambda t: index.take(t), x)
    torch.autograd.gradgradcheck(lambda t: index.take(t).square(), x)
    y = torch.randn(1, 4, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda t: index.put(t)[chosen], y)
    with pytest.raises(UnsupportedError, match="read positions that were not computed"):
        index.put(index.take(x)).sum().backward()
    with pytest.raises(UnsupportedError, match="read positions that were not computed"):
        index.nothing(index.take(x)).sum().backward()
