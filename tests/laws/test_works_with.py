"""What an attached model must go on working with: compilation, tied and resized embeddings, data parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.core.contracts.method import Method
from inlay.methods import registry
from inlay.testing import SLOW_LAWS, ZOO, refusal
from inlay.testing.laws import train
from inlay.testing.specimen import randomise

FIRST = {key: cls.examples()[0] for key, cls in registry().items()}


# A graph takes seconds, so `make test` makes one for each way into a model; `-m exhaustive` makes them all.
EACH_WAY = (
    "lora", "dora", "oft", "ia3", "houlsby", "norm-tuning", "loreft", "ladder", "in-parallel", "unipelt", "full",
    "prompt-tuning", "prefix-tuning", "llama-adapter",
)  # fmt: skip
COMPILED = [
    *(pytest.param(k, "llama", marks=() if k in EACH_WAY else pytest.mark.exhaustive) for k in FIRST),
    ("lora", "gpt2"), ("lora", "bert"), ("bitfit", "bert"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("key", "specimen"), COMPILED)
def test_compiles_to_one_graph(key: str, specimen: str) -> None:
    if refusal(ZOO[specimen], FIRST[key]):
        pytest.skip("refused on this model; test_refusals pins it")
    SLOW_LAWS["compiling"](ZOO[specimen], FIRST[key])


def tied(vocabulary: int = 97) -> Any:
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    randomise(model, "tied")
    if vocabulary != 97:
        torch.manual_seed(0)
        model.resize_token_embeddings(vocabulary)
    return model.eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits


def test_a_trained_embedding_keeps_its_tie_and_its_rows(tmp_path: Path) -> None:
    """A resized, tied embedding trained whole: the head follows, rows keep their own, merging and files are exact."""
    ids = torch.tensor([[3, 99, 5, 98], [7, 8, 100, 4]])
    model = tied(101)
    base = logits(model, ids)
    inlay.attach(model, inlay.LoRA(rank=2), name="new", modules_to_save=["embed_tokens"])
    adapter = inlay.adapters(model)["new"]
    assert adapter.count_copied == 101 * 32
    train(adapter)
    changed = logits(model, ids)

    twin = tied(101)
    value = adapter.copies["model.embed_tokens.weight"].detach().clone()
    with torch.no_grad():
        twin.model.embed_tokens.weight.copy_(value)
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    inlay.attach(twin, inlay.LoRA(rank=2), name="new")
    train(inlay.adapters(twin)["new"])
    torch.testing.assert_close(changed, logits(twin, ids))

    with inlay.use(model, ["new", None]):
        mixed = logits(model, ids)
    torch.testing.assert_close(mixed[0], changed[0])
    torch.testing.assert_close(mixed[1], base[1])

    inlay.save(model, "new", tmp_path)
    fresh = tied(101)
    inlay.load(fresh, tmp_path)
    assert torch.equal(logits(fresh, ids), changed)
    with pytest.raises(inlay.UserError, match=r"does not fit|another base"):
        inlay.load(tied(97), tmp_path)

    assert not inlay.merge(model, "new").untied
    torch.testing.assert_close(logits(model, ids), changed)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    inlay.unmerge(model)
    assert torch.equal(logits(model, ids), changed)


def test_merging_into_a_tied_head_leaves_the_embedding() -> None:
    ids = torch.tensor([[3, 4, 5, 6]])
    model = tied()
    inlay.attach(model, inlay.LoRA(rank=2), where=["lm_head"])
    train(inlay.adapters(model)["default"])
    expected, table = logits(model, ids), model.model.embed_tokens.weight.clone()
    report = inlay.merge(model, "default")
    assert report.untied and not model.config.tie_word_embeddings
    torch.testing.assert_close(logits(model, ids), expected)
    assert torch.equal(model.model.embed_tokens.weight, table)
    inlay.unmerge(model)
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.model.embed_tokens.weight


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


PARALLEL: list[Method] = [
    inlay.LoRA(rank=2),
    inlay.IA3(),
    inlay.PrefixTuning(length=2),
    inlay.PromptTuning(length=2),
    inlay.LLaMAAdapter(length=2),
    inlay.LadderSideTuning(reduction=4),
]


def step(model: nn.Module, batch: dict[str, torch.Tensor]) -> None:
    model(**batch).loss.backward()


@pytest.mark.parametrize("method", PARALLEL, ids=lambda m: m.name)
def test_distributed_data_parallel(one_process: None, method: Method) -> None:
    batch = ZOO["llama"].batch(2, 0)
    torch.manual_seed(0)
    model = ZOO["llama"].build()
    train(inlay.attach(model, method))
    step(model, batch)
    expected = [p.grad.clone() for p in inlay.adapters(model)["default"].parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    parallel = nn.parallel.DistributedDataParallel(model)
    with inlay.use(parallel, "default"):
        step(parallel, batch)
    for grad, parameter in zip(expected, inlay.adapters(parallel)["default"].parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("method", PARALLEL, ids=lambda m: m.name)
def test_fully_sharded(one_process: None, method: Method) -> None:
    from torch.distributed.fsdp import fully_shard

    batch = ZOO["llama"].batch(2, 0)
    torch.manual_seed(0)
    model: Any = ZOO["llama"].build()
    train(inlay.attach(model, method))
    step(model, batch)
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    mesh = dist.init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    if isinstance(method, inlay.PromptTuning):
        with pytest.raises(inlay.UserError, match="sharded"):
            step(model, batch)
        return
    step(model, batch)
    found = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad)
