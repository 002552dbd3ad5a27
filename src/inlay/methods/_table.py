"""The built-in methods as plain data, in the order of the methods table, and their classes for type checkers.

Written by `make docs` from the files of this folder and compared by `make check`: edit those, not this.
After a merge that leaves conflicts here, take either side whole and run `make docs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from inlay.methods._row import Row

if TYPE_CHECKING:
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

DECLARED = "3d4d46a13c99a2dd31b6e499da3046ee645a56f6acc3e362f10735bc9606b18d"
METHODS: dict[str, Row] = {
    "lora": Row(
        cls="LoRA",
        family="low rank",
        settings={
            "rank": ("int", 8),
            "alpha": ("float", 16.0),
            "dropout": ("float", 0.0),
            "rank_stabilised": ("bool", False),
            "rank_pattern": ("Mapping[str, int] | tuple[tuple[str, int], ...]", ()),
            "alpha_pattern": ("Mapping[str, float] | tuple[tuple[str, float], ...]", ()),
        },
        accounts=False,
    ),
    "dora": Row(
        cls="DoRA",
        family="low rank",
        settings={
            "rank": ("int", 8),
            "alpha": ("float", 16.0),
            "dropout": ("float", 0.0),
            "rank_pattern": ("Mapping[str, int] | tuple[tuple[str, int], ...]", ()),
            "alpha_pattern": ("Mapping[str, float] | tuple[tuple[str, float], ...]", ()),
        },
        accounts=False,
    ),
    "adalora": Row(
        cls="AdaLoRA",
        family="low rank",
        settings={
            "rank": ("int", 12),
            "target_rank": ("int", 8),
            "alpha": ("float", 16.0),
            "dropout": ("float", 0.0),
            "warmup_steps": ("int | None", None),
            "final_steps": ("int | None", None),
            "interval": ("int | None", None),
            "beta1": ("float", 0.85),
            "beta2": ("float", 0.85),
            "orthogonality": ("float", 0.1),
            "total_steps": ("int | None", None),
            "rank_pattern": ("Mapping[str, int] | tuple[tuple[str, int], ...]", ()),
        },
        accounts=False,
    ),
    "lora-plus": Row(
        cls="LoRAPlus",
        family="low rank",
        settings={"rank": ("int", 8), "alpha": ("float", 16.0), "dropout": ("float", 0.0), "ratio": ("float", 16.0)},
        accounts=False,
    ),
    "lora-fa": Row(
        cls="LoRAFA",
        family="low rank",
        settings={"rank": ("int", 8), "alpha": ("float", 16.0), "dropout": ("float", 0.0), "corrected": ("bool", True)},
        accounts=False,
    ),
    "pissa": Row(
        cls="PiSSA",
        family="low rank",
        settings={"rank": ("int", 8), "alpha": ("float | None", None), "niter": ("int | None", None)},
        accounts=False,
    ),
    "olora": Row(
        cls="OLoRA", family="low rank", settings={"rank": ("int", 8), "alpha": ("float", 16.0)}, accounts=False
    ),
    "eva": Row(
        cls="EVA",
        family="low rank",
        settings={
            "rank": ("int", 16),
            "alpha": ("float", 16.0),
            "dropout": ("float", 0.0),
            "rho": ("float", 2.0),
            "tau": ("float", 0.99),
            "labelled": ("bool", True),
            "whiten": ("bool", False),
            "rank_pattern": ("Mapping[str, int] | tuple[tuple[str, int], ...]", ()),
        },
        accounts=False,
    ),
    "loftq": Row(
        cls="LoftQ",
        family="low rank",
        settings={
            "rank": ("int", 16),
            "alpha": ("float | None", None),
            "dropout": ("float", 0.0),
            "bits": ("int | None", 4),
            "bits_pattern": ("Mapping[str, int] | tuple[tuple[str, int], ...]", ()),
            "iterations": ("int", 5),
            "niter": ("int | None", None),
        },
        accounts=True,
    ),
    "dylora": Row(
        cls="DyLoRA",
        family="low rank",
        settings={
            "rank": ("int", 8),
            "lowest": ("int", 1),
            "alpha": ("float", 16.0),
            "dropout": ("float", 0.0),
            "frozen": ("bool", False),
            "serve_rank": ("int | None", None),
            "seed": ("int", 0),
        },
        accounts=False,
    ),
    "vera": Row(
        cls="VeRA",
        family="low rank",
        settings={"rank": ("int", 256), "dropout": ("float", 0.0), "start": ("float", 0.1), "seed": ("int", 0)},
        accounts=False,
    ),
    "loha": Row(
        cls="LoHa",
        family="low rank",
        settings={
            "rank": ("int", 8),
            "alpha": ("float", 8.0),
            "rank_pattern": ("Mapping[str, int] | tuple[tuple[str, int], ...]", ()),
            "alpha_pattern": ("Mapping[str, float] | tuple[tuple[str, float], ...]", ()),
        },
        accounts=False,
    ),
    "lokr": Row(
        cls="LoKr",
        family="low rank",
        settings={
            "rank": ("int", 8),
            "alpha": ("float", 8.0),
            "factor": ("int", -1),
            "decompose_both": ("bool", False),
            "scale_whole": ("bool", False),
            "rank_pattern": ("Mapping[str, int] | tuple[tuple[str, int], ...]", ()),
            "alpha_pattern": ("Mapping[str, float] | tuple[tuple[str, float], ...]", ()),
        },
        accounts=False,
    ),
    "oft": Row(
        cls="OFT",
        family="orthogonal",
        settings={
            "block_size": ("int | None", 32),
            "blocks": ("int | None", None),
            "share_blocks": ("bool", False),
            "neumann_terms": ("int | None", None),
        },
        accounts=False,
    ),
    "boft": Row(
        cls="BOFT",
        family="orthogonal",
        settings={"block_size": ("int", 8), "factors": ("int", 2), "scaled": ("bool", False)},
        accounts=False,
    ),
    "ia3": Row(cls="IA3", family="rescaling", settings={"entering": ("tuple[str, ...] | None", None)}, accounts=False),
    "houlsby": Row(
        cls="Houlsby",
        family="adapter",
        settings={"bottleneck": ("int", 64), "nonlinearity": ("str", "gelu")},
        accounts=False,
    ),
    "pfeiffer": Row(
        cls="Pfeiffer",
        family="adapter",
        settings={"reduction": ("int", 16), "nonlinearity": ("str", "relu")},
        accounts=False,
    ),
    "parallel": Row(
        cls="ParallelAdapter",
        family="adapter",
        settings={"bottleneck": ("int", 64), "scale": ("float", 4.0), "nonlinearity": ("str", "relu")},
        accounts=False,
    ),
    "compacter": Row(
        cls="Compacter",
        family="adapter",
        settings={
            "reduction": ("int", 32),
            "divisions": ("int", 4),
            "rank": ("int", 1),
            "nonlinearity": ("str", "gelu_new"),
        },
        accounts=False,
    ),
    "bitfit": Row(cls="BitFit", family="selective", settings={}, accounts=False),
    "norm-tuning": Row(cls="NormTuning", family="selective", settings={}, accounts=False),
    "trainable-tokens": Row(
        cls="TrainableTokens",
        family="selective",
        settings={"tokens": ("tuple[int, ...]", ()), "head": ("bool", False)},
        accounts=False,
    ),
    "fish-mask": Row(
        cls="FishMask",
        family="selective",
        settings={
            "share": ("float", 0.005),
            "samples": ("int", 1024),
            "chosen": ("Mapping[str, int] | tuple[tuple[str, int], ...]", ()),
        },
        accounts=False,
    ),
    "lt-sft": Row(
        cls="LTSFT",
        family="selective",
        settings={
            "share": ("float", 0.08),
            "first_phase": ("float", 0.5),
            "total_steps": ("int | None", None),
            "chosen": ("Mapping[str, int] | tuple[tuple[str, int], ...]", ()),
        },
        accounts=False,
    ),
    "diff-pruning": Row(
        cls="DiffPruning",
        family="selective",
        settings={
            "share": ("float", 0.005),
            "structured": ("bool", True),
            "penalty": ("float", 1.25e-07),
            "gate_start": ("float", 5.0),
            "gate_rate": ("float", 10000.0),
            "first_phase": ("float", 0.5),
            "total_steps": ("int | None", None),
            "chosen": ("Mapping[str, int] | tuple[tuple[str, int], ...]", ()),
        },
        accounts=False,
    ),
    "prompt-tuning": Row(
        cls="PromptTuning",
        family="soft prompt",
        settings={
            "length": ("int", 20),
            "init": ("Literal['random', 'vocabulary', 'text', 'labels']", "vocabulary"),
            "text": ("str", ""),
            "labels": ("tuple[str, ...]", ()),
        },
        accounts=False,
    ),
    "p-tuning": Row(
        cls="PTuning",
        family="soft prompt",
        settings={
            "length": ("int", 20),
            "encoder": ("Literal['lstm', 'mlp', 'none']", "lstm"),
            "projection": ("int | None", None),
            "template": ("tuple[int | str | tuple[int, ...], ...]", ()),
        },
        accounts=False,
    ),
    "multitask-prompt": Row(
        cls="MultitaskPromptTuning",
        family="soft prompt",
        settings={
            "length": ("int", 20),
            "init": ("Literal['random', 'vocabulary', 'text']", "vocabulary"),
            "text": ("str", ""),
            "shared_with": ("str", ""),
        },
        accounts=False,
    ),
    "prefix-tuning": Row(
        cls="PrefixTuning",
        family="soft prompt",
        settings={
            "length": ("int", 20),
            "projection": ("int | None", None),
            "init": ("Literal['random', 'text']", "random"),
            "text": ("str", ""),
        },
        accounts=False,
    ),
    "llama-adapter": Row(
        cls="LLaMAAdapter",
        family="soft prompt",
        settings={"length": ("int", 10), "depth": ("int | None", None), "gate": ("Literal['tanh', 'raw']", "tanh")},
        accounts=False,
    ),
    "loreft": Row(
        cls="LoReFT",
        family="representation",
        settings={
            "rank": ("int", 8),
            "prefix": ("int | None", 7),
            "suffix": ("int | None", 7),
            "tied": ("bool", True),
            "dropout": ("float", 0.0),
        },
        accounts=False,
    ),
    "stack": Row(
        cls="Stack",
        family="composition",
        settings={
            "methods": (
                "tuple[Method, ...]",
                [
                    {"method": "ia3", "entering": None},
                    {
                        "method": "lora",
                        "rank": 8,
                        "alpha": 16.0,
                        "dropout": 0.0,
                        "rank_stabilised": False,
                        "rank_pattern": (),
                        "alpha_pattern": (),
                    },
                ],
            )
        },
        accounts=False,
    ),
    "in-parallel": Row(
        cls="Parallel",
        family="composition",
        settings={
            "methods": (
                "tuple[Method, ...]",
                [
                    {
                        "method": "lora",
                        "rank": 8,
                        "alpha": 16.0,
                        "dropout": 0.0,
                        "rank_stabilised": False,
                        "rank_pattern": (),
                        "alpha_pattern": (),
                    },
                    {"method": "parallel", "bottleneck": 64, "scale": 4.0, "nonlinearity": "relu"},
                ],
            )
        },
        accounts=False,
    ),
    "average": Row(
        cls="Average",
        family="composition",
        settings={
            "methods": (
                "tuple[Method, ...]",
                [
                    {
                        "method": "lora",
                        "rank": 8,
                        "alpha": 16.0,
                        "dropout": 0.0,
                        "rank_stabilised": False,
                        "rank_pattern": (),
                        "alpha_pattern": (),
                    },
                    {
                        "method": "lora",
                        "rank": 16,
                        "alpha": 16.0,
                        "dropout": 0.0,
                        "rank_stabilised": False,
                        "rank_pattern": (),
                        "alpha_pattern": (),
                    },
                ],
            ),
            "weights": ("tuple[float, ...]", (0.5, 0.5)),
        },
        accounts=False,
    ),
    "mam": Row(
        cls="MAM",
        family="composition",
        settings={
            "length": ("int", 30),
            "bottleneck": ("int", 512),
            "scale": ("float", 4.0),
            "projection": ("int | None", 512),
        },
        accounts=False,
    ),
    "unipelt": Row(
        cls="UniPELT",
        family="composition",
        settings={
            "reduction": ("int", 16),
            "length": ("int", 10),
            "projection": ("int | None", 512),
            "rank": ("int", 8),
        },
        accounts=False,
    ),
    "fusion": Row(
        cls="AdapterFusion",
        family="composition",
        settings={
            "adapters": ("tuple[str, ...]", ()),
            "methods": ("tuple[Method, ...]", []),
            "regularisation": ("float", 0.01),
        },
        accounts=False,
    ),
    "ladder": Row(
        cls="LadderSideTuning",
        family="side",
        settings={
            "reduction": ("int", 8),
            "expansion": ("int", 4),
            "temperature": ("float", 0.1),
            "nonlinearity": ("str", "relu"),
            "dropout": ("float", 0.0),
            "attention": ("bool | None", None),
            "output": ("Literal['side', 'both']", "side"),
        },
        accounts=False,
    ),
    "top-layers": Row(cls="TopLayers", family="baseline", settings={"top": ("int", 2)}, accounts=False),
    "full": Row(cls="FullFineTuning", family="baseline", settings={}, accounts=False),
}
