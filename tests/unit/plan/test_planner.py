"""The planner against plain counting, against itself, and over the registry."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import BertConfig, GPT2Config, LlamaConfig, RobertaConfig, T5Config

import inlay
from inlay.bases.context import stated_context
from inlay.core.errors import ConfigError, UserError
from inlay.plan import Planner, Setting, Skeleton, machine_named, search
from inlay.plan.ledger import Entry, Ledger
from inlay.plan.step import replay

SMALL = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=9,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=256,
)
SHALLOW = LlamaConfig(
    hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, vocab_size=256
)
# What these need beside a base: tokens, or other adapters.
NEEDY: dict[str, Any] = {"trainable-tokens": lambda cls: cls(tokens=(3, 5))}


@pytest.fixture(scope="module")
def skeleton() -> Skeleton:
    return Skeleton(SMALL)


# -- every method ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in inlay.methods() if n != "fusion"])
def test_every_method_has_a_plan(name: str) -> None:
    config = GPT2Config(n_embd=128, n_head=4, n_layer=2, vocab_size=256) if name == "bitfit" else SHALLOW
    cls = inlay.methods()[name]
    method = NEEDY.get(name, lambda c: c())(cls)
    plan = Planner(Skeleton(config), method).plan(Setting(precision="fp32", batch=2, length=16))
    assert plan.trainable > 0 and plan.disk_bytes > 0
    assert plan.memory.optimizer == 8 * plan.trainable or plan.phase == "trial"
    assert plan.memory.total > plan.memory.weights + plan.memory.adapter
    assert plan.to_dict()["memory_bytes"]["total"] == round(plan.memory.total)


def test_what_a_method_refuses_is_an_error(skeleton: Skeleton) -> None:
    with pytest.raises(UserError, match="biases"):
        Planner(skeleton, inlay.BitFit()).plan(Setting())


@pytest.mark.parametrize(
    "config, task",
    [
        (
            BertConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=6, num_attention_heads=4),
            "classification",
        ),
        (T5Config(d_model=64, d_ff=96, num_layers=6, num_heads=4, d_kv=16, vocab_size=256), "seq2seq"),
        (GPT2Config(n_embd=64, n_head=4, n_layer=6, vocab_size=256), "causal"),
    ],
)
def test_architectures(config: Any, task: str) -> None:
    skeleton = Skeleton(config)
    assert skeleton.task == task
    plan = Planner(skeleton, inlay.LoRA(rank=2)).plan(Setting(precision="fp32", batch=2, length=16))
    assert plan.memory.activations > 0


# -- sizes -------------------------------------------------------------------------------------------


def test_weights_and_states_are_counted(skeleton: Skeleton) -> None:
    planner = Planner(skeleton, inlay.LoRA(rank=4), where="all-linear")
    plan = planner.plan(Setting(precision="fp32", batch=2, length=16))
    model = skeleton.build("fp32")
    parameters = sum(p.numel() for p in model.parameters())
    assert plan.base_parameters == parameters
    assert plan.memory.weights == pytest.approx(4 * parameters, rel=1e-3)  # and the table of rotations
    assert plan.memory.adapter == 4 * plan.trainable == plan.disk_bytes
    assert plan.memory.optimizer == 8 * plan.trainable


def test_quantised_weights(skeleton: Skeleton) -> None:
    planner = Planner(skeleton, inlay.LoRA(rank=4), where="all-linear")
    plain, packed = (planner.plan(Setting(quantisation=q)).memory.weights for q in (None, "nf4"))
    linears = 9 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert plain - packed == pytest.approx(linears * (2 - 4.127 / 8), rel=1e-3)


def test_transposed_layers_are_quantised_too() -> None:
    """GPT-2's: bitsandbytes takes them, so the planner must."""
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # its temporaries are another matter
    config = GPT2Config(n_embd=128, n_head=4, n_layer=6, vocab_size=256, **still)
    planner = Planner(Skeleton(config), inlay.LoRA(rank=4), where="all-linear")
    plain, packed = (planner.plan(Setting(quantisation=q, batch=2, length=16)) for q in (None, "nf4"))
    assert plain.memory.weights - packed.memory.weights == pytest.approx(6 * 12 * 128**2 * (2 - 4.127 / 8), rel=1e-3)
    forward = [planner._seen(Setting(quantisation=q, batch=2, length=16)).peaks["forward"] for q in (None, "nf4")]
    made = 2 * 4 * 128**2  # the largest layer's weight, made for its product and let go of
    assert forward[1]["temporary"] - forward[0]["temporary"] == pytest.approx(made, rel=0.1)


def test_what_can_be_trained_can_be_planned() -> None:
    from inlay.bases.loading import LIBRARIES
    from inlay.plan.setting import BYTES_PER_WEIGHT

    assert set(BYTES_PER_WEIGHT) == set(LIBRARIES)


def test_accumulation_keeps_gradients(skeleton: Skeleton) -> None:
    planner = Planner(skeleton, inlay.LoRA(rank=4), where="all-linear")
    one, four = (planner.plan(Setting(precision="fp32", batch=2, length=16, accumulate=n)) for n in (1, 4))
    assert one.memory.total < four.memory.total <= one.memory.total + 2 * one.memory.adapter


def test_checkpointing_keeps_less_and_computes_more(skeleton: Skeleton) -> None:
    planner = Planner(skeleton, inlay.LoRA(rank=4), machine=machine_named("RTX 4090"))
    plain, again = (planner.plan(Setting(batch=4, length=128, checkpointing=c)) for c in (False, True))
    assert again.memory.activations < plain.memory.activations / 3
    assert again.seconds is not None and plain.seconds is not None
    assert 1.1 < again.seconds / plain.seconds < 1.7


def test_a_plan_does_not_depend_on_earlier_ones() -> None:
    """Checkpointing switches the cache of keys and values off, which other steps keep."""
    config = LlamaConfig(**SHALLOW.to_dict() | {"num_key_value_heads": 2})
    setting = Setting(batch=4, length=32)
    alone = Planner(Skeleton(config), inlay.LoRA(rank=4)).plan(setting)
    planner = Planner(Skeleton(config), inlay.LoRA(rank=4))
    planner.plan(replace(setting, checkpointing=True))
    assert planner.plan(setting) == alone


# -- the two short cuts ------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", [inlay.LoRA(rank=4), inlay.FullFineTuning(), inlay.TopLayers()])
def test_few_layers_tell_of_all(skeleton: Skeleton, method: Any, checkpointing: bool) -> None:
    setting = Setting(precision="fp32", batch=2, length=32, checkpointing=checkpointing)
    few = Planner(skeleton, method).plan(setting).memory.total
    whole = Planner(skeleton, method, whole=True).plan(setting).memory.total
    assert few == pytest.approx(whole, rel=0.01)


def test_stacks_that_are_not_equally_deep() -> None:
    """The prompt does not grow with the layers, and the base grows unevenly."""
    config = T5Config(d_model=32, d_ff=48, num_heads=4, d_kv=8, vocab_size=64, num_layers=9, num_decoder_layers=5)
    skeleton, method = Skeleton(config, task="seq2seq"), inlay.PromptTuning(length=2, init="random")
    setting = Setting(precision="fp32", batch=2, length=16)
    few = Planner(skeleton, method).plan(setting).memory
    assert few == Planner(skeleton, method, whole=True).plan(setting).memory


def test_few_rows_tell_of_many(skeleton: Skeleton) -> None:
    planner = Planner(skeleton, inlay.LoRA(rank=4))
    setting = Setting(precision="fp32", batch=16, length=64)
    quick, exact = (planner.plan(setting, by_batch=b).memory.total for b in (True, False))
    assert quick == pytest.approx(exact, rel=0.02)


# -- the ledger --------------------------------------------------------------------------------------


def test_ledger_counts_what_lives() -> None:
    weight = torch.empty(64, 64, device="meta")
    with Ledger([weight]) as ledger:
        ledger.phase = "forward"
        x = torch.empty(16, 64, device="meta")
        y = x @ weight
        y = y.relu()  # the product is let go of
        view = y.t()
        del x, y
    sizes = [entry.bytes for entry in ledger.entries]
    assert sizes == [4096, 4096, 4096, -4096, -4096]
    assert ledger.flops == {"forward": 2 * 16 * 64 * 64}
    del view
    assert ledger.entries[-1].bytes == -4096


def test_whole_numbers_keep_their_values() -> None:
    with Ledger([]):
        assert torch.arange(4, device=torch.device("meta")).sum().item() == 6
        assert bool((torch.ones(3, device="meta") > 0).all())


def test_replay_finds_the_worst_moment_and_its_roles() -> None:
    steps = [(1, 10, "forward"), (2, 5, "forward"), (2, -5, "forward"), (3, 7, "loss"), (4, 3, "backward"),
             (1, -10, "backward"), (5, 20, "backward"), (3, -7, "backward")]  # fmt: skip
    peaks = replay([Entry(*step) for step in steps], {5})
    assert peaks["forward"] == {"activations": 10, "logits": 0, "temporary": 5, "gradients": 0}
    assert peaks["loss"]["logits"] == 7
    assert peaks["backward, second half"] == {"activations": 0, "logits": 7, "temporary": 3, "gradients": 20}


# -- words and search --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "A100 80GB", "h100"])
def test_gpus(name: str) -> None:
    machine = machine_named(name)
    assert machine.gpu and machine.memory is not None and machine.memory > 20 * 2**30


@pytest.mark.parametrize("name", ["RTX 9999", "RTX 4060", "RTX", "L40"])
def test_unknown_gpu(name: str) -> None:
    """Another card's name may begin like it, and have twice the memory."""
    with pytest.raises(ConfigError, match="unknown GPU"):
        machine_named(name)


def test_search_gives_the_largest_batch_and_the_next(skeleton: Skeleton) -> None:
    planner = Planner(skeleton, inlay.LoRA(rank=4))
    start = Setting(precision="fp32", length=64)
    room = planner.plan(replace(start, batch=4)).memory.total + 1
    fits = search(planner, room, start=start, quantisations=[None], lengths=[64], batches=[1, 2, 4, 8])
    plain = next(f for f in fits if not (f.fits or f.beyond).setting.checkpointing)  # type: ignore[union-attr]
    assert plain.fits is not None and plain.beyond is not None
    assert (plain.fits.setting.batch, plain.beyond.setting.batch) == (4, 8)
    nothing = search(planner, 1000, start=start, quantisations=[None, "nf4"], lengths=[64], batches=[1])
    assert len(nothing) == 4 and all(f.fits is None and f.beyond is not None for f in nothing)


def test_experts_in_every_precision() -> None:
    """Their grouped products are known for bfloat16 only where there are no values."""
    from transformers import Qwen2MoeConfig

    config = Qwen2MoeConfig(
        hidden_size=32, intermediate_size=48, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, num_experts=4, num_experts_per_tok=2,
        vocab_size=64,
    )  # fmt: skip
    planner = Planner(Skeleton(config), inlay.LoRA(rank=2))
    narrow, wide = (planner.plan(Setting(precision=p, batch=2, length=16)).memory for p in ("bf16", "fp32"))
    assert wide.weights == pytest.approx(2 * narrow.weights, rel=0.01) and wide.activations > 1.3 * narrow.activations


def test_the_context_is_what_training_finds() -> None:
    """RoBERTa's table of positions begins behind its padding index."""
    small: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64,
    }  # fmt: skip
    for config, tokens in (
        (RobertaConfig(**small, max_position_embeddings=66, pad_token_id=1), 64),
        (BertConfig(**small, max_position_embeddings=66), 66),
        (T5Config(d_model=32, num_layers=1, vocab_size=64), None),
    ):
        skeleton = Skeleton(config)
        assert skeleton.context == stated_context(skeleton.build("fp32")) == tokens
