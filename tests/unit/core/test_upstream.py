"""Every private thing of another library is still there and still does what we rely on (`core/upstream.py`).

A failure names the thing, the library, its version and what breaks. What is tried is what inlay does with the thing,
without inlay: so that it is the library that has changed.
"""

from __future__ import annotations

import ast
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core import upstream
from inlay.core.errors import UnsupportedError

Try = Callable[..., None]


@dataclass(frozen=True)
class Check:
    library: str
    names: tuple[str, ...]
    breaks: str
    run: Try


CHECKS: list[Check] = []


def of(library: str, *names: str, breaks: str) -> Callable[[Try], Try]:
    """The decorated function tries these names of `core/upstream.py`."""

    def note(run: Try) -> Try:
        CHECKS.append(Check(library, names, breaks, run))
        return run

    return note


# -- what torch's modules and tensors hold -------------------------------------------------------


@of("torch", "_parameters", "_buffers", "_modules", breaks="everything: selecting, attaching, merging, fingerprints")
def holds(_: Path) -> None:
    module = nn.BatchNorm1d(2, affine=False)
    assert module._parameters == {"weight": None, "bias": None}
    assert list(module._buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    module._parameters["weight"] = weight = nn.Parameter(torch.ones(2))
    assert module.weight is weight and list(module.parameters()) == [weight]
    module._modules["child"] = child = nn.Linear(1, 1)
    assert module.child is child and dict(module.named_children()) == {"child": child}


HOOKS = {
    "_forward_hooks": nn.Module.register_forward_hook,
    "_forward_pre_hooks": nn.Module.register_forward_pre_hook,
    "_backward_hooks": nn.Module.register_full_backward_hook,
    "_backward_pre_hooks": nn.Module.register_full_backward_pre_hook,
}


@of("torch", *HOOKS, breaks="fast paths leave out a module that somebody watches: hooks see nothing")
def hooks(_: Path) -> None:
    for name, register in HOOKS.items():
        module = nn.Linear(1, 1)
        assert not getattr(module, name)
        handle = register(module, lambda *_: None)  # type: ignore[operator]
        assert getattr(module, name), f"{register} leaves nothing in {name}"
        handle.remove()
        assert not getattr(module, name)


@of("torch", "_version", breaks="prompts and routes that were computed once are used when weights have changed since")
def versions(_: Path) -> None:
    tensor = torch.ones(2)
    before = tensor._version
    tensor.add_(1)
    tensor[0] = 3
    assert tensor._version > before
    assert tensor.detach()._version == tensor._version


# -- whether an operation runs as it stands ------------------------------------------------------


@of(
    "torch",
    "transformed",
    breaks="autograd functions of ours run under torch.func, which they have no rules for",
)
def transformed(_: Path) -> None:
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        seen.append(upstream.transformed())
        return x * x

    x = torch.ones(2)
    function(x.requires_grad_()).sum().backward()
    assert seen == [False]
    for run in (torch.func.vmap(function), torch.func.jacrev(function), torch.func.jacfwd(function)):
        run(x.detach())
    assert seen[1:] == [True, True, True]
    with torch.autograd.forward_ad.dual_level():
        function(torch.autograd.forward_ad.make_dual(x.detach(), x.detach()))
    assert seen[4:] == [True] and not upstream.transformed()


@of("torch", "has_any_global_hook", breaks="fast paths leave out modules that a hook for all of them must see")
def has_any_global_hook(_: Path) -> None:
    assert not upstream.has_any_global_hook()
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda *_: None)  # type: ignore[operator]
        assert upstream.has_any_global_hook()
        handle.remove()
    assert not upstream.has_any_global_hook()


@of("torch", "autocasts_anywhere", breaks="prompts computed under autocast are used outside of it")
def autocasts_anywhere(_: Path) -> None:
    assert not upstream.autocasts_anywhere()
    with torch.autocast("cpu", torch.bfloat16):
        assert upstream.autocasts_anywhere()
        with torch.autocast("cpu", enabled=False):
            assert not upstream.autocasts_anywhere()


# -- tensors -------------------------------------------------------------------------------------


@of("torch", "is_view", breaks="a low-rank update is written into a tensor that somebody else holds")
def is_view(_: Path) -> None:
    whole = torch.zeros(2, 2)
    assert not upstream.is_view(whole) and upstream.is_view(whole[0]) and upstream.is_view(whole.t())
    assert not upstream.is_view(whole @ whole)


@of("torch", "storage_number", breaks="the planner counts storages twice, or takes two for one")
def storage_number(_: Path) -> None:
    one, other = torch.empty(3, device="meta"), torch.empty(3, device="meta")
    number = upstream.storage_number(one.untyped_storage())
    assert number == upstream.storage_number(one[1:].untyped_storage())
    assert number != upstream.storage_number(other.untyped_storage())


@of("torch", "make_wrapper_subclass", "NoTorchFunction", breaks="logits that are computed when somebody looks at them")
def subclasses(_: Path) -> None:
    called: list[str] = []

    class Shell(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append("function")
            with upstream.NoTorchFunction():
                return func(*args, **(kwargs or {}))

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
            called.append("dispatch")
            return torch.ones(3)

    made = upstream.make_wrapper_subclass(Shell, (3,), dtype=torch.float64, device="cpu")
    assert type(made) is Shell
    assert tuple(made.shape) == (3,) and made.dtype == torch.float64
    called.clear()
    assert torch.neg(made).tolist() == [1, 1, 1]
    assert called == ["function", "dispatch"]


# -- operations seen one by one ------------------------------------------------------------------


@of(
    "torch", "TorchDispatchMode", "tree_leaves", "tree_map_only", "schema_of", "LOOK_AT_NUMBER", "GROUPED_PRODUCT",
    breaks="`inlay plan`: what a step allocates is found by seeing its operations",
)  # fmt: skip
def operations(_: Path) -> None:
    seen: list[Any] = []

    class Look(upstream.TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Look():
        x = torch.ones(2, 3)
        x.add_(1)
        x.sum().item()
        F.grouped_mm(x.bfloat16().repeat(8, 8), torch.ones(2, 24, 16).bfloat16(), offs=torch.tensor([8, 16]).int())
    writes = [func.overloadpacket for func in seen if upstream.schema_of(func).is_mutable]
    assert writes == [torch.ops.aten.add_]
    assert upstream.LOOK_AT_NUMBER in seen and upstream.GROUPED_PRODUCT in seen
    assert upstream.tree_leaves(({"a": 1}, [2, (3,)])) == [1, 2, 3]
    assert upstream.tree_map_only(int, lambda n: n + 1, ([1, "x"], {"b": 2})) == ([2, "x"], {"b": 3})


# -- kernels -------------------------------------------------------------------------------------


@of(
    "torch", "flash_on_cpu", "flash_on_cpu_backward",
    breaks="prefixes as a second attention, the faster backward pass of attention on a CPU, `inlay plan`",
)  # fmt: skip
def flash(_: Path) -> None:
    torch.manual_seed(0)
    for causal in (False, True):
        query, key, value, grad = torch.randn(4, 2, 3, 5, 8)
        mask = None if causal else torch.randn(2, 3, 5, 5)
        scores = query @ key.transpose(2, 3) * 0.3
        scores = scores + torch.full((5, 5), -math.inf).triu_(1) if mask is None else scores + mask
        out, lse = upstream.flash_on_cpu(query, key, value, 0.0, causal, attn_mask=mask, scale=0.3)
        torch.testing.assert_close(out, scores.softmax(-1) @ value)
        torch.testing.assert_close(lse, scores.logsumexp(-1))
        found = upstream.flash_on_cpu_backward(
            grad, query, key, value, out, lse, 0.0, causal, attn_mask=mask, scale=0.3
        )
        leaves = [t.clone().requires_grad_() for t in (query, key, value)]
        plain = F.scaled_dot_product_attention(*leaves, attn_mask=mask, is_causal=causal, scale=0.3)
        for ours, expected in zip(found, torch.autograd.grad(plain, leaves, grad), strict=True):
            torch.testing.assert_close(ours, expected)
        meta = upstream.flash_on_cpu(*(t.to("meta") for t in (query, key, value)), 0.0, causal)
        assert [t.shape for t in meta] == [out.shape, lse.shape]


@of("torch", "safe_softmax", breaks="attention with dropout on a CPU: rows without a key become NaN")
def safe_softmax(_: Path) -> None:
    scores = torch.tensor([[0.0, 1.0], [-math.inf, -math.inf]])
    torch.testing.assert_close(upstream.safe_softmax(scores, -1), torch.stack([scores[0].softmax(-1), torch.zeros(2)]))


@of("torch", "softmax_backward", breaks="the faster backward pass of attention on a CPU")
def softmax_backward(_: Path) -> None:
    torch.manual_seed(0)
    scores, grad = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    shares = scores.softmax(-1)
    (expected,) = torch.autograd.grad(shares, scores, grad, retain_graph=True)
    upstream.softmax_backward(grad, shares.detach(), -1, torch.float32, grad_input=grad)  # where the gradient stood
    torch.testing.assert_close(grad, expected)


@of("torch", "pack_int4", breaks="int4 weights of torchao: unpacking them")
def pack_int4(_: Path) -> None:
    codes = torch.arange(128, dtype=torch.int32).view(64, 2).remainder(16).int()
    packed = upstream.pack_int4(codes, 1)
    assert packed.dtype == torch.uint8 and packed.numel() == codes.numel() // 2
    both = torch.cat([packed.flatten() & 15, packed.flatten() >> 4])
    assert both.sort().values.tolist() == codes.flatten().sort().values.tolist()


# -- compiled modules ----------------------------------------------------------------------------


@of("torch", "call_of", "compiled_call_of", "compile_call", breaks="`--compile` and inlay.compile_layers")
def calls(_: Path) -> None:
    module, x = nn.Linear(2, 2), torch.ones(2)
    called: list[str] = []
    module.register_forward_hook(lambda *_: called.append("hook"))
    own = upstream.call_of(module)
    assert upstream.compiled_call_of(module) is None
    upstream.compile_call(module, lambda x: called.append("ours") or own(x))
    module(x)
    assert called == ["ours", "hook"]
    upstream.compile_call(module, None)
    module(x)
    assert called == ["ours", "hook", "hook"]
    module.compile(backend="eager")
    assert upstream.compiled_call_of(module) is not None


@of("torch", "COMPILED_FROM", breaks="inlay.use and inlay.attach on what torch.compile(model) gives")
def compiled_from(_: Path) -> None:
    module = nn.Linear(2, 2)
    assert torch.compile(module, backend="eager")._modules[upstream.COMPILED_FROM] is module


@of("torch", "compiler_errors", breaks="`--compile` where nothing can be compiled: a traceback instead of a message")
def compiler_errors(_: Path) -> None:
    def backend(*_: Any) -> Any:
        raise ValueError("no")

    torch.compiler.reset()
    raised: Any = None
    try:
        torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    except Exception as error:
        raised = error
    assert isinstance(raised, upstream.compiler_errors())
    assert not any(issubclass(ValueError, known) for known in upstream.compiler_errors())


# -- transformers --------------------------------------------------------------------------------


def llama() -> Any:
    from inlay.testing.models import ZOO

    return ZOO["llama"].build()


IDS = torch.tensor([[1, 2, 3]])


@of("transformers", "CHECKPOINTS_BY", breaks="gradient checkpointing: layers recompute under another adapter")
def checkpoints_by(_: Path) -> None:
    model = llama().train()
    model.gradient_checkpointing_enable()
    layers = [m for m in model.modules() if upstream.CHECKPOINTS_BY in m.__dict__ and m is not model.model]
    assert layers == list(model.model.layers)
    assert all(m.gradient_checkpointing for m in layers), "class_exchange looks for this attribute"
    called: list[Any] = []
    for layer in layers:
        setattr(layer, upstream.CHECKPOINTS_BY, lambda run, *args: (called.append(run), run(*args))[1])
    model(input_ids=IDS)
    owners = [getattr(run.args[0] if hasattr(run, "args") else run, "__self__", run.args[0]) for run in called]
    assert owners == layers, "class_exchange finds the layer that a checkpoint runs"


@of("transformers", "attention_named", "name_attention", breaks="prefixes, gated prompts and packing: never called")
def attention_names(_: Path) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    model, called = llama(), list[str]()
    original = upstream.attention_named(model.config)
    assert original == "sdpa"
    name = "inlay_tried_here"

    def attention(module: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(type(module).__name__)
        return AttentionInterface()["sdpa"](module, *args, **kwargs)

    expected = model(input_ids=IDS).logits
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, AttentionMaskInterface()["sdpa"])
    assert AttentionInterface()[name] is attention and "nowhere" not in AttentionInterface()
    upstream.name_attention(model.config, name)
    assert upstream.attention_named(model.config) == name
    torch.testing.assert_close(model(input_ids=IDS).logits, expected)
    assert called == ["LlamaAttention"] * len(model.model.layers)
    upstream.name_attention(model.config, original)
    model(input_ids=IDS)
    assert len(called) == len(model.model.layers)


@of("transformers", "losses", breaks="the loss at labelled positions only is never taken, or taken for another loss")
def losses(_: Path) -> None:
    from inlay.testing.models import ZOO

    for name in ("llama", "gpt2", "opt"):
        assert ZOO[name].build().loss_function in upstream.losses().values(), name
    assert (lambda *_: None) not in upstream.losses().values()


@of("transformers", "render_chats", breaks="chats as training data, and as prompts")
def render_chats(_: Path) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    chat = [{"role": "user", "content": "hm"}, {"role": "assistant", "content": "yes"}]
    options: dict[str, Any] = {"chat_template": template, "return_assistant_tokens_mask": True}
    texts, spans = upstream.render_chats(conversations=[chat], add_generation_prompt=False, **options)
    assert texts == ["<user>hm<assistant>yes"] and [texts[0][a:b] for a, b in spans[0]] == ["yes"]
    texts, _spans = upstream.render_chats(conversations=[[]], chat_template=template, add_generation_prompt=True)
    assert texts == ["<a>"], "an empty chat is what an assistant's opening turn follows"


@of(
    "transformers", "inputs_for", "save_progress", "use_one_device", *upstream.OVERRIDDEN,
    breaks="`inlay train`: rows in another order, checkpoints of the whole base, runs that cannot be resumed",
)  # fmt: skip
def trainers(folder: Path) -> None:
    from transformers import Trainer, TrainingArguments

    called: list[str] = []

    class Net(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"loss": super().forward(x).square().mean()}

    class Own(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            called.append("sampler")
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            path = folder / f"checkpoint-{self.state.global_step}"
            path.mkdir()
            upstream.save_progress(self, str(path))
            self.state.save_to_json(str(path / "trainer_state.json"))
            called.append(f"saved {self.state.global_step}")

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            called.append(f"loaded {Path(resume_from_checkpoint).name}")

        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
            assert upstream.inputs_for(self, inputs)["x"].device == model.weight.device
            return super().training_step(model, inputs, num_items_in_batch)

    def trainer(steps: int) -> Own:
        arguments = TrainingArguments(
            output_dir=str(folder), max_steps=steps, save_steps=1, per_device_train_batch_size=2, report_to=[],
            disable_tqdm=True, use_cpu=True, remove_unused_columns=False, log_level="error",
        )  # fmt: skip
        assert arguments.train_batch_size == 2
        return Own(model=Net(2, 1), args=arguments, train_dataset=[{"x": torch.ones(2)}] * 8)

    trainer(2).train()
    assert called == ["sampler", "saved 1", "saved 2"]
    names = {path.name for path in (folder / "checkpoint-1").iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth"} <= names
    again, checkpoint = trainer(2), str(folder / "checkpoint-1")
    (folder / "checkpoint-2").rename(folder / "before")
    called.clear()
    again.train(resume_from_checkpoint=checkpoint)
    assert called == ["loaded checkpoint-1", "sampler", "saved 2"]
    steps = [s["step"] for s in again.optimizer.state.values()]
    assert steps == [2, 2], "the optimizer goes on from what save_progress has written"
    again.args._n_gpu = 2
    upstream.use_one_device(again.args)
    assert again.args.n_gpu == 1 and again.args.train_batch_size == 2


# -- accelerate, torchao -------------------------------------------------------------------------


@of(
    "accelerate",
    "gradient_state",
    breaks="several runs in turns: one takes another's step for its own",
)
def gradient_state(_: Path) -> None:
    from accelerate.state import GradientState

    before = dict(upstream.gradient_state())
    try:
        GradientState()
        state = upstream.gradient_state()
        assert vars(GradientState()) is state
        state["sync_gradients"] = False
        elsewhere: list[bool] = []
        thread = threading.Thread(target=lambda: elsewhere.append(GradientState().sync_gradients))
        thread.start()
        thread.join()
        assert elsewhere == [False], "one state for all threads"
        kept = dict(state)
        state.clear()
        assert GradientState().sync_gradients is True
        state.clear()
        state.update(kept)
        assert GradientState().sync_gradients is False
    finally:
        upstream.gradient_state().clear()
        upstream.gradient_state().update(before)


@of("torchao", "int4_tensor", "int4_config", breaks="bases in torchao's int4")
def int4(_: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import quantize_

    layer = nn.Sequential(nn.Linear(64, 32, dtype=torch.bfloat16))
    weight = layer[0].weight.detach()
    quantize_(layer, upstream.int4_config(32))
    packed: Any = layer[0].weight
    assert isinstance(packed, upstream.int4_tensor())
    assert packed.qdata.dtype == torch.uint8 and packed.qdata.numel() == weight.numel() // 2
    assert tuple(packed.scale_and_zero.shape) == (2, 32, 2) and list(packed.block_size) == [1, 32]
    again = upstream.int4_tensor().from_hp(weight, [1, 32])
    assert torch.equal(again.qdata, packed.qdata)


# -- the list ------------------------------------------------------------------------------------


def listed() -> list[str]:
    """The names of `core/upstream.py`, but what it is made of."""
    tree = ast.parse(Path(upstream.__file__).read_text(encoding="utf-8"))
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assigned = [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    assigned += [target for node in tree.body if isinstance(node, ast.Assign) for target in node.targets]
    names = {*functions, *(target.id for target in assigned if isinstance(target, ast.Name))}
    names = {name for name in names if not name.startswith("_")} - {"DE_FACTO", "OVERRIDDEN"}
    return sorted({*names, *upstream.DE_FACTO, *upstream.OVERRIDDEN})


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.run.__name__)
def test_upstream(check: Check, tmp_path: Path, accelerator_state: None) -> None:
    try:
        check.run(tmp_path)
    except Exception as error:
        pytest.fail(
            f"{check.library} {version(check.library)} has changed {' or '.join(check.names)}: "
            f"{type(error).__name__}: {error}\nIt breaks {check.breaks}.\n"
            "Mend it in src/inlay/core/upstream.py, which says what it is needed for."
        )


def test_everything_is_tried() -> None:
    assert sorted(name for check in CHECKS for name in check.names) == listed()


def test_what_is_missing_is_an_error_where_it_is_used() -> None:
    missing = upstream._found("torch:nn.modules.module._gone")

    def inherit() -> None:
        class Made(missing):  # type: ignore[misc]
            pass

    for use in (missing, inherit, lambda: isinstance(3, missing)):
        with pytest.raises(UnsupportedError) as error:
            use()
        assert f"torch {version('torch')} has no torch.nn.modules.module._gone" in str(error.value)
