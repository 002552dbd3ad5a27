"""The private names of other libraries that inlay uses, all of them: what a new version may change without a word.

    private       a leading underscore, a module that the library's documentation leaves out, or a prototype by its name
    here          each with what it is needed for, and what public thing would take its place (*instead*)
    elsewhere     none: `tests/unit/test_private_names.py` reads every file of `src/inlay` for them

`tests/unit/core/test_upstream.py` tries each of them for what we rely on. Run it first when a library is upgraded: it
names the thing, the library, its version and what breaks (docs/compatibility.md).

What is asked at every layer of every forward is the library's very object, or stands here whole: a function around it
would cost more than it does. What torch has not is `Missing`: an error where it is used, not an import that fails.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib.metadata import version
from operator import attrgetter
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from inlay.core.errors import UnsupportedError

DE_FACTO = {
    **dict.fromkeys(
        ("_parameters", "_buffers", "_modules"),
        "what an nn.Module holds, by name and with None; subclasses of everybody's read them. Instead: nothing",
    ),
    **dict.fromkeys(
        ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
        "a module's hooks, which must see its call once. Instead: nothing",
    ),
    "_version": "how often a tensor was written in place, as autograd counts. Instead: nothing",
}
"""Attributes that may be used anywhere: of torch's modules and tensors, older than ten years and named in its own
error messages and guides for those who extend it. One test holds each."""

OVERRIDDEN = {
    "_get_train_sampler": "transformers.Trainer: the order of rows (`train/order.py`)",
    "_save_checkpoint": "transformers.Trainer: a checkpoint is the adapter and never the base (`train/trainer.py`)",
    "_load_from_checkpoint": "transformers.Trainer: the same, read",
}
"""Private methods of a library's class that a class of ours replaces; the library must go on calling them."""


class Missing:
    """In the place of what the installed torch has not.

    Raises:
        UnsupportedError: on every use: called, as a base class, in `isinstance`.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise UnsupportedError(
            f"torch {version('torch')} has no {self.name}, which inlay needs for this. Install a version that inlay "
            "was tested with: docs/compatibility.md names them"
        )

    __call__ = __mro_entries__ = __instancecheck__ = _refuse


def _found(name: str) -> Any:
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        return Missing(name.replace(":", "."))


# -- torch: whether an operation runs as it stands -------------------------------------------------------------------

_functorch_is_active: Callable[[], bool] = _found("torch:_C._are_functorch_transforms_active")


def transformed() -> bool:
    """Whether a compiler traces, or what runs is under `torch.func` or forward differentiation.

    Needed where an autograd function of ours has no rule for these, or a result would be kept.
    Instead: nothing; torch says it about compilers only.
    """
    return (
        torch.compiler.is_compiling()  # first, so that a compiler asks no further
        or _functorch_is_active()
        or forward_ad._current_level >= 0
    )


has_any_global_hook: Callable[[], bool] = _found("torch:nn.modules.module._has_any_global_hook")
"""Whether something was registered for every module (`register_module_forward_hook`), and must see each call.
Instead: nothing."""

autocasts_anywhere: Callable[[], bool] = _found("torch:_C._is_any_autocast_enabled")
"""Whether any device's autocast is on: prompts made under it are not kept.
Instead: `torch.is_autocast_enabled(device)` for each device there may be."""

# -- torch: tensors ----------------------------------------------------------------------------------------------------

is_view: Callable[[Tensor], bool] = _found("torch:Tensor._is_view")
"""Whether a tensor shares another's storage, so that writing it would change what somebody else holds.
Instead: nothing."""

storage_number: Callable[[Any], int] = attrgetter("_cdata")
"""Tells storages apart that have no address, on the meta device; valid while the storage is held (`plan/`).
Instead: `data_ptr`, were it not 0 there."""

make_wrapper_subclass: Callable[..., Any] = _found("torch:Tensor._make_wrapper_subclass")
"""A tensor of a shape without numbers behind it (`kernels/lazy.py`), as torch's guide to subclasses makes it.
Instead: nothing."""

NoTorchFunction: Callable[[], AbstractContextManager[None]] = _found("torch:_C.DisableTorchFunctionSubclass")
"""A context in which operations on a subclass are torch's own, as torch's guide to subclasses has it.
Instead: nothing."""

# -- torch: operations seen one by one (`plan/ledger.py`) --------------------------------------------------------------

TorchDispatchMode: Any = _found("torch.utils._python_dispatch:TorchDispatchMode")
"""The base of a context that sees every operation. Instead: nothing."""

tree_leaves: Callable[[Any], list[Any]] = _found("torch.utils._pytree:tree_leaves")
tree_map_only: Callable[..., Any] = _found("torch.utils._pytree:tree_map_only")
"""Tensors in nested arguments, in order; and such arguments with each of a type replaced.
Instead: nothing in torch; optree is a package of its own."""

schema_of: Callable[[Any], Any] = attrgetter("_schema")
"""Of an operation: `is_mutable` says that it writes an argument. Instead: nothing."""

LOOK_AT_NUMBER: Any = _found("torch:ops.aten._local_scalar_dense.default")
"""What `float(tensor)` and `if tensor` call. Instead: nothing."""

GROUPED_PRODUCT: Any = _found("torch:ops.aten._grouped_mm.default")
"""What `F.grouped_mm` calls, as an operation that is seen. Instead: nothing."""

# -- torch: kernels ----------------------------------------------------------------------------------------------------

flash_on_cpu: Any = _found("torch:ops.aten._scaled_dot_product_flash_attention_for_cpu")
flash_on_cpu_backward: Any = _found("torch:ops.aten._scaled_dot_product_flash_attention_for_cpu_backward")
"""Attention with the log-sum-exp of its scores, which merges a prefix's with a text's, and its backward pass.
Instead: `F.scaled_dot_product_attention`, did it return the log-sum-exp; flex attention does, compiled only."""

safe_softmax: Callable[..., Tensor] = _found("torch:_safe_softmax")
"""Softmax that makes a row of nothing but -inf zero, in one pass. Instead: `softmax` and a fill, two passes."""

softmax_backward: Callable[..., Tensor] = _found("torch:_softmax_backward_data")
"""Its derivative in one pass, written where it is told to. Instead: two products and a sum."""

pack_int4: Callable[[Tensor, int], Tensor] = _found("torch:ops.aten._convert_weight_to_int4pack_for_cpu")
"""Packs codes as torchao's int4 weights on a CPU are packed, from which we learn to unpack them.
Instead: a public way to unpack or dequantise such a weight."""

# -- torch: compiled modules -------------------------------------------------------------------------------------------

call_of: Callable[[nn.Module], Callable[..., Any]] = attrgetter("_call_impl")
"""What `module(...)` runs where nothing is compiled: hooks and forward. Instead: `nn.Module.compile` compiles the same,
but with and without gradients, and has no undo."""

compiled_call_of: Callable[[nn.Module], Callable[..., Any] | None] = attrgetter("_compiled_call_impl")
"""What runs in its place, where `nn.Module.compile` or we have set it. Instead: as above."""


def compile_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Let `module(...)` run `call`; None is its own code. Instead: as above."""
    module._compiled_call_impl = call


COMPILED_FROM = "_orig_mod"
"""The child of a compiled module that is the module itself. Instead: nothing."""


def compiler_errors() -> tuple[type[Exception], ...]:
    """What `torch.compile` raises where it cannot, as against what the model itself raises. Instead: nothing."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return TorchDynamoException, InductorError


# -- transformers ------------------------------------------------------------------------------------------------------

CHECKPOINTS_BY = "_gradient_checkpointing_func"
"""The attribute of a layer that a checkpointed one is run by; its class makes a property of it
(`core/class_exchange.py`). Instead: nothing."""


def attention_named(config: Any) -> str | None:
    """The implementation of attention that a configuration names. Instead: nothing."""
    found: str | None = config._attn_implementation
    return found


def name_attention(config: Any, name: str | None) -> None:
    """Let attention modules with this configuration look up another implementation.

    Instead: `model.set_attn_implementation`, which takes names of the library's own and checks them against the model.
    """
    config._attn_implementation = name


def losses() -> Mapping[str, Callable[..., Any]]:
    """The losses that models take by their type: one that is not among these was put in by somebody.

    Instead: nothing.
    """
    from transformers.loss.loss_utils import LOSS_MAPPING

    found: Mapping[str, Callable[..., Any]] = LOSS_MAPPING
    return found


def render_chats(**options: Any) -> tuple[list[str], list[Any]]:
    """Chats as texts, and the stretches of each that the assistant said.

    Instead: `apply_chat_template`, did it return stretches of the text and take a chat without a message.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(**options)
    return texts, spans


def inputs_for(trainer: Any, batch: Any) -> Any:
    """A batch on the device of a `Trainer`. Instead: accelerate's `send_to_device`, without what a Trainer adds."""
    return trainer._prepare_inputs(batch)


def save_progress(trainer: Any, folder: str) -> None:
    """Write a `Trainer`'s optimizer, schedule and random states as it reads them on resuming. Instead: nothing."""
    trainer._save_optimizer_and_scheduler(folder)
    trainer._save_rng_state(folder)
    trainer._save_scaler(folder)  # where there is one


def use_one_device(arguments: Any) -> None:
    """Keep a `Trainer` from copying the model to every GPU: copies in threads would share the routes of rows.

    Instead: CUDA_VISIBLE_DEVICES, before the process starts.
    """
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1


# -- accelerate --------------------------------------------------------------------------------------------------------


def gradient_state() -> dict[str, Any]:
    """What accelerate knows of the step that is under way, one dictionary for the process and all of its threads.

    Needed to leave a training loop between two steps and go on with it later (`train/turns.py`). Instead: nothing.
    """
    from accelerate.state import GradientState

    found: dict[str, Any] = GradientState._shared_state
    return found


# -- torchao -----------------------------------------------------------------------------------------------------------


def int4_tensor() -> Any:
    """The type of its int4 weights for a CPU, a prototype. Instead: nothing."""
    from torchao.prototype.quantization.int4 import Int4OpaqueTensor

    return Int4OpaqueTensor


def int4_config(group_size: int) -> Any:
    """What makes such weights. Instead: nothing."""
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=group_size)
