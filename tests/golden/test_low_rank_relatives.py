"""LoRA+, LoRA-FA, PiSSA, OLoRA, EVA and DyLoRA against their papers' equations, written here a second time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay import EVA, DyLoRA, LoRA, LoRAFA, LoRAPlus, OLoRA, PiSSA
from inlay.core.contracts.method import Method
from inlay.core.errors import ConfigError
from inlay.testing.models import ZOO
from tests.golden.hand import close, inputs, shake, with_weights, zoo_model
from tests.golden.places import TRANSPOSED, places, rows_of

Numbers = dict[str, Tensor]


def attached(name: str, method: Method, **where: Any) -> tuple[Any, inlay.Adapter]:
    torch.manual_seed(0)
    model = zoo_model(name)
    return model, inlay.attach(model, method, **where)


def sites(found: dict[str, Tensor]) -> dict[str, Numbers]:
    """Site → its numbers."""
    by_site: dict[str, Numbers] = {}
    for name, value in found.items():
        kind, site, number = name.split("/")
        if kind == "delta":
            by_site.setdefault(site, {})[number] = value
    return by_site


def weight_of(model: nn.Module, name: str, site: str) -> Tensor:
    """The frozen weight of a site as (out, in)."""
    weight = model.get_submodule(site.partition(":")[0])._parameters["weight"]
    assert weight is not None
    weight = weight.detach().t() if name in TRANSPOSED else weight.detach()
    rows = rows_of(name, site)
    return weight if rows is None else weight[rows]


def agrees(name: str, model: Any, adapter: inlay.Adapter, update: Callable[[Numbers], Tensor]) -> None:
    """Outputs and gradients are those of a base whose weights are W + update."""
    batch = inputs(name, ragged=True)
    parameters = {id(p) for p in adapter.parameters()}
    by_address = {p.data_ptr(): p for p in adapter.parameters()}
    leaves = {n: t.detach().clone().requires_grad_() for n, t in adapter.tensors().items() if t.is_floating_point()}
    bare = zoo_model(name)
    values = {n: p.detach() for n, p in bare.named_parameters()}
    for site, own in sites(leaves).items():
        path = site.partition(":")[0] + ".weight"
        weight = values[path].t() if name in TRANSPOSED else values[path]
        rows = rows_of(name, site)
        at = torch.arange(weight.shape[0]) if rows is None else rows
        weight = weight.index_add(0, at, update(own))
        values[path] = weight.t() if name in TRANSPOSED else weight
    expected = with_weights(bare, lambda n, _: values[n], batch).logits
    actual = model(**batch).logits
    close(actual, expected, 2e-5)
    weights = torch.randn(actual.shape, generator=torch.Generator().manual_seed(11))
    (actual * weights).sum().backward()
    (expected * weights).sum().backward()
    trained = 0
    for stored, tensor in adapter.tensors().items():
        parameter = by_address.get(tensor.data_ptr())
        if parameter is None or id(parameter) not in parameters:
            continue
        trained += 1
        wanted = leaves[stored].grad
        assert parameter.grad is not None and wanted is not None, stored
        close(parameter.grad, wanted, 2e-4)
    assert trained == len(parameters)


# -- the equations ------------------------------------------------------------------------------------------

ARCHITECTURES = ["llama", "gpt2", "bert", "t5"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_plus_computes_what_lora_computes(name: str) -> None:
    model, adapter = attached(name, LoRAPlus(rank=3, alpha=5.0))
    assert set(sites(adapter.tensors())) == set(places(name, "query", "value"))
    agrees(name, model, shake(adapter), lambda own: 5.0 / 3 * own["b"] @ own["a"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_lora_fa_trains_b_alone(name: str) -> None:
    model, adapter = attached(name, LoRAFA(rank=3, alpha=5.0), where=["query", "value"])
    assert {n.rpartition("/")[2] for n in adapter.tensors()} == {"a", "b"}
    assert adapter.count == sum(own["b"].numel() for own in sites(adapter.tensors()).values())
    agrees(name, model, shake(adapter), lambda own: 5.0 / 3 * own["b"] @ own["a"])


OFFSETS: list[Method] = [PiSSA(rank=3), PiSSA(rank=3, alpha=7.0), OLoRA(rank=3, alpha=5.0)]


def scale_of(method: Any) -> float:
    return 1.0 if method.alpha is None else method.alpha / method.rank


@pytest.mark.parametrize("method", OFFSETS, ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pissa_and_olora_train_beside_the_rest_of_the_weight(name: str, method: Method) -> None:
    model, adapter = attached(name, method, where=["query", "value"])

    def update(own: Numbers) -> Tensor:
        return scale_of(method) * (own["b"] @ own["a"] - own["b0"] @ own["a0"])

    agrees(name, model, shake(adapter), update)


@pytest.mark.parametrize("method", [*OFFSETS, PiSSA(rank=4, niter=8), EVA(rank=2), LoRAFA(), LoRAPlus(), DyLoRA()])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_fresh_one_and_none_at_all_are_the_base_bit_for_bit(name: str, method: Method) -> None:
    batch = inputs(name, ragged=True)
    model = zoo_model(name)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        base = model(**batch).logits
        torch.manual_seed(0)
        data = [ZOO[name].batch(3, seed) for seed in range(2)] if method.needs_data else None
        adapter = inlay.attach(model, method, data=data)
        assert torch.equal(model(**batch).logits, base)
        shake(adapter)
        assert not torch.equal(model(**batch).logits, base)
        with inlay.use(model, None):
            assert torch.equal(model(**batch).logits, base)
    for n, p in model.named_parameters():
        assert n not in before or torch.equal(p, before[n]), n


@pytest.mark.parametrize("method", OFFSETS, ids=str)
def test_the_offset_merges_exactly_and_survives_a_file(method: Method, tmp_path: Any) -> None:
    batch = inputs("llama")
    model, adapter = attached("llama", method)
    shake(adapter)
    fresh = ZOO["llama"].build()
    inlay.save(model, "default", tmp_path)
    loaded = inlay.load(fresh, tmp_path)
    assert loaded.count == adapter.count
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(fresh(**batch).logits, expected)
        inlay.merge(model, "default")
        close(model(**batch).logits, expected)


# -- initialisation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 1.0, 9.0])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_pissa_starts_as_the_best_part_of_the_weight(name: str, alpha: float | None) -> None:
    model, adapter = attached(name, PiSSA(rank=3, alpha=alpha), where=["query", "down"])
    scale = 1.0 if alpha is None else alpha / 3
    for site, own in sites(adapter.tensors()).items():
        weight = weight_of(model, name, site)
        start = scale * own["b"] @ own["a"]
        assert torch.linalg.matrix_rank(start, rtol=1e-4) == 3
        values = torch.linalg.svdvals(weight.double())
        close(torch.linalg.matrix_norm(weight - start).double(), values[3:].square().sum().sqrt())  # Eckart–Young
        close(own["a"] @ own["a"].t(), own["b"].t() @ own["b"])  # the root of each singular value goes to each side
        close(own["a"] @ own["a"].t(), torch.diag(values[:3] / scale).float())
        assert torch.equal(own["a"], own["a0"]) and torch.equal(own["b"], own["b0"])


def test_pissa_fast_decomposition_is_close_to_the_exact_one() -> None:
    _, exact = attached("llama", PiSSA(rank=3))
    _, fast = attached("llama", PiSSA(rank=3, niter=16))
    for site, own in sites(exact.tensors()).items():
        other = sites(fast.tensors())[site]
        assert not torch.equal(own["a"], other["a"])
        close(other["b"] @ other["a"], own["b"] @ own["a"], 1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_olora_starts_on_an_orthonormal_basis(name: str) -> None:
    model, adapter = attached(name, OLoRA(rank=3, alpha=5.0))
    for site, own in sites(adapter.tensors()).items():
        weight = weight_of(model, name, site)
        close(own["b"].t() @ own["b"], torch.eye(3))
        assert torch.equal(own["a"], own["a"].triu())
        close(own["b"] @ own["a"][:, :3], weight[:, :3])  # the first r columns are met exactly
        close(own["a"], own["b"].t() @ weight)
        assert torch.equal(own["a"], own["a0"]) and torch.equal(own["b"], own["b0"])


@pytest.mark.parametrize("method", [PiSSA(rank=33), OLoRA(rank=33)], ids=lambda m: m.name)
def test_a_rank_that_the_weight_does_not_have_is_refused(method: Method) -> None:
    model = ZOO["llama"].build()
    with pytest.raises(ConfigError, match="lower the rank"):
        inlay.attach(model, method)
    assert inlay.adapters(model) == {}


# -- LoRA+ --------------------------------------------------------------------------------------------------


def test_lora_plus_moves_b_sixteen_times_as_fast() -> None:
    """With plain gradient descent a step is rate × gradient, whatever the gradient."""
    model, adapter = attached("llama", LoRAPlus(rank=2))
    shake(adapter)
    before = {n: t.clone() for n, t in adapter.tensors().items()}
    model(**ZOO["llama"].batch(3, 0)).loss.backward()
    slopes = {p.data_ptr(): p.grad.clone() for p in adapter.parameters() if p.grad is not None}
    torch.optim.SGD(adapter.parameter_groups(1e-3)).step()
    for name, tensor in adapter.tensors().items():
        rate = 1.6e-2 if name.endswith("/b") else 1e-3
        close(tensor, before[name] - rate * slopes[tensor.data_ptr()], 1e-7)


def loop(model: Any, optimizer: torch.optim.Optimizer, steps: int = 6) -> list[float]:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 2))
    losses = []
    for _ in range(steps):
        loss = model(**ZOO["llama"].batch(4, 0)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


def test_lora_plus_in_a_plain_loop_with_a_schedule() -> None:
    model, adapter = attached("llama", LoRAPlus(rank=2))
    losses = loop(model, torch.optim.AdamW(adapter.parameter_groups(1e-3)))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("wrong", ["one group", "another ratio"])
def test_lora_plus_refuses_to_be_plain_lora(wrong: str) -> None:
    model, adapter = attached("llama", LoRAPlus(rank=2))
    groups: Any = adapter.parameters()
    if wrong == "another ratio":
        groups = attached("llama", LoRAPlus(rank=2, ratio=4.0))[1].parameter_groups(1e-3)
        a, b = adapter.parameter_groups(1e-3)
        groups = [a, {**b, "lr": 4e-3}]
    before = adapter.digest
    with pytest.raises(ConfigError, match=r"parameter_groups"):
        loop(model, torch.optim.AdamW(groups, lr=1e-3), steps=3)
    assert wrong == "another ratio" or adapter.digest == before  # refused before anything moved
    loop(model, torch.optim.AdamW(adapter.parameter_groups(1e-3)))


def test_lora_plus_leaves_other_optimizers_alone() -> None:
    """Steps of another adapter, and a B that the user trains by itself."""
    model, adapter = attached("llama", LoRAPlus(rank=2))
    other = inlay.attach(model, LoRA(rank=2), name="other")
    loop(model, torch.optim.AdamW(other.parameters(), lr=1e-3), steps=1)
    with inlay.use(model, "default"):
        loop(model, torch.optim.AdamW(adapter.parameter_groups(1e-3)[1:]), steps=1)


# -- LoRA-FA ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corrected", [True, False])
def test_lora_fa_takes_the_step_closest_to_full_fine_tuning(corrected: bool) -> None:
    """The corrected change of s B A is the projection of the whole weight's gradient onto A's row space."""
    model, adapter = attached("llama", LoRAFA(rank=3, alpha=5.0, corrected=corrected), where=["query"])
    shake(adapter)
    batch = ZOO["llama"].batch(3, 0)
    whole = ZOO["llama"].build()
    stored = sites(adapter.tensors())
    with torch.no_grad():
        for site, own in stored.items():
            whole.get_submodule(site).weight.add_(5.0 / 3 * own["b"] @ own["a"])  # type: ignore[operator, union-attr]
    whole(**batch).loss.backward()
    before = {site: own["b"].clone() for site, own in stored.items()}
    frozen = {site: own["a"].clone() for site, own in stored.items()}
    model(**batch).loss.backward()
    torch.optim.SGD(adapter.parameters(), lr=1.0).step()
    for site, own in sites(adapter.tensors()).items():
        a, full = own["a"], whole.get_submodule(site).weight.grad
        assert isinstance(full, Tensor)
        moved = 5.0 / 3 * (own["b"] - before[site]) @ a
        projected = full @ a.t() @ torch.linalg.inv(a @ a.t()) @ a
        plain = (5.0 / 3) ** 2 * full @ a.t() @ a
        close(moved, -(projected if corrected else plain), 1e-5)
        assert float((projected - plain).abs().max()) > 1e-3
        assert torch.equal(a, frozen[site])


def test_lora_fa_keeps_no_full_input_for_the_backward_pass() -> None:
    kept: dict[str, set[int]] = {}
    for method in (LoRA(rank=2), LoRAFA(rank=2)):
        model, _ = attached("sequential", method, where=lambda n, m: type(m) is nn.Linear)
        linear = next(m for m in model.modules() if isinstance(m, nn.Linear))
        saved: list[int] = []
        x = torch.randn(7, linear.in_features)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):  # type: ignore[misc]
            linear(x)
        kept[method.name] = set(saved)
    assert 7 * linear.in_features in kept["lora"]
    assert 7 * linear.in_features not in kept["lora-fa"] and 7 * 2 in kept["lora-fa"]


# -- EVA ----------------------------------------------------------------------------------------------------


def activations(name: str, data: list[dict[str, Tensor]], paths: list[str], *, labelled: bool) -> dict[str, Tensor]:
    """Site → everything that entered it, (positions, in), looked-at positions only."""
    model: Any = zoo_model(name)
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    for batch in data:
        mask = batch["attention_mask"].bool()
        if labelled:
            mask = mask & (batch["labels"] != -100)
        hooks = [
            model.get_submodule(p).register_forward_hook(lambda _m, x, _y, p=p, mask=mask: seen[p].append(x[0][mask]))
            for p in paths
        ]
        with torch.no_grad():
            model(**batch)
        for hook in hooks:
            hook.remove()
    return {path: torch.cat(parts) for path, parts in seen.items()}


def of_llama(rank: int) -> tuple[list[str], list[dict[str, Tensor]]]:
    paths = [f"model.layers.{i}.{p}" for i in (0, 1) for p in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")]
    data = [ZOO["llama"].batch(4, seed, ragged=True) for seed in range(4)]
    for batch in data:
        batch["labels"][:, :3] = -100
    return paths, data


@pytest.mark.parametrize("labelled", [True, False])
def test_eva_spans_the_inputs_and_shares_the_ranks_out(labelled: bool) -> None:
    """With room for every component the incremental decomposition is the one of all activations together."""
    paths, data = of_llama(4)
    model = ZOO["llama"].build()
    method = EVA(rank=4, rho=16.0, tau=1.0, labelled=labelled)
    adapter = inlay.attach(model, method, where=paths, data=data)
    ratios: list[tuple[float, str]] = []
    axes: dict[str, Tensor] = {}
    for path, x in activations("llama", data, paths, labelled=labelled).items():
        _, s, axes[path] = torch.linalg.svd((x - x.mean(0)).double(), full_matrices=False)
        ratios += [(float(r), path) for r in s.square() / s.square().sum()]
    best = [path for _, path in sorted(ratios, reverse=True)[: 4 * len(paths)]]
    found = {site: own["a"] for site, own in sites(adapter.tensors()).items()}
    for path in paths:
        if path.endswith(("q_proj", "k_proj")):
            continue
        assert len(found[path]) == best.count(path), path
    assert sum(map(len, found.values())) == 4 * len(paths)
    # Query and key see the same: of equal shares either may come first, so at most one more for one of them.
    for i in (0, 1):
        both = [f"model.layers.{i}.self_attn.{n}_proj" for n in "qk"]
        assert abs(len(found[both[0]]) - len(found[both[1]])) <= 1
        assert abs(sum(len(found[p]) for p in both) - sum(best.count(p) for p in both)) == 0
    for path, a in found.items():
        close((a.double() @ axes[path][: len(a)].t()).abs(), torch.eye(len(a)).double(), 1e-3)
        assert float(sites(adapter.tensors())[path]["b"].abs().max()) == 0
    assert len({len(a) for a in found.values()}) > 1, "the ranks were not moved"
    assert dict(adapter.method.rank_pattern) == {p: len(a) for p, a in found.items()}  # type: ignore[attr-defined]


def test_eva_with_little_room_still_finds_the_leading_ones() -> None:
    paths, data = of_llama(2)
    model = ZOO["llama"].build()
    adapter = inlay.attach(model, EVA(rank=2, rho=1.0, tau=1.0), where=paths, data=data)
    seen = activations("llama", data, paths, labelled=True)
    for path, own in sites(adapter.tensors()).items():
        x = seen[path] - seen[path].mean(0)
        assert own["a"].shape == (2, x.shape[1])
        values = torch.linalg.svdvals(x)
        explained = (x @ own["a"].t()).square().sum()
        assert float(explained) > 0.9 * float(values[:2].square().sum())


def test_eva_stops_reading_when_everything_has_settled() -> None:
    paths, data = of_llama(2)
    read: list[int] = []

    def stream() -> Any:
        for i in range(50):
            read.append(i)
            yield data[0]  # the same again: nothing turns

    inlay.attach(ZOO["llama"].build(), EVA(rank=2, rho=1.0), where=paths, data=stream())
    assert len(read) <= 3


def test_eva_scales_every_site_alike_and_whitens() -> None:
    paths, data = of_llama(2)
    plain, white = ZOO["llama"].build(), ZOO["llama"].build()
    ours = inlay.attach(plain, EVA(rank=3, alpha=5.0), where=paths, data=data)
    agrees("llama", plain, shake(ours), lambda own: 5.0 / 3 * own["b"] @ own["a"])
    one = inlay.attach(ZOO["llama"].build(), EVA(rank=3), where=paths, data=data)
    other = inlay.attach(white, EVA(rank=3, whiten=True), where=paths, data=data)
    seen = activations("llama", data, paths, labelled=True)
    for path, own in sites(one.tensors()).items():
        x = seen[path] - seen[path].mean(0)
        lengths = (x @ own["a"].t()).square().sum(0).sqrt()
        close(sites(other.tensors())[path]["a"], own["a"] / lengths.sqrt()[:, None], 2e-2)


def test_eva_leaves_out_a_site_without_a_component_and_survives_a_file(tmp_path: Any) -> None:
    paths, data = of_llama(1)
    model = ZOO["llama"].build()
    adapter = inlay.attach(model, EVA(rank=1, rho=3.0), where=paths, data=data)
    ranks = dict(adapter.method.rank_pattern)  # type: ignore[attr-defined]
    assert 0 in ranks.values() and sum(ranks.values()) == len(paths)
    assert set(sites(adapter.tensors())) == {p for p, n in ranks.items() if n}
    shake(adapter)
    inlay.save(model, "default", tmp_path)
    fresh = ZOO["llama"].build()
    inlay.load(fresh, tmp_path)
    batch = inputs("llama")
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)


def test_eva_needs_data_that_it_can_use() -> None:
    paths, data = of_llama(1)
    model = ZOO["llama"].build()
    with pytest.raises(ConfigError, match="data=batches"):
        inlay.attach(model, EVA(rank=2), where=paths)
    with pytest.raises(ConfigError, match="leave rank_pattern out"):
        inlay.attach(model, EVA(rank=2, rank_pattern={"q_proj": 2}), where=paths, data=data)
    unlabelled = [{**b, "labels": torch.full_like(b["labels"], -100)} for b in data]
    with pytest.raises(ConfigError, match="no input that varies"):
        inlay.attach(model, EVA(rank=2), where=paths, data=unlabelled)
    assert inlay.adapters(model) == {}


# -- DyLoRA -------------------------------------------------------------------------------------------------


def drawn(adapter: inlay.Adapter) -> int:
    return int(adapter.tensors()["shared/drawn/rank"])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_dylora_trains_at_the_drawn_rank(name: str, frozen: bool) -> None:
    """Outputs and gradients at each rank; beyond it (with `frozen`: before it, too) the gradients are zero."""
    model, adapter = attached(name, DyLoRA(rank=4, alpha=6.0, frozen=frozen))
    assert set(sites(adapter.tensors())) == set(places(name, "query", "value"))
    shake(adapter)
    for module in adapter.modules():  # the base's own dropout would blur the comparison
        module.train()
    for rank in (1, 3, 4):
        for piece in adapter.pieces:
            piece.delta.drawn.rank.fill_(rank)  # type: ignore[union-attr]
        for parameter in adapter.parameters():
            parameter.grad = None

        def update(own: Numbers, rank: int = rank) -> Tensor:
            a, b = own["a"][:rank], own["b"][:, :rank]
            if frozen:
                a, b = torch.cat([a[:-1].detach(), a[-1:]]), torch.cat([b[:, :-1].detach(), b[:, -1:]], 1)
            return 6.0 / rank * b @ a

        agrees(name, model, adapter, update)
        for own in sites({n: _grad(adapter, n) for n in adapter.tensors() if n.startswith("delta/")}).values():
            untouched = torch.arange(4) >= rank
            if frozen:
                untouched = torch.arange(4) != rank - 1
            assert not own["a"][untouched].any() and not own["b"][:, untouched].any()
            assert own["a"][~untouched].abs().sum(1).all() and own["b"][:, ~untouched].abs().sum(0).all()


def _grad(adapter: inlay.Adapter, name: str) -> Tensor:
    address = adapter.tensors()[name].data_ptr()
    (gradient,) = [p.grad for p in adapter.parameters() if p.data_ptr() == address]
    assert gradient is not None
    return gradient


@pytest.mark.parametrize("served", [None, 1, 3])
def test_dylora_serves_at_the_rank_asked_for(served: int | None) -> None:
    model, adapter = attached("llama", DyLoRA(rank=4, alpha=6.0, serve_rank=served))
    rank = served or 4
    agrees("llama", model, shake(adapter), lambda own: 6.0 / rank * own["b"][:, :rank] @ own["a"][:rank])


@pytest.mark.parametrize("frozen", [False, True])
def test_dylora_draws_again_at_every_step_and_moves_no_more_than_that(frozen: bool) -> None:
    model, adapter = attached("llama", DyLoRA(rank=4, frozen=frozen, seed=1))
    shake(adapter)
    model.train()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    ranks = []
    for step in range(12):
        rank = drawn(adapter)
        for micro in range(2):
            model(**ZOO["llama"].batch(2, 2 * step + micro)).loss.backward()
        assert drawn(adapter) == rank  # both halves of an accumulated step have the same
        before = sites({n: t.clone() for n, t in adapter.tensors().items()})
        optimizer.step()
        optimizer.zero_grad()
        for site, own in sites(adapter.tensors()).items():
            moved = (own["a"] != before[site]["a"]).any(1)
            expected = torch.arange(4) == rank - 1 if frozen else torch.arange(4) < rank
            assert torch.equal(moved, expected), (step, site)
        ranks.append(rank)
    assert set(ranks) == {1, 2, 3, 4}
    assert int(adapter.tensors()["shared/drawn/steps"]) == 12
    again = DyLoRA(rank=4, frozen=frozen, seed=1)
    assert ranks == [again.draw(step) for step in range(12)]
    assert ranks != [DyLoRA(rank=4, seed=2).draw(step) for step in range(12)]


def test_dylora_draws_every_rank_about_equally_often() -> None:
    method = DyLoRA(rank=6, lowest=2)
    counts = torch.bincount(torch.tensor([method.draw(step) for step in range(5_000)]), minlength=8)
    assert counts[:2].sum() == 0 and counts[7] == 0
    assert counts[2:7].min() > 850 and counts[2:7].max() < 1150


def test_dylora_sorts_what_it_learns() -> None:
    """Trained to copy a matrix of rank 4, its first half is worth more than LoRA's, whose rows are in no order."""
    torch.manual_seed(0)
    target = torch.linalg.svd(torch.randn(12, 12)).Vh[:4].t() @ torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0]))
    target = target @ torch.linalg.qr(torch.randn(12, 4)).Q.t()
    errors = {}
    for method in (DyLoRA(rank=4, alpha=4.0), LoRA(rank=4, alpha=4.0)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(12, 12, bias=False))
        base = model[0].weight.detach().clone()
        adapter = inlay.attach(model, method, where=["0"])
        optimizer = torch.optim.Adam(adapter.parameters(), lr=3e-2)
        for _ in range(600):
            x = torch.randn(32, 12)
            (model(x) - x @ (base + target).t()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        own = sites(adapter.tensors())["0"]
        scale = 2.0 if isinstance(method, DyLoRA) else 1.0  # alpha / rank at rank 2
        left = target - scale * own["b"][:, :2] @ own["a"][:2]
        errors[method.name] = float(left.square().sum())
    assert errors["dylora"] < 0.7 * errors["lora"], errors


# -- counts -------------------------------------------------------------------------------------------------


LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_32_3B = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
    "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("size", "method", "where", "count"),
    [
        (LLAMA_2_7B, PiSSA(rank=128), None, 319_815_680),  # the paper's 320M
        (LLAMA_2_7B, OLoRA(rank=128), "all-linear", 319_815_680),
        (LLAMA_32_3B, LoRAFA(rank=32), ["query", "value"], 3_670_016),  # PEFT's MetaMathQA benchmark
        (LLAMA_32_3B, LoRAPlus(rank=32), None, 9_175_040),  # LoRA's own
        (LLAMA_32_3B, DyLoRA(rank=32), None, 9_175_040),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_published_counts(size: dict[str, int], method: Any, where: Any, count: int) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **size))
    adapter = inlay.attach(model, method, where=where)
    assert adapter.count == count
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_eva_trains_about_as_much_as_lora() -> None:
    paths, data = of_llama(4)
    eva = inlay.attach(ZOO["llama"].build(), EVA(rank=4), where=paths, data=data)
    by_site = sites(eva.tensors())
    assert sum(len(own["a"]) for own in by_site.values()) == 4 * len(paths)
    assert eva.count == sum(own["a"].numel() + own["b"].numel() for own in by_site.values())
