"""PEFT 0.21 reads what inlay writes, and inlay what PEFT writes, with the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import inlay
from inlay.core.errors import AdapterFileError, UnsupportedError
from inlay.formats.peft import WRITERS
from inlay.methods import method_named
from inlay.testing.models import ZOO
from inlay.testing.specimen import randomise
from tests.formats.peft_hand import MODELS, in_inlay, in_peft, logits, ours, same, theirs
from tests.golden.hand import inputs, shake

TASK = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "gemma2": "CAUSAL_LM", "bert": None, "t5": "SEQ_2_SEQ_LM"}
QUERY = {"llama": ["q_proj", "v_proj"], "bert": ["query", "value"], "t5": ["q", "v"], "gpt2": ["c_attn"]}
DOWN = {"llama": ["down_proj"], "t5": ["wo"], "gpt2": ["mlp.c_proj"], "bert": r".*\d\.output\.dense"}


def of(key: str, **fields: Any) -> Any:
    return method_named(key)(**fields)


# Ours, on every kind of model. `where` for GPT-2: PEFT knows the whole fused layer only.
OURS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "lora": (lambda: of("lora", rank=3, alpha=5.0), {}),
    "lora-linear": (lambda: of("lora", rank=3, alpha=2.0, rank_stabilised=True), {"where": "all-linear"}),
    "dora": (lambda: of("dora", rank=3, alpha=5.0), {}),
    "lora-plus": (lambda: of("lora-plus", rank=3), {}),
    "lora-fa": (lambda: of("lora-fa", rank=3), {}),
    "dylora": (lambda: of("dylora", rank=3), {}),
    "pissa": (lambda: of("pissa", rank=3), {"where": ["query", "value"]}),
    "olora": (lambda: of("olora", rank=3, alpha=3.0), {}),
    "ia3": (lambda: of("ia3"), {}),
    "vera": (lambda: of("vera", rank=8), {}),
    "loha": (lambda: of("loha", rank=3, alpha=4.0), {}),
    "lokr": (lambda: of("lokr", rank=2, alpha=4.0, factor=4), {}),
    "lokr-both": (lambda: of("lokr", rank=1, alpha=4.0, factor=8, decompose_both=True), {}),
    "lokr-whole": (lambda: of("lokr", rank=64, alpha=4.0, factor=4), {}),
    "adalora": (lambda: of("adalora", rank=4, target_rank=2), {"where": ["query", "value"]}),
    "oft": (lambda: of("oft", block_size=8), {}),
    "oft-neumann": (lambda: of("oft", blocks=4, neumann_terms=5), {}),
    "oft-shared": (lambda: of("oft", block_size=8, share_blocks=True), {}),
    "boft": (lambda: of("boft", block_size=8, factors=1), {}),
    "boft-scaled": (lambda: of("boft", block_size=4, factors=1, scaled=True), {}),
    "norm-tuning": (lambda: of("norm-tuning"), {}),
    "trainable-tokens": (lambda: of("trainable-tokens", tokens=tuple(range(40, 4, -2))), {}),
    "prompt-tuning": (lambda: of("prompt-tuning", length=3), {}),
    "p-tuning": (lambda: of("p-tuning", length=3, encoder="mlp", template=(1, (5, 9), 2)), {}),
    "prefix-tuning": (lambda: of("prefix-tuning", length=3, projection=4), {}),
}
# (case, model) → why PEFT's format cannot hold it.
NOT_OURS = {
    ("prompt-tuning", "bert"): "an encoder",
    ("p-tuning", "bert"): "an encoder",
    ("prefix-tuning", "bert"): "decoder-only",
    ("prefix-tuning", "t5"): "decoder-only",
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", OURS)
def test_what_inlay_writes(case: str, name: str, tmp_path: Path) -> None:
    make, where = OURS[case]
    model, _ = ours(name, make(), **where)
    if (case, name) in NOT_OURS:
        with pytest.raises(UnsupportedError, match=NOT_OURS[case, name]):
            inlay.save(model, "default", tmp_path, format="peft")
        assert list(tmp_path.iterdir()) == []
        return
    inlay.save(model, "default", tmp_path, format="peft")
    expected, base = logits(name, model), logits(name, ZOO[name].build())
    same(in_peft(name, tmp_path), expected, base)
    same(in_inlay(name, tmp_path), expected, base)


def branches() -> list[Any]:
    """Every example of every method that PEFT's files can hold and that needs no data."""
    asked = [key for key in WRITERS if key != "multitask-prompt"]  # whose calls need the task's number
    found = [e for key in asked for e in method_named(key).examples() if not e.needs_data]
    return [pytest.param(e, id=f"{e.name}-{i}") for i, e in enumerate(found)]


@pytest.mark.parametrize("method", branches())
def test_every_branch_of_every_method(method: Any, tmp_path: Path) -> None:
    """What is written computes the same in PEFT, or it is refused with a reason."""
    model, _ = ours("llama", method)
    try:
        inlay.save(model, "default", tmp_path, format="peft")
    except UnsupportedError:
        assert method.name in ("trainable-tokens", "llama-adapter", "boft"), "only these have uses that PEFT lacks"
        return
    if method.name == "boft" and method.factors > 1:
        return  # tested in test_peft_files.py, with a stand-in for PEFT's CUDA kernel
    expected, base = logits("llama", model), logits("llama", ZOO["llama"].build())
    same(in_peft("llama", tmp_path), expected, base)
    same(in_inlay("llama", tmp_path), expected, base)


@pytest.mark.parametrize("name", MODELS)
def test_eva_writes_the_ranks_it_found(name: str, tmp_path: Path) -> None:
    model = ZOO[name].build()
    shake(inlay.attach(model, of("eva", rank=3), data=[inputs(name, rows=6) for _ in range(2)]), 0.2)
    inlay.save(model, "default", tmp_path, format="peft")
    expected, base = logits(name, model), logits(name, ZOO[name].build())
    same(in_peft(name, tmp_path), expected, base)
    same(in_inlay(name, tmp_path), expected, base)


@pytest.mark.parametrize("name", MODELS)
def test_eva_as_peft_finds_it(name: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, target_modules=QUERY[name], task_type=TASK[name], init_lora_weights="eva",
                             eva_config=peft.EvaConfig(rho=2.0))  # fmt: skip
    model: Any = peft.get_peft_model(ZOO[name].build(), config)
    peft.initialize_lora_eva_weights(
        model, [inputs(name, rows=6) for _ in range(3)], prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=lambda entering, *_: entering[0].flatten(0, 1), show_progress_bar=False,
    )  # fmt: skip
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(tmp_path)
    expected = logits(name, peft.PeftModel.from_pretrained(ZOO[name].build(), tmp_path))
    same(in_inlay(name, tmp_path), expected, logits(name, ZOO[name].build()))


def tagger() -> Any:
    """An encoder with a head that looks at each token."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=97, max_position_embeddings=64, num_labels=5, **sizes)
    model = transformers.BertForTokenClassification(config)
    randomise(model, "tagger")
    return model.eval()


@torch.no_grad()
def tags(model: Any) -> Any:
    batch = inputs("bert", ragged=True)
    mask = batch["attention_mask"].bool()
    return model(**batch).logits[:, -mask.shape[1] :][mask]


@pytest.mark.parametrize("key", ["prompt-tuning", "p-tuning"])
def test_a_prompt_in_front_of_a_tagger(key: str, tmp_path: Path) -> None:
    """PEFT leaves the prompt's own tags in front of the text's; the text's are the same."""
    torch.manual_seed(0)
    fields = {"encoder": "mlp"} if key == "p-tuning" else {}
    model, base = tagger(), tags(tagger())
    shake(inlay.attach(model, of(key, length=3, **fields), modules_to_save=["classifier"]), 0.5)
    inlay.save(model, "default", tmp_path / "ours", format="peft")
    same(tags(peft.PeftModel.from_pretrained(tagger(), tmp_path / "ours").eval()), tags(model), base)
    settings: dict[str, Any] = {"num_virtual_tokens": 3, "task_type": "TOKEN_CLS"}
    config = (
        peft.PromptTuningConfig(**settings)
        if key == "prompt-tuning"
        else peft.PromptEncoderConfig(**settings, encoder_hidden_size=8)
    )
    wrapped = peft.get_peft_model(tagger(), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.5)
    wrapped.save_pretrained(tmp_path / "theirs")
    for folder, expected in (("ours", tags(model)), ("theirs", tags(wrapped.eval()))):
        again = tagger()
        inlay.load(again, tmp_path / folder)
        same(tags(again), expected, base)


def test_a_prefix_in_front_of_a_tagger(tmp_path: Path) -> None:
    """PEFT counts the text's positions from the prefix's end, also in an encoder."""
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="TOKEN_CLS")
    peft.get_peft_model(tagger(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="shifts the positions of an encoder's text"):
        inlay.load(tagger(), tmp_path)


@pytest.mark.parametrize("case", ["lora", "dora", "ia3", "pissa", "prompt-tuning", "prefix-tuning", "norm-tuning"])
def test_parts_of_fused_layers(case: str, tmp_path: Path) -> None:
    """GPT-2's query and value as PEFT's one layer."""
    make, where = OURS[case]
    model, _ = ours("gpt2", make(), **where)
    inlay.save(model, "default", tmp_path, format="peft")
    same(in_peft("gpt2", tmp_path), logits("gpt2", model), logits("gpt2", ZOO["gpt2"].build()))
    same(in_inlay("gpt2", tmp_path), logits("gpt2", model), logits("gpt2", ZOO["gpt2"].build()))


@pytest.mark.parametrize("case", ["vera", "adalora"])
def test_whole_fused_layers(case: str, tmp_path: Path) -> None:
    model, _ = ours("gpt2", OURS[case][0](), where=["c_attn"])
    inlay.save(model, "default", tmp_path, format="peft")
    same(in_peft("gpt2", tmp_path), logits("gpt2", model), logits("gpt2", ZOO["gpt2"].build()))


@pytest.mark.parametrize("case", ["loha", "lokr", "oft", "boft"])
def test_layers_that_peft_does_not_know(case: str, tmp_path: Path) -> None:
    for where, why in ((["c_attn"], "Conv1D"), (None, "a part of a fused layer")):
        model, _ = ours("gpt2", OURS[case][0](), **({} if where is None else {"where": where}))
        with pytest.raises(UnsupportedError, match=why):
            inlay.save(model, "default", tmp_path, format="peft")


# PEFT's own, by case: configuration of a model's targets and task.
THEIRS: dict[str, Callable[[str], Any]] = {
    "lora": lambda n: peft.LoraConfig(r=4, lora_alpha=6, target_modules=QUERY[n], task_type=TASK[n]),
    "lora-all-linear": lambda n: peft.LoraConfig(r=4, lora_alpha=2, target_modules="all-linear", task_type=TASK[n]),
    "lora-patterns": lambda n: peft.LoraConfig(
        r=4, target_modules=QUERY[n], task_type=TASK[n], use_rslora=True,
        rank_pattern={r".*\.1\..*" + QUERY[n][-1]: 2, QUERY[n][-1]: 3}, alpha_pattern={QUERY[n][0]: 5},
    ),
    "lora-layers": lambda n: peft.LoraConfig(target_modules=QUERY[n], task_type=TASK[n], layers_to_transform=[1]),
    "dora": lambda n: peft.LoraConfig(
        r=4, target_modules=QUERY[n], task_type=TASK[n], use_dora=True, use_rslora=True, rank_pattern={QUERY[n][0]: 2}
    ),
    "pissa": lambda n: peft.LoraConfig(r=4, target_modules=QUERY[n], task_type=TASK[n], init_lora_weights="pissa"),
    "olora": lambda n: peft.LoraConfig(r=4, target_modules=QUERY[n], task_type=TASK[n], init_lora_weights="olora"),
    "ia3": lambda n: peft.IA3Config(
        target_modules=f"({DOWN[n]})|(.*(key|value))" if isinstance(DOWN[n], str) else [*QUERY[n], *DOWN[n]],
        feedforward_modules=DOWN[n], task_type=TASK[n],
    ),
    "vera": lambda n: peft.VeraConfig(r=8, target_modules=QUERY[n], task_type=TASK[n]),
    "vera-seed": lambda n: peft.VeraConfig(
        r=8, target_modules=QUERY[n], task_type=TASK[n], save_projection=False, projection_prng_key=7
    ),
    "loha": lambda n: peft.LoHaConfig(r=3, alpha=4, target_modules=QUERY[n], task_type=TASK[n]),
    "lokr": lambda n: peft.LoKrConfig(r=2, alpha=4, target_modules=QUERY[n], task_type=TASK[n], decompose_factor=4),
    "lokr-whole": lambda n: peft.LoKrConfig(r=64, alpha=90, target_modules=QUERY[n], task_type=TASK[n]),
    "adalora": lambda n: peft.AdaLoraConfig(
        init_r=6, target_r=3, total_step=9, target_modules=QUERY[n], task_type=TASK[n]
    ),
    "oft": lambda n: peft.OFTConfig(oft_block_size=8, target_modules=QUERY[n], task_type=TASK[n]),
    "oft-cayley": lambda n: peft.OFTConfig(
        oft_block_size=0, r=4, target_modules=QUERY[n], task_type=TASK[n], use_cayley_neumann=False, block_share=True
    ),
    "boft": lambda n: peft.BOFTConfig(
        boft_block_size=8, boft_n_butterfly_factor=2, target_modules=QUERY[n], task_type=TASK[n]
    ),
    "norm-tuning": lambda n: peft.LNTuningConfig(
        target_modules=["LayerNorm"] if n == "bert" else r".*(layer_?norm|norm)", task_type=TASK[n]
    ),
    "trainable-tokens": lambda n: peft.TrainableTokensConfig(token_indices=list(range(5, 50, 3)), task_type=TASK[n]),
    "prompt-tuning": lambda n: peft.PromptTuningConfig(num_virtual_tokens=3, task_type=TASK[n]),
    "p-tuning": lambda n: peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type=TASK[n]),
    "prefix-tuning": lambda n: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type=TASK[n]),
    "prefix-projection": lambda n: peft.PrefixTuningConfig(
        num_virtual_tokens=3, task_type=TASK[n], prefix_projection=True, encoder_hidden_size=8
    ),
    "adaption-prompt": lambda n: peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type=TASK[n]),
}  # fmt: skip
# (case, model) → why it is not tried.
NOT_THEIRS = {
    **{(c, "bert"): "PEFT has no prompt for a headless task" for c in ("prompt-tuning", "p-tuning")},
    **{
        (c, n): "PEFT's prefix there is not the published one"
        for c in ("prefix-tuning", "prefix-projection")
        for n in ("bert", "t5")
    },
    **{("adaption-prompt", n): "PEFT knows it on Llama, Mistral and GPT-2 only" for n in ("bert", "t5")},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", THEIRS)
def test_what_peft_writes(case: str, name: str, tmp_path: Path) -> None:
    if (case, name) in NOT_THEIRS:
        pytest.skip(NOT_THEIRS[case, name])
    expected, base = theirs(name, THEIRS[case](name), tmp_path), logits(name, ZOO[name].build())
    same(in_inlay(name, tmp_path), expected, base)


@pytest.mark.parametrize("case", ["lora", "dora", "pissa", "ia3", "vera", "adalora", "prompt-tuning", "prefix-tuning"])
def test_what_peft_writes_for_transposed_layers(case: str, tmp_path: Path) -> None:
    expected, base = theirs("gpt2", THEIRS[case]("gpt2"), tmp_path), logits("gpt2", ZOO["gpt2"].build())
    same(in_inlay("gpt2", tmp_path), expected, base)


def test_adalora_keeps_what_was_pruned(tmp_path: Path) -> None:
    """Ranks that differ from layer to layer, in a file of PEFT's and in ours of it."""
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(
        init_r=6, target_r=3, total_step=9, target_modules=QUERY["llama"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(ZOO["llama"].build(), config)
    masks = {}
    for number, (path, module) in enumerate(model.base_model.model.named_modules()):
        if hasattr(module, "lora_E"):
            with torch.no_grad():
                for parameter in (module.lora_A, module.lora_B, module.lora_E):
                    parameter["default"].normal_()
            left = torch.rand(6) > 0.5
            left[number % 6] = True
            module.lora_E["default"].data[~left] = 0
            masks[f"{path}.lora_E.default"] = left.tolist()
    expected, base = logits("llama", model), logits("llama", ZOO["llama"].build())
    model.peft_config["default"].rank_pattern = masks
    model.save_pretrained(tmp_path / "theirs")
    same(in_peft("llama", tmp_path / "theirs"), expected, base)
    same(in_inlay("llama", tmp_path / "theirs"), expected, base)
    again = ZOO["llama"].build()
    loaded = inlay.load(again, tmp_path / "theirs")
    assert {t.shape[0] for n, t in loaded.tensors().items() if n.endswith("/a")} == {sum(m) for m in masks.values()}
    inlay.save(again, "default", tmp_path / "ours", format="peft")
    same(in_peft("llama", tmp_path / "ours"), expected, base)


@pytest.mark.parametrize("gate", ["raw", "tanh"])
def test_adaption_prompts(gate: str, tmp_path: Path) -> None:
    """PEFT's gate is one number a layer, so ours is written where its heads agree, and refused where not."""
    model, adapter = ours("llama", of("llama-adapter", length=4, depth=2, gate=gate))
    with pytest.raises(UnsupportedError, match="head to head"):
        inlay.save(model, "default", tmp_path, format="peft")
    with torch.no_grad():
        for name, value in adapter.tensors().items():
            if "gates." in name:
                value.fill_(0.7)
    inlay.save(model, "default", tmp_path, format="peft")
    expected, base = logits("llama", model), logits("llama", ZOO["llama"].build())
    same(in_peft("llama", tmp_path), expected, base)
    same(in_inlay("llama", tmp_path), expected, base)


def test_adaption_prompts_where_peft_is_wrong(tmp_path: Path) -> None:
    """With a bias behind attention PEFT adds it twice; on GPT-2 it leaves the output projection out."""
    for name in ("llama-classifier", "gpt2"):
        model, _ = ours(name, of("llama-adapter", length=4, depth=1))
        with pytest.raises(UnsupportedError):
            inlay.save(model, "default", tmp_path, format="peft")


class Tasked(torch.nn.Module):
    """PEFT wants the number of the task in every call."""

    def __init__(self, model: Any, task: int) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, **batch: Any) -> Any:
        return self.model(**batch, task_ids=torch.full((batch["input_ids"].shape[0],), self.task))


def test_multitask_prompts(tmp_path: Path) -> None:
    base = logits("llama", ZOO["llama"].build())
    model, _ = ours("llama", of("multitask-prompt", length=3), size=0.5)
    inlay.save(model, "default", tmp_path / "ours", format="peft")
    written = peft.PeftModel.from_pretrained(ZOO["llama"].build(), tmp_path / "ours")
    same(logits("llama", Tasked(written, 0)), logits("llama", model), base)
    same(in_inlay("llama", tmp_path / "ours"), logits("llama", model), base)
    config = peft.MultitaskPromptTuningConfig(num_virtual_tokens=3, num_tasks=3, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(ZOO["llama"].build(), config)
    with torch.no_grad():
        for parameter in wrapped.prompt_encoder.parameters():
            parameter.normal_()
    wrapped.save_pretrained(tmp_path / "theirs")
    for task in range(3):
        expected = logits("llama", Tasked(wrapped, task))
        same(in_inlay("llama", tmp_path / "theirs", task=task), expected, base)
    for wrong, said in ((None, "3 tasks"), (3, "task is 3")):
        with pytest.raises(AdapterFileError, match=said):
            in_inlay("llama", tmp_path / "theirs", task=wrong)


def test_multitask_prompts_in_an_encoder(tmp_path: Path) -> None:
    """PEFT passes no decoder inputs on there, so both are asked with labels."""
    model, _ = ours("t5", of("multitask-prompt", length=3), size=0.5)
    inlay.save(model, "default", tmp_path, format="peft")
    wrapped = peft.PeftModel.from_pretrained(ZOO["t5"].build(), tmp_path).eval()
    batch = ZOO["t5"].batch(3, 3, True)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        actual = wrapped(**batch, task_ids=torch.zeros(3, dtype=torch.long)).logits
        base = ZOO["t5"].build().eval()(**batch).logits
    same(actual, expected, base)
    same(in_inlay("t5", tmp_path), logits("t5", model), logits("t5", ZOO["t5"].build()))


def test_multitask_prompts_in_an_encoder_as_peft_writes_them(tmp_path: Path) -> None:
    """By default it stands in the decoder, too, which the published one does not."""
    batch = ZOO["t5"].batch(3, 3, True)
    for submodules in (2, 1):
        config = peft.MultitaskPromptTuningConfig(
            num_virtual_tokens=3, num_tasks=2, task_type="SEQ_2_SEQ_LM", num_transformer_submodules=submodules
        )
        wrapped: Any = peft.get_peft_model(ZOO["t5"].build(), config)
        with torch.no_grad():
            for parameter in wrapped.prompt_encoder.parameters():
                parameter.normal_()
        wrapped.eval().save_pretrained(tmp_path / str(submodules))
    with pytest.raises(AdapterFileError, match="stands in the decoder"):
        inlay.load(ZOO["t5"].build(), tmp_path / "2", task=0)
    for task in (0, 1):
        model: Any = ZOO["t5"].build()
        inlay.load(model, tmp_path / "1", task=task)
        with torch.no_grad():
            expected = wrapped(**batch, task_ids=torch.full((3,), task)).logits
            same(model.eval()(**batch).logits, expected, ZOO["t5"].build().eval()(**batch).logits)


REFUSED = [
    ("prefix-tuning", "t5", "its self- and cross-attention with the same keys"),
    ("prefix-tuning", "gemma2", "attention with a window of 8 tokens stops seeing"),
    ("adaption-prompt", "gpt2", "computes adaption prompts as published on"),
]


@pytest.mark.parametrize("case, name, said", REFUSED)
def test_what_peft_computes_otherwise(case: str, name: str, said: str, tmp_path: Path) -> None:
    """Files that PEFT writes and reads, of something else than the published method."""
    peft.get_peft_model(ZOO[name].build(), THEIRS[case](name)).save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterFileError, match=said):
        in_inlay(name, tmp_path / "theirs")
    method = {"prefix-tuning": "prefix-tuning", "adaption-prompt": "llama-adapter"}[case]
    model, _ = ours(name, method_named(method).examples()[-1])
    with pytest.raises(UnsupportedError):
        inlay.save(model, "default", tmp_path / "ours", format="peft")


def test_a_prompt_in_front_of_a_classifier(tmp_path: Path) -> None:
    """PEFT's stands where BERT's head looks for the first token."""
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="SEQ_CLS")
    peft.get_peft_model(ZOO["bert"].build(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="the two compute different things"):
        in_inlay("bert", tmp_path)


def test_a_prompt_of_a_decoder_that_classifies(tmp_path: Path) -> None:
    """PEFT wants the head in the file of a prompt, so ours must have trained it.

    Compared on rows without padding: PEFT passes no ids on, so that the model takes padding for the last token.
    """
    model, _ = ours("llama-classifier", of("prompt-tuning", length=3))
    with pytest.raises(UnsupportedError, match=r"modules_to_save=\['score'\]"):
        inlay.save(model, "default", tmp_path, format="peft")
    model, _ = ours("llama-classifier", of("prompt-tuning", length=3), modules_to_save=["score"])
    inlay.save(model, "default", tmp_path, format="peft")
    base = logits("llama-classifier", ZOO["llama-classifier"].build())
    same(in_inlay("llama-classifier", tmp_path), logits("llama-classifier", model), base)
    batch = inputs("llama-classifier")
    wrapped = peft.PeftModel.from_pretrained(ZOO["llama-classifier"].build(), tmp_path).eval()
    with torch.no_grad():
        same(wrapped(**batch).logits, model(**batch).logits, ZOO["llama-classifier"].build()(**batch).logits)


def test_several_adapters_in_one_folder(tmp_path: Path) -> None:
    """PEFT gives every adapter but the default one a folder of its own."""
    model = peft.get_peft_model(ZOO["llama"].build(), THEIRS["lora"]("llama"), adapter_name="first")
    model.add_adapter("second", THEIRS["lora"]("llama"))
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match=r"holds several adapters \(first, second\)"):
        in_inlay("llama", tmp_path)
    assert in_inlay("llama", tmp_path / "second").isfinite().all()
