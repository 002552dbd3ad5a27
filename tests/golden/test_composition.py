"""Compositions against their definitions: the bare base with changed weights or hooks, written out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from transformers import DynamicCache

import inlay
from inlay import (
    IA3,
    LTSFT,
    MAM,
    AdaLoRA,
    Average,
    BitFit,
    DiffPruning,
    Houlsby,
    LoRA,
    LoRAPlus,
    Parallel,
    ParallelAdapter,
    Pfeiffer,
    PrefixTuning,
    PromptTuning,
    Stack,
    TopLayers,
    VeRA,
)
from inlay.core.contracts.adapter import Clock
from inlay.core.contracts.delta import Delta
from inlay.core.contracts.method import DeltaMethod, Method, Recipe
from inlay.core.errors import ConfigError, SelectionError, UnsupportedError
from inlay.core.model.site import Site
from inlay.methods import method_named
from inlay.testing.models import ZOO
from inlay.train.hyper import build_method
from tests.golden.hand import agree, close, inputs, numbers, shake, with_weights, zoo_model

DOWN = "model.layers.{}.mlp.down_proj"


@dataclass(frozen=True, kw_only=True)
class Turn(DeltaMethod):
    """Any square matrix on what enters the layer: two of them do not commute."""

    name: ClassVar[str] = "turn"
    paper: ClassVar[str] = "none"
    family: ClassVar[str] = "test"
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-4)
    default_where: ClassVar[tuple[str, ...]] = ("down",)

    def build(self, site: Site) -> Delta:
        return Turned(site)

    @classmethod
    def examples(cls) -> list[Turn]:
        return [cls()]


class Turned(Delta):
    def __init__(self, site: Site) -> None:
        super().__init__()
        self.matrix = nn.Parameter(site.empty(site.in_features, site.in_features))

    def initialise(self, site: Site) -> None:
        nn.init.eye_(self.matrix)

    def pre(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)

    def weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight @ self.matrix, bias


def update(own: dict[str, Tensor], site: str, member: int, scale: float) -> Tensor:
    """s B A of one member's LoRA."""
    return scale * own[f"delta/{member}/{site}/b"] @ own[f"delta/{member}/{site}/a"]


Change = Callable[[dict[str, Tensor], str, Tensor], Tensor]
DOWNWARDS: list[tuple[Method, Change]] = [
    (  # each wraps the former's layer: (W diag(s) + ΔW) x
        Stack(IA3(), LoRA(rank=2, alpha=6.0)),
        lambda own, site, w: w * own[f"delta/0/{site}/scale"] + update(own, site, 1, 3.0),
    ),
    (
        Stack(LoRA(rank=2, alpha=6.0), IA3()),
        lambda own, site, w: (w + update(own, site, 0, 3.0)) * own[f"delta/1/{site}/scale"],
    ),
    (
        Stack(Turn(), Turn()),
        lambda own, site, w: w @ own[f"delta/0/{site}/matrix"] @ own[f"delta/1/{site}/matrix"],
    ),
    (
        Parallel(Turn(), IA3()),
        lambda own, site, w: w @ own[f"delta/0/{site}/matrix"] + w * own[f"delta/1/{site}/scale"] - w,
    ),
    (
        Average({Turn(): 0.25, IA3(): -0.5}),
        lambda own, site, w: (
            1.25 * w + 0.25 * w @ own[f"delta/0/{site}/matrix"] - 0.5 * w * own[f"delta/1/{site}/scale"]
        ),
    ),
    (
        Average({LoRA(rank=2, alpha=6.0): 0.3, LoRA(rank=4, alpha=4.0): 0.7}),
        lambda own, site, w: w + 0.3 * update(own, site, 0, 3.0) + 0.7 * update(own, site, 1, 1.0),
    ),
    (  # a fork inside a chain: what stands beside one another reads what the stack's first left
        Stack(Turn(), Parallel(LoRA(rank=2, alpha=6.0), LoRA(rank=2, alpha=2.0))),
        lambda own, site, w: (
            w @ own[f"delta/0/{site}/matrix"]
            + 3.0 * own[f"delta/1/0/{site}/b"] @ own[f"delta/1/0/{site}/a"]
            + own[f"delta/1/1/{site}/b"] @ own[f"delta/1/1/{site}/a"]
        ),
    ),
    (  # a chain inside a fork
        Average([(Stack(Turn(), Turn()), 0.5), (Turn(), 2.0)]),
        lambda own, site, w: (
            w * -1.5
            + 0.5 * w @ own[f"delta/0/0/{site}/matrix"] @ own[f"delta/0/1/{site}/matrix"]
            + 2.0 * w @ own[f"delta/1/{site}/matrix"]
        ),
    ),
]


@pytest.mark.parametrize("method, change", DOWNWARDS, ids=lambda value: getattr(value, "name", ""))
def test_weights(method: Method, change: Change) -> None:
    """Output, every gradient and the merged weights."""
    batch = inputs("llama")
    model = ZOO["llama"].build()
    adapter = shake(inlay.attach(model, method, where=["down_proj"]), 0.2)
    leaves = numbers(adapter)
    bare: Any = ZOO["llama"].build()

    def changed(name: str, value: Tensor) -> Tensor:
        site = name.removesuffix(".weight")
        return change(leaves, site, value) if site.endswith("down_proj") else value

    expected = with_weights(bare, changed, batch).logits
    actual = model(**batch).logits
    agree(adapter, actual, expected, leaves, tolerance=2e-5)
    inlay.merge(model, "default")
    close(model(**batch).logits, expected, 2e-5)


def bottleneck(own: dict[str, Tensor], key: str, x: Tensor, function: Any, scale: float = 1.0) -> Tensor:
    inner = function(x @ own[f"delta/{key}/down"].t() + own[f"delta/{key}/down_bias"])
    return scale * (inner @ own[f"delta/{key}/up"].t() + own[f"delta/{key}/up_bias"])


@pytest.mark.parametrize("kind", ["stack", "in-parallel", "average"])
def test_bottlenecks_at_one_place(kind: str) -> None:
    """Houlsby and Pfeiffer share the feed-forward's output; Houlsby is at attention, too."""
    members = (Houlsby(bottleneck=4), Pfeiffer(reduction=4))
    method = {"stack": Stack(*members), "in-parallel": Parallel(*members)}.get(kind) or Average(
        zip(members, (0.5, 2.0), strict=True)
    )
    first, second = (0.5, 2.0) if kind == "average" else (1.0, 1.0)
    batch = inputs("llama")
    model = ZOO["llama"].build()
    adapter = shake(inlay.attach(model, method))
    leaves = numbers(adapter)
    bare: Any = ZOO["llama"].build()
    for layer in range(2):
        for path, both in ((f"model.layers.{layer}.self_attn.o_proj", False), (DOWN.format(layer), True)):

            def hook(_: Any, __: Any, y: Tensor, path: str = path, both: bool = both) -> Tensor:
                left = y + first * bottleneck(leaves, f"0/{path}", y, F.gelu)
                if not both:
                    return left
                return left + second * bottleneck(leaves, f"1/{path}", left if kind == "stack" else y, F.relu)

            bare.get_submodule(path).register_forward_hook(hook)
    agree(adapter, model(**batch).logits, bare(**batch).logits, leaves)


def test_a_part_beside_the_whole() -> None:
    """GPT-2's fused matrix: one member at the query's rows, one at all of them; differences add."""
    batch = inputs("gpt2")
    model = ZOO["gpt2"].build()
    site = "transformer.h.{}.attn.c_attn"
    method = Stack(LoRA(rank=2, alpha=2.0), LoRA(rank=3, alpha=6.0))
    adapter = shake(inlay.attach(model, method, where=["c_attn", "c_attn:query"]))
    leaves = numbers(adapter)
    bare: Any = ZOO["gpt2"].build()

    def changed(name: str, value: Tensor) -> Tensor:
        if not name.endswith("c_attn.weight"):
            return value
        at = name.removesuffix(".weight")
        whole = update(leaves, at, 0, 1.0) + update(leaves, at, 1, 2.0)
        query = update(leaves, f"{at}:query", 0, 1.0) + update(leaves, f"{at}:query", 1, 2.0)
        return value + whole.t() + F.pad(query.t(), (0, 64))  # kernels are (in, out); the query's come first

    assert f"delta/1/{site.format(0)}:query/a" in leaves
    agree(adapter, model(**batch).logits, with_weights(bare, changed, batch).logits, leaves)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_prefixes_stand_behind_one_another(name: str) -> None:
    batch = inputs(name, ragged=True)
    model, long = zoo_model(name), zoo_model(name)
    parts = (PrefixTuning(length=3, projection=None), PrefixTuning(length=2, projection=None))
    adapter = shake(inlay.attach(model, Parallel(*parts)))
    whole = inlay.attach(long, PrefixTuning(length=5, projection=None))
    own = adapter.tensors()
    with torch.no_grad():
        for key, tensor in whole.tensors().items():
            tensor.copy_(torch.cat([own[key.replace("prompt/", f"prompt/{i}/", 1)] for i in (0, 1)]))
    close(model(**batch).logits, long(**batch).logits)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_virtual_tokens_stand_behind_one_another(name: str) -> None:
    batch = inputs(name, ragged=True)
    model, long = zoo_model(name), zoo_model(name)
    parts = (PromptTuning(length=2, init="random"), PromptTuning(length=3, init="random"))
    own = shake(inlay.attach(model, Stack(*parts))).tensors()
    whole = inlay.attach(long, PromptTuning(length=5, init="random")).tensors()
    with torch.no_grad():
        for key, tensor in whole.items():
            tensor.copy_(torch.cat([own[key.replace("prompt/", f"prompt/{i}/", 1)] for i in (0, 1)]))
    close(model(**batch).logits, long(**batch).logits)


@pytest.mark.parametrize("order", [False, True])
def test_virtual_tokens_see_a_prefix(order: bool) -> None:
    """A cache that holds the prefix, and then the tokens and the text as one sequence."""
    batch = inputs("llama", ragged=True)
    model = ZOO["llama"].build()
    members: list[Method] = [PrefixTuning(length=3, projection=None), PromptTuning(length=2, init="random")]
    adapter = shake(inlay.attach(model, Stack(*(reversed(members) if order else members))))
    leaves = numbers(adapter)
    table = next(t for n, t in leaves.items() if n.endswith("table")).reshape(3, 2, 2, 2, 8)
    tokens = next(t for n, t in leaves.items() if not n.endswith("table"))
    bare: Any = ZOO["llama"].build()
    rows, length = batch["input_ids"].shape
    cache = DynamicCache()
    for layer in range(2):
        pair = (table[:, layer, i].transpose(0, 1).expand(rows, -1, -1, -1) for i in (0, 1))
        cache.update(*pair, layer)
    embeds = torch.cat([tokens.expand(rows, -1, -1), bare.get_input_embeddings()(batch["input_ids"])], 1)
    mask = torch.cat([torch.ones((rows, 5), dtype=torch.long), batch["attention_mask"]], 1)
    positions = torch.arange(3, 5 + length).expand(rows, -1)
    out = bare(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, 2:]
    real = batch["attention_mask"].bool()
    agree(adapter, model(**batch).logits[real], out[real], leaves)


def test_differences_add() -> None:
    """The last layer belongs to two members, its biases to a third that acts on activations."""
    batch = inputs("bert")
    model, bare = ZOO["bert"].build(), ZOO["bert"].build()
    method = Average([(TopLayers(top=2), 0.5), (TopLayers(top=1), 2.0), (BitFit(), -1.5)])
    adapter = shake(inlay.attach(model, method), 0.1)
    leaves = numbers(adapter)

    def changed(name: str, value: Tensor) -> Tensor:
        for member, weight in ((0, 0.5), (1, 2.0)):
            difference = leaves.get(f"difference/{member}/{name}/difference")
            value = value if difference is None else value + weight * difference
        offset = leaves.get(f"delta/2/{name.removesuffix('.bias')}/offset") if name.endswith(".bias") else None
        return value if offset is None else value - 1.5 * offset

    assert any(n.replace("/0/", "/1/", 1) in leaves for n in leaves if n.startswith("difference/0/"))
    agree(adapter, model(**batch).logits, with_weights(bare, changed, batch).logits, leaves)
    expected = model(**batch).logits
    inlay.merge(model, "default")
    close(model(**batch).logits, expected)


@dataclass(frozen=True, kw_only=True)
class Ticking(DeltaMethod):
    """Counts the steps in its own pieces and needs to know how many there will be."""

    name: ClassVar[str] = "ticking"
    paper: ClassVar[str] = "none"
    family: ClassVar[str] = "test"
    recipe: ClassVar[Recipe] = Recipe(learning_rate=1e-5, warmup=0.5)
    default_where: ClassVar[tuple[str, ...]] = ("down",)

    total_steps: int | None = None

    def build(self, site: Site) -> Delta:
        return Turned(site)

    def rate_of(self, name: str) -> float:
        assert name.startswith("delta/model.") and name.endswith("/matrix"), name
        return 7.0

    def clock(self, adapter: inlay.Adapter) -> Clock:
        return Ticks(adapter)

    @classmethod
    def examples(cls) -> list[Ticking]:
        return [cls()]


class Ticks(Clock):
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert isinstance(self.adapter.method, Ticking)
        assert [p.key for p in self.adapter.pieces] == [DOWN.format(0), DOWN.format(1)]
        for parameter in self.adapter.parameters():
            with torch.no_grad():
                parameter.fill_(float(self.adapter.method.total_steps or 0))


def test_clocks_rates_and_steps_reach_the_members() -> None:
    model = ZOO["llama"].build()
    adapter = inlay.attach(model, Stack(LoRA(rank=2), Parallel(Ticking(), LoRAPlus(rank=2))), where=None)
    assert adapter.method.recipe == Ticking.recipe, "that of the smallest learning rate"
    groups = adapter.parameter_groups(1e-3)
    rates = {id(p): g["lr"] / 1e-3 for g in groups for p in g["params"]}
    plus = LoRAPlus(rank=2)
    for name, parameter in adapter._named(keep_vars=True).items():
        kind, _, rest = name.partition("/")
        own = {"0/": 1.0, "1/0/": 7.0}.get(next(p for p in ("0/", "1/0/", "1/1/") if rest.startswith(p)))
        expected = plus.rate_of(f"{kind}/{rest.removeprefix('1/1/')}") if own is None else own
        assert rates[id(parameter)] == pytest.approx(expected), name
    assert len(set(rates.values())) == 3
    adapter.method = adapter.method.for_steps(5)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
    model(**inputs("llama")).logits.sum().backward()
    optimizer.step()
    for name, tensor in adapter.tensors().items():
        assert name.startswith("delta/1/0/") == bool((tensor == 5.0).all()), name


def test_a_schedule_inside_is_the_schedule_alone(tmp_path: Path) -> None:
    """AdaLoRA prunes its ranks while it is trained and stores the ranks that are left."""
    method = AdaLoRA(rank=3, target_rank=2, warmup_steps=0, final_steps=1, total_steps=3)
    outputs = []
    for number, choice in enumerate((method, Stack(method))):
        model = ZOO["llama"].build()
        torch.manual_seed(0)
        adapter = inlay.attach(model, choice, where="attention")
        optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-2))
        for seed in range(4):
            model(**ZOO["llama"].batch(2, seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        inlay.save(model, "default", tmp_path / str(number))
        fresh = ZOO["llama"].build()
        loaded = inlay.load(fresh, tmp_path / str(number))
        assert sum(t.numel() for t in loaded.tensors().values()) < sum(t.numel() for t in adapter.tensors().values())
        outputs += [model(**inputs("llama")).logits, fresh(**inputs("llama")).logits]
    assert torch.equal(outputs[2], outputs[0]) and torch.equal(outputs[3], outputs[1])
    close(outputs[1], outputs[0])


def test_shared_values_are_told_apart(tmp_path: Path) -> None:
    model = ZOO["llama"].build()
    adapter = shake(inlay.attach(model, Stack(VeRA(rank=2), VeRA(rank=3))))
    shared = [n for n in adapter.tensors() if n.startswith("shared/")]
    assert {n.split("/")[1] for n in shared} == {"0", "1"}
    alone = {}
    for rank in (2, 3):
        other = ZOO["llama"].build()
        alone[rank] = inlay.attach(other, VeRA(rank=rank)).count
    assert adapter.count == sum(alone.values())
    batch = inputs("llama")
    expected = model(**batch).logits
    inlay.save(model, "default", tmp_path)
    fresh = ZOO["llama"].build()
    assert inlay.load(fresh, tmp_path).digest == adapter.digest
    assert torch.equal(fresh(**batch).logits, expected)


def test_schedules_of_differences_are_told_apart(tmp_path: Path) -> None:
    """Each sparse method counts its own steps, also in an adapter that is stored before its first phase is over."""
    steps = {"total_steps": 6}
    model = ZOO["llama"].build()
    adapter = inlay.attach(model, Parallel(LTSFT(share=0.1, **steps), DiffPruning(share=0.1, **steps)))
    optimizer = torch.optim.AdamW(adapter.parameter_groups(1e-3))
    for seed in range(2):
        model(**ZOO["llama"].batch(2, seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    counted = {name: int(t) for name, t in adapter.tensors().items() if name.startswith("shared/")}
    assert counted == {"shared/0/schedule/done": 2, "shared/1/schedule/done": 2}
    inlay.save(model, "default", tmp_path)
    assert inlay.load(ZOO["llama"].build(), tmp_path).digest == adapter.digest


NESTED = Parallel(
    Stack(IA3(), LoRA(rank=2, rank_pattern={"c_attn:query": 3})),
    Average([(Houlsby(bottleneck=4), 0.5), (Houlsby(bottleneck=4), 0.25)]),
    PrefixTuning(length=2, projection=None),
)


def test_nested_compositions_are_stored(tmp_path: Path) -> None:
    batch = inputs("gpt2")
    model = ZOO["gpt2"].build()
    adapter = shake(inlay.attach(model, NESTED))
    expected = model(**batch).logits
    inlay.save(model, "default", tmp_path)
    fresh = ZOO["gpt2"].build()
    loaded = inlay.load(fresh, tmp_path)
    assert (loaded.method, loaded.digest) == (NESTED, adapter.digest)
    assert torch.equal(fresh(**batch).logits, expected)


def test_configuration() -> None:
    plain = NESTED.to_dict()
    assert plain["methods"][0]["methods"][1]["rank"] == 2 and plain["methods"][1]["weights"] == (0.5, 0.25)
    again = json.loads(json.dumps(plain))
    assert method_named("in-parallel").from_dict(again) == NESTED and hash(NESTED) == hash(replaced(again))
    settings = yaml.safe_load(yaml.safe_dump({k: v for k, v in again.items() if k != "method"}))
    assert build_method("in-parallel", settings) == NESTED
    settings["methods"][0]["methods"][1]["rnk"] = 4
    with pytest.raises(ConfigError, match=r"'rnk'.*'rank'"):
        build_method("in-parallel", settings)
    with pytest.raises(ConfigError, match=r"'rnk'.*'rank'"):
        method_named("in-parallel").from_dict({"methods": [{"method": "lora", "rnk": 4}]})
    with pytest.raises(ConfigError, match="lorra"):
        build_method("stack", {"methods": [{"method": "lorra"}]})
    with pytest.raises(ConfigError, match="rank='x'"):
        build_method("stack", {"methods": [{"method": "lora", "rank": "x"}]})
    with pytest.raises(ConfigError, match="1 methods but 2 weights"):
        build_method("average", {"methods": [{"method": "lora"}], "weights": [1, 2]})
    with pytest.raises(ConfigError, match="not methods"):
        Stack(LoRA)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="weights"):
        Average({LoRA(): 0.0})


def replaced(values: dict[str, Any]) -> Method:
    return method_named("in-parallel").from_dict(values)


def test_refusals_say_what_to_do() -> None:
    model = ZOO["llama"].build()
    for method, where, error, words in (
        (Parallel(IA3(), LoRA()), ["down_proj"], UnsupportedError, "Stack"),
        (Average({Stack(IA3(), LoRA()): 0.5}), ["down_proj"], UnsupportedError, "Stack"),
        (Average({PrefixTuning(length=2): 0.5}), None, UnsupportedError, "Parallel"),
        (Stack(LoRA(), IA3()), lambda path, _: path.endswith("q_proj"), SelectionError, "predicate"),
        (Parallel(PrefixTuning(length=2), PromptTuning(length=2)), ["q_proj"], SelectionError, "where"),
    ):
        with pytest.raises(error, match=words):
            inlay.attach(model, method, where=where)  # type: ignore[arg-type]
    assert not inlay.adapters(model)


def test_mam_is_a_prefix_beside_a_parallel_adapter() -> None:
    batch = inputs("llama")
    model, other = ZOO["llama"].build(), ZOO["llama"].build()
    torch.manual_seed(1)
    one = inlay.attach(model, MAM(length=3, bottleneck=4, scale=2.0, projection=6))
    torch.manual_seed(1)
    parts = (PrefixTuning(length=3, projection=6), ParallelAdapter(bottleneck=4, scale=2.0))
    two = inlay.attach(other, Parallel(*parts))
    assert one.digest == two.digest
    shake(one), shake(two)
    assert torch.equal(model(**batch).logits, other(**batch).logits)


def test_mam_has_the_published_share_of_bart_large() -> None:
    """Table 2 of the paper: 6.7 % of BART-large, counted without the prefix's MLP, which is not kept."""
    from transformers import BartConfig, BartForConditionalGeneration

    with torch.device("meta"):
        model = BartForConditionalGeneration(BartConfig())
    total = sum(p.numel() for p in model.parameters())
    count = inlay.attach(model, replace(MAM(), projection=None)).count
    assert count == 24 * (2 * 1024 * 512 + 512 + 1024) + 36 * 2 * 30 * 1024
    assert f"{count / total:.1%}" == "6.7%"
