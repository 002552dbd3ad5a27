"""PiSSA, OLoRA, LoRA+ and EVA against Hugging Face PEFT 0.21."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch

import inlay
from inlay import EVA, LoRAPlus, OLoRA, PiSSA
from inlay.testing.models import ZOO
from tests.golden.hand import close, inputs, shake
from tests.golden.test_low_rank_relatives import sites

TARGETS = ["q_proj", "v_proj"]


def ours(method: Any, **options: Any) -> tuple[Any, inlay.Adapter]:
    torch.manual_seed(0)
    model = ZOO["llama"].build()
    return model, inlay.attach(model, method, where=TARGETS, **options)


def theirs(**options: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(ZOO["llama"].build(), config).eval()


def factors(model: Any, site: str) -> tuple[Any, Any]:
    layer = model.base_model.model.get_submodule(site)
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def compare(one: Any, other: Any, tolerance: float = 1e-5) -> None:
    batch = inputs("llama", ragged=True)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        close(one(**batch).logits[real], other(**batch).logits[real], tolerance)


@pytest.mark.parametrize(
    ("method", "init"),
    [(PiSSA(rank=4), "pissa"), (PiSSA(rank=4, alpha=10.0), "pissa"), (OLoRA(rank=4, alpha=10.0), "olora")],
    ids=str,
)
def test_pissa_and_olora_start_alike_and_mean_the_same(method: Any, init: str) -> None:
    """PEFT writes the rest of the weight into the base; the sums are the same, fresh and trained."""
    model, adapter = ours(method)
    other = theirs(r=4, lora_alpha=4 if method.alpha is None else 10, init_lora_weights=init)
    for site, own in sites(adapter.tensors()).items():
        a, b = factors(other, site)
        close(own["a"].abs(), a.abs(), 1e-4)  # a singular vector's sign is nobody's
        close(own["b"] @ own["a"], b @ a, 1e-4)
    compare(model, other)
    shake(adapter)
    with torch.no_grad():
        for site, own in sites(adapter.tensors()).items():
            a, b = factors(other, site)
            a.copy_(own["a"])
            b.copy_(own["b"])
    compare(model, other, 5e-5)


def test_lora_plus_trains_alike() -> None:
    from peft.optimizers import create_loraplus_optimizer

    model, adapter = ours(LoRAPlus(rank=4))
    other = theirs(r=4, lora_alpha=16)
    with torch.no_grad():
        for site, own in sites(adapter.tensors()).items():
            factors(other, site)[0].copy_(own["a"])
    batch = ZOO["llama"].batch(4, 0)
    optimizers = [
        torch.optim.AdamW(adapter.parameter_groups(1e-3)),
        create_loraplus_optimizer(
            other, optimizer_cls=torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.0
        ),
    ]
    for one, optimizer in zip((model, other), optimizers, strict=True):
        for _ in range(4):
            one(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for site, own in sites(adapter.tensors()).items():
        for number, value in zip("ab", factors(other, site), strict=True):
            close(own[number], value, 1e-4)
    compare(model, other, 1e-4)


def test_eva_finds_the_same_ranks_and_directions() -> None:
    from peft.tuners.lora.eva import get_eva_state_dict

    data = [ZOO["llama"].batch(6, seed) for seed in range(3)]  # PEFT goes through them again and again
    config = peft.LoraConfig(
        r=3, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, tau=0.99),
    )  # fmt: skip
    found = get_eva_state_dict(ZOO["llama"].build(), data, config, show_progress_bar=False)
    _, adapter = ours(EVA(rank=3), data=data * 8)
    ranks = dict(adapter.method.rank_pattern)  # type: ignore[attr-defined]
    own = sites(adapter.tensors())
    assert sum(ranks.values()) == sum(len(v) for v in found.values())
    for site, a in found.items():
        assert abs(ranks[site] - len(a)) <= 1, (site, ranks[site], len(a))  # query and value share an input: ties
        shared = min(len(a), ranks[site])
        overlap = torch.linalg.svdvals(own[site]["a"][:shared] @ a[: shared + 1].float().t())
        assert float(overlap[: max(1, shared - 1)].min()) > 0.95, (site, overlap)
