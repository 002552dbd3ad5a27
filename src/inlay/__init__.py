"""inlay: small trained pieces set into a frozen model, flush with its surface.

Importing this package does not import torch: public names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "attach": "inlay.core.attach",
    "detach": "inlay.core.attach",
    "use": "inlay.core.attach",
    "adapters": "inlay.core.attach",
    "merge": "inlay.core.merge",
    "unmerge": "inlay.core.merge",
    "MergeReport": "inlay.core.merge",
    "combine": "inlay.arithmetic",
    "CombineReport": "inlay.arithmetic",
    "compile_layers": "inlay.kernels.compiled",
    "fast_paths": "inlay.core.fast_paths",
    "Adapter": "inlay.core.contracts.adapter",
    "save": "inlay.formats",
    "load": "inlay.formats",
    "LoRA": "inlay.methods.lora",
    "DoRA": "inlay.methods.dora",
    "AdaLoRA": "inlay.methods.adalora",
    "LoRAPlus": "inlay.methods.lora_plus",
    "LoRAFA": "inlay.methods.lora_fa",
    "PiSSA": "inlay.methods.pissa",
    "OLoRA": "inlay.methods.olora",
    "EVA": "inlay.methods.eva",
    "LoftQ": "inlay.methods.loftq",
    "DyLoRA": "inlay.methods.dylora",
    "VeRA": "inlay.methods.vera",
    "LoHa": "inlay.methods.loha",
    "LoKr": "inlay.methods.lokr",
    "OFT": "inlay.methods.oft",
    "BOFT": "inlay.methods.boft",
    "IA3": "inlay.methods.ia3",
    "Houlsby": "inlay.methods.houlsby",
    "Pfeiffer": "inlay.methods.pfeiffer",
    "ParallelAdapter": "inlay.methods.parallel",
    "Compacter": "inlay.methods.compacter",
    "BitFit": "inlay.methods.bitfit",
    "NormTuning": "inlay.methods.norm_tuning",
    "TrainableTokens": "inlay.methods.trainable_tokens",
    "FishMask": "inlay.methods.fish_mask",
    "LTSFT": "inlay.methods.lt_sft",
    "DiffPruning": "inlay.methods.diff_pruning",
    "PromptTuning": "inlay.methods.prompt_tuning",
    "PTuning": "inlay.methods.p_tuning",
    "MultitaskPromptTuning": "inlay.methods.multitask_prompt",
    "PrefixTuning": "inlay.methods.prefix_tuning",
    "LoReFT": "inlay.methods.loreft",
    "LLaMAAdapter": "inlay.methods.llama_adapter",
    "Stack": "inlay.methods.stack",
    "Parallel": "inlay.methods.in_parallel",
    "Average": "inlay.methods.average",
    "MAM": "inlay.methods.mam",
    "UniPELT": "inlay.methods.unipelt",
    "AdapterFusion": "inlay.methods.fusion",
    "LadderSideTuning": "inlay.methods.ladder",
    "TopLayers": "inlay.methods.top_layers",
    "FullFineTuning": "inlay.methods.full",
    "InlayError": "inlay.core.errors",
    "UserError": "inlay.core.errors",
}
__all__ = sorted([*_HOMES, "methods", "__version__"])


def __getattr__(name: str) -> Any:
    if name == "methods":
        return import_module("inlay.methods")  # a package that can be called
    if name not in _HOMES:
        raise AttributeError(f"module 'inlay' has no attribute {name!r}")
    import_module("inlay.bases")  # registers the layer types that the core can read
    import_module("inlay.kernels")  # puts the fast paths into effect
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from inlay.arithmetic import CombineReport as CombineReport
    from inlay.arithmetic import combine as combine
    from inlay.core.attach import adapters as adapters
    from inlay.core.attach import attach as attach
    from inlay.core.attach import detach as detach
    from inlay.core.attach import use as use
    from inlay.core.contracts.adapter import Adapter as Adapter
    from inlay.core.errors import InlayError as InlayError
    from inlay.core.errors import UserError as UserError
    from inlay.core.fast_paths import fast_paths as fast_paths
    from inlay.core.merge import MergeReport as MergeReport
    from inlay.core.merge import merge as merge
    from inlay.core.merge import unmerge as unmerge
    from inlay.formats import load as load
    from inlay.formats import save as save
    from inlay.kernels.compiled import compile_layers as compile_layers
    from inlay.methods import methods as methods
    from inlay.methods.adalora import AdaLoRA as AdaLoRA
    from inlay.methods.average import Average as Average
    from inlay.methods.bitfit import BitFit as BitFit
    from inlay.methods.boft import BOFT as BOFT
    from inlay.methods.compacter import Compacter as Compacter
    from inlay.methods.diff_pruning import DiffPruning as DiffPruning
    from inlay.methods.dora import DoRA as DoRA
    from inlay.methods.dylora import DyLoRA as DyLoRA
    from inlay.methods.eva import EVA as EVA
    from inlay.methods.fish_mask import FishMask as FishMask
    from inlay.methods.full import FullFineTuning as FullFineTuning
    from inlay.methods.fusion import AdapterFusion as AdapterFusion
    from inlay.methods.houlsby import Houlsby as Houlsby
    from inlay.methods.ia3 import IA3 as IA3
    from inlay.methods.in_parallel import Parallel as Parallel
    from inlay.methods.ladder import LadderSideTuning as LadderSideTuning
    from inlay.methods.llama_adapter import LLaMAAdapter as LLaMAAdapter
    from inlay.methods.loftq import LoftQ as LoftQ
    from inlay.methods.loha import LoHa as LoHa
    from inlay.methods.lokr import LoKr as LoKr
    from inlay.methods.lora import LoRA as LoRA
    from inlay.methods.lora_fa import LoRAFA as LoRAFA
    from inlay.methods.lora_plus import LoRAPlus as LoRAPlus
    from inlay.methods.loreft import LoReFT as LoReFT
    from inlay.methods.lt_sft import LTSFT as LTSFT
    from inlay.methods.mam import MAM as MAM
    from inlay.methods.multitask_prompt import MultitaskPromptTuning as MultitaskPromptTuning
    from inlay.methods.norm_tuning import NormTuning as NormTuning
    from inlay.methods.oft import OFT as OFT
    from inlay.methods.olora import OLoRA as OLoRA
    from inlay.methods.p_tuning import PTuning as PTuning
    from inlay.methods.parallel import ParallelAdapter as ParallelAdapter
    from inlay.methods.pfeiffer import Pfeiffer as Pfeiffer
    from inlay.methods.pissa import PiSSA as PiSSA
    from inlay.methods.prefix_tuning import PrefixTuning as PrefixTuning
    from inlay.methods.prompt_tuning import PromptTuning as PromptTuning
    from inlay.methods.stack import Stack as Stack
    from inlay.methods.top_layers import TopLayers as TopLayers
    from inlay.methods.trainable_tokens import TrainableTokens as TrainableTokens
    from inlay.methods.unipelt import UniPELT as UniPELT
    from inlay.methods.vera import VeRA as VeRA
