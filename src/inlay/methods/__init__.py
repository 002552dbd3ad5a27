"""The registry: one file a method, file name = registry key = command-line word (with ``-`` for ``_``).

Third parties register a method class under the entry-point group ``inlay.methods``. The package itself can be
called: ``inlay.methods()`` is the registry.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module, metadata
from types import MappingProxyType, ModuleType

from inlay.core.contracts.method import Method
from inlay.core.errors import ConfigError, nearest

# Key → module and class, in the order of the methods table.
BUILT_IN = {
    "lora": ("lora", "LoRA"),
    "dora": ("dora", "DoRA"),
    "adalora": ("adalora", "AdaLoRA"),
    "lora-plus": ("lora_plus", "LoRAPlus"),
    "lora-fa": ("lora_fa", "LoRAFA"),
    "pissa": ("pissa", "PiSSA"),
    "olora": ("olora", "OLoRA"),
    "eva": ("eva", "EVA"),
    "loftq": ("loftq", "LoftQ"),
    "dylora": ("dylora", "DyLoRA"),
    "vera": ("vera", "VeRA"),
    "loha": ("loha", "LoHa"),
    "lokr": ("lokr", "LoKr"),
    "oft": ("oft", "OFT"),
    "boft": ("boft", "BOFT"),
    "ia3": ("ia3", "IA3"),
    "houlsby": ("houlsby", "Houlsby"),
    "pfeiffer": ("pfeiffer", "Pfeiffer"),
    "parallel": ("parallel", "ParallelAdapter"),
    "compacter": ("compacter", "Compacter"),
    "bitfit": ("bitfit", "BitFit"),
    "norm-tuning": ("norm_tuning", "NormTuning"),
    "trainable-tokens": ("trainable_tokens", "TrainableTokens"),
    "fish-mask": ("fish_mask", "FishMask"),
    "lt-sft": ("lt_sft", "LTSFT"),
    "diff-pruning": ("diff_pruning", "DiffPruning"),
    "prompt-tuning": ("prompt_tuning", "PromptTuning"),
    "p-tuning": ("p_tuning", "PTuning"),
    "multitask-prompt": ("multitask_prompt", "MultitaskPromptTuning"),
    "prefix-tuning": ("prefix_tuning", "PrefixTuning"),
    "loreft": ("loreft", "LoReFT"),
    "llama-adapter": ("llama_adapter", "LLaMAAdapter"),
    "stack": ("stack", "Stack"),
    "in-parallel": ("in_parallel", "Parallel"),
    "average": ("average", "Average"),
    "mam": ("mam", "MAM"),
    "unipelt": ("unipelt", "UniPELT"),
    "fusion": ("fusion", "AdapterFusion"),
    "ladder": ("ladder", "LadderSideTuning"),
    "top-layers": ("top_layers", "TopLayers"),
    "full": ("full", "FullFineTuning"),
}
GROUP = "inlay.methods"


@cache
def registry() -> Mapping[str, type[Method]]:
    """Every known method by its key: inlay's own, then those of installed packages.

    Raises:
        ConfigError: an installed package registers something that is no method, or a key that is taken.
    """
    found: dict[str, type[Method]] = {}
    for key, (module, name) in BUILT_IN.items():
        found[key] = getattr(import_module(f"inlay.methods.{module}"), name)
    for point in metadata.entry_points(group=GROUP):
        cls = point.load()
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise ConfigError(f"entry point {point.name!r} ({point.value}) is not a subclass of inlay's Method")
        if cls.name in found:
            raise ConfigError(f"entry point {point.name!r} ({point.value}) takes the key {cls.name!r}, which is in use")
        found[cls.name] = cls
    return MappingProxyType(found)


def method_named(key: str) -> type[Method]:
    """The method class of a key, or an error with the nearest key."""
    known = registry()
    if key not in known:
        raise ConfigError(f"unknown method {key!r}{nearest(key, known)}")
    return known[key]


def methods() -> Mapping[str, type[Method]]:
    """Key → method class, for every known method."""
    return registry()


class _Callable(ModuleType):
    def __call__(self) -> Mapping[str, type[Method]]:
        return registry()


sys.modules[__name__].__class__ = _Callable
