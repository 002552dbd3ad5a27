"""Write the golden adapter files of tests/formats/golden with the code of an older commit.

    git worktree add ../old 5be198e
    PYTHONPATH=../old/src:. python scripts/write_golden_adapters.py

The committed files were written at 5be198e, with PEFT 0.21.2. They are what users have on their disks, so they
are never written anew to make a test pass: `tests/formats/test_golden.py` loads them with the code of today. A
new case, or a new format, is added with the code that first wrote it: name the cases to write behind the script.

Each folder holds one adapter on a tiny model of the zoo, every value random; `expected.json` has a few of its logits
in float32, and the bare model's.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file

import inlay
from inlay.cli.main import main as command
from inlay.methods import method_named
from inlay.testing.models import ZOO
from inlay.train import RunConfig, run
from tests import tiny
from tests.formats.golden_bases import base, folder_of, sampled, uniform
from tests.golden.hand import shake

GOLDEN = Path(__file__).parents[1] / "tests/formats/golden"
FILE = "adapter.safetensors"
SIZE = 0.3  # of the random part of every trained value
DOWN, UP = "adapter_down.0", "adapter_up"


def of(key: str, *members: Any, **fields: Any) -> Any:
    return method_named(key)(*members, **fields)


# inlay's own files: case → (model, method, arguments of attach). One at least of every kind of piece and storage.
NATIVE: dict[str, tuple[str, Callable[[], Any], dict[str, Any]]] = {
    "lora": ("llama", lambda: of("lora", rank=2, alpha=5.0, rank_pattern={"v_proj": 3}), {}),
    "lora-fused": ("gpt2", lambda: of("lora", rank=2, rank_stabilised=True), {}),
    "lora-experts": ("mixtral", lambda: of("lora", rank=2), {"where": "all-linear", "layers": [1]}),
    "lora-head": ("bert", lambda: of("lora", rank=2), {"layers": [1], "modules_to_save": ["classifier"]}),
    "lora-convolutions": ("sequential", lambda: of("lora", rank=2), {"where": ["0", "3", "6"]}),
    "dora": ("bert", lambda: of("dora", rank=2), {"layers": [0]}),
    "adalora": ("llama", lambda: of("adalora", rank=3, target_rank=2), {"where": ["query", "down"], "layers": [1]}),
    "lora-fa": ("llama", lambda: of("lora-fa", rank=2), {"layers": [1]}),
    "pissa": ("llama", lambda: of("pissa", rank=2), {"where": ["query", "value"], "layers": [1]}),
    "loftq": ("llama", lambda: of("loftq", rank=2), {"where": ["query"], "layers": [1]}),
    "dylora": ("llama", lambda: of("dylora", rank=3), {"layers": [1]}),
    "vera": ("llama", lambda: of("vera", rank=4), {}),
    "loha": ("llama", lambda: of("loha", rank=2), {"layers": [1]}),
    "lokr": ("llama", lambda: of("lokr", rank=1, factor=4), {}),
    "oft": ("llama", lambda: of("oft", block_size=8), {}),
    "boft": ("llama", lambda: of("boft", block_size=8, factors=2), {"layers": [1]}),
    "ia3": ("t5", lambda: of("ia3"), {}),
    "houlsby": ("bert", lambda: of("houlsby", bottleneck=4), {}),
    "parallel": ("bart", lambda: of("parallel", bottleneck=4), {}),
    "compacter": ("bert", lambda: of("compacter", reduction=4), {}),
    "bitfit": ("bert", lambda: of("bitfit"), {}),
    "norm-tuning": ("gpt2", lambda: of("norm-tuning"), {}),
    "trainable-tokens": ("qwen3", lambda: of("trainable-tokens", tokens=tuple(range(3, 90, 4)), head=True), {}),
    "fish-mask": ("bert", lambda: of("fish-mask", share=0.1), {"where": ["query", "classifier"]}),
    "diff-pruning": ("sequential", lambda: of("diff-pruning", share=0.1, total_steps=4), {"where": ["0", "3", "9"]}),
    "full": ("sequential", lambda: of("full"), {}),
    "top-layers": ("sequential", lambda: of("top-layers", top=1), {}),
    "prompt-tuning": ("llama", lambda: of("prompt-tuning", length=3, init="random"), {}),
    "p-tuning": ("llama", lambda: of("p-tuning", length=3, encoder="mlp", projection=8, template=(1, (5, 9), 2)), {}),
    "p-tuning-lstm": ("llama", lambda: of("p-tuning", length=2, encoder="lstm", projection=4), {}),
    "multitask-prompt": ("llama", lambda: of("multitask-prompt", length=3), {}),
    "prefix-tuning": ("t5", lambda: of("prefix-tuning", length=3, projection=4), {}),
    "prefix-tuning-flat": ("llama", lambda: of("prefix-tuning", length=3, projection=None), {}),
    "llama-adapter": ("llama", lambda: of("llama-adapter", length=3, depth=1), {}),
    "loreft": ("llama", lambda: of("loreft", rank=2, prefix=2, suffix=3), {}),
    "stack": ("llama", lambda: of("stack", of("ia3"), of("lora", rank=2)), {"layers": [1]}),
    "in-parallel": ("llama", lambda: of("in-parallel", of("lora", rank=2), of("houlsby", bottleneck=4)), {}),
    "average": ("llama", lambda: of("average", {of("lora", rank=1): 0.75, of("lora", rank=2): 0.25}), {}),
    "unipelt": ("bert", lambda: of("unipelt", reduction=8, length=3, projection=4, rank=2), {}),
    "fusion": ("bert", lambda: of("fusion", methods=tuple(of("pfeiffer", reduction=r) for r in (8, 16))), {}),
    "ladder": ("llama", lambda: of("ladder", reduction=4, expansion=2), {}),
}

# PEFT's own files: case → (model, configuration).
LLAMA = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
ONE = LLAMA | {"layers_to_transform": [1]}
PEFT: dict[str, tuple[str, Callable[[], Any]]] = {
    "lora": ("llama", lambda: peft.LoraConfig(r=2, lora_alpha=5, rank_pattern={"v_proj": 3}, **LLAMA)),
    "lora-head": ("bert", lambda: peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")),
    "dora": ("llama", lambda: peft.LoraConfig(r=2, use_dora=True, use_rslora=True, **ONE)),
    "ia3": ("llama", lambda: peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")),
    "prefix-tuning": ("llama", lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "prompt-tuning": ("llama", lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")),
    "adalora": ("llama", lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=9, **ONE)),
    "vera": ("llama", lambda: peft.VeraConfig(r=4, **LLAMA)),
    "oft": ("llama", lambda: peft.OFTConfig(oft_block_size=8, **LLAMA)),
}  # fmt: skip
# inlay's adapters in PEFT's format: the native case that is written so.
EXPORTED = ("lora", "lora-head", "ia3", "oft", "prompt-tuning", "prefix-tuning-flat")

# AdapterHub's files, under the names that its documentation and source give: case → (model, configuration, shapes).
PLACES = [f"bert.encoder.layer.{i}.{p}.adapters.mine" for i in (0, 1) for p in ("attention.output", "output")]
PREFIX = "bert.prefix_tuning.prefix_tunings.mine.self_prefix"
ADAPTERHUB: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...]]]] = {
    "bottleneck": (
        "bert",
        {
            "adapter_residual_before_ln": False, "cross_adapter": False, "dropout": 0.0, "factorized_phm_W": True,
            "factorized_phm_rule": False, "hypercomplex_nonlinearity": "glorot-uniform", "init_weights": "bert",
            "inv_adapter": None, "inv_adapter_reduction_factor": None, "is_parallel": False, "learn_phm": True,
            "leave_out": [], "ln_after": False, "ln_before": False, "mh_adapter": True, "non_linearity": "swish",
            "original_ln_after": True, "original_ln_before": False, "output_adapter": True, "phm_bias": True,
            "phm_c_init": "normal", "phm_dim": 4, "phm_init_range": 0.0001, "phm_layer": False, "phm_rank": 1,
            "reduction_factor": 8, "residual_before_ln": True, "scaling": 1.0, "shared_W_phm": False,
            "shared_phm_rule": True, "stochastic_depth": 0.0, "use_gating": False,
        },
        {f"{p}.{DOWN}.weight": (4, 32) for p in PLACES} | {f"{p}.{DOWN}.bias": (4,) for p in PLACES}
        | {f"{p}.{UP}.weight": (32, 4) for p in PLACES} | {f"{p}.{UP}.bias": (32,) for p in PLACES},
    ),
    "lora": (
        "bert",
        {
            "architecture": "lora", "alpha": 6, "attn_matrices": ["q", "v"], "composition_mode": "add",
            "dropout": 0.0, "init_weights": "lora", "intermediate_lora": False, "leave_out": [],
            "output_lora": False, "r": 3, "selfattn_lora": True, "use_gating": False, "vera_d": None,
            "vera_b": None, "dtype": None,
        },
        {
            f"bert.encoder.layer.{i}.attention.self.{q}.loras.mine.lora_{m}": shape
            for i in (0, 1) for q in ("query", "value") for m, shape in (("A", (3, 32)), ("B", (32, 3)))
        },
    ),
    "prefix": (
        "bert",
        {
            "architecture": "prefix_tuning", "bottleneck_size": 6, "cross_prefix": True, "dropout": 0.0,
            "encoder_prefix": True, "flat": False, "leave_out": [], "non_linearity": "tanh", "prefix_length": 3,
            "shared_gating": True, "use_gating": False,
        },
        {
            f"{PREFIX}.wte.weight": (3, 32), f"{PREFIX}.control_trans.0.weight": (6, 32),
            f"{PREFIX}.control_trans.0.bias": (6,), f"{PREFIX}.control_trans.2.weight": (128, 6),
            f"{PREFIX}.control_trans.2.bias": (128,),
        },
    ),
}  # fmt: skip

# Single files of tensors: file → (shapes, arguments of load).
QUERIES = [f"bert.encoder.layer.{i}.attention.self.query" for i in (0, 1)]
LORA = {f"{q}.lora_A": (2 + i, 32) for i, q in enumerate(QUERIES)}
LORA |= {f"{q}.lora_B": (32, 2 + i) for i, q in enumerate(QUERIES)}
LORALIB: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any]]] = {
    "lora.safetensors": (LORA | {"classifier.weight": (5, 32), "classifier.bias": (5,)}, {"alpha": 6.0}),
    "lora.pt": (LORA, {"alpha": 6.0, "allow_pickle": True}),
    "t-few.safetensors": ({f"{q}.multi_lora_b": (32, 1) for q in QUERIES}, {}),
}


def native(case: str, folder: Path) -> dict[str, Any]:
    """Save with inlay; the logits are those of the model that was saved, not of one that was loaded."""
    name, method, where = NATIVE[case]
    torch.manual_seed(0)
    model = base(name)
    needed = {"data": [ZOO[name].batch(4, 5)]} if method().needs_data else {}
    shake(inlay.attach(model, method(), **where, **needed), SIZE)
    inlay.save(model, "default", folder)
    expected = sampled(name, model)
    again = base(name)
    inlay.load(again, folder)
    with tempfile.TemporaryDirectory() as other:
        inlay.save(again, "default", other)
        same = (Path(other) / FILE).read_bytes() == (folder / FILE).read_bytes()
    if not same:
        raise SystemExit(f"native/{case}: what is loaded and saved again has other bytes, which the test would refuse")
    return {"model": name, "logits": expected}


def peft_own(case: str, folder: Path) -> dict[str, Any]:
    """Save with PEFT, whose logits are the expected ones."""
    name, config = PEFT[case]
    torch.manual_seed(1)
    model: Any = peft.get_peft_model(base(name), config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * SIZE)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    return {"model": name, "logits": sampled(name, model)}


def exported(case: str, folder: Path) -> dict[str, Any]:
    """An adapter of ours in PEFT's format."""
    name = NATIVE[case][0]
    model = base(name)
    inlay.load(model, GOLDEN / "native" / case)
    inlay.save(model, "default", folder, format="peft")
    return {"model": name, "logits": sampled(name, model)}


def adapterhub(case: str, folder: Path) -> dict[str, Any]:
    name, config, shapes = ADAPTERHUB[case]
    folder.mkdir(parents=True)
    whole = {
        "config": config, "config_id": "9076f36a74755ac4", "hidden_size": 32, "model_class": "Any", "model_name": "",
        "model_type": "any", "name": "mine", "version": "adapters.1.3.0",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(whole, indent=1) + "\n")
    save_file({n: torch.from_numpy(uniform(n, s)) for n, s in shapes.items()}, folder / "adapter.safetensors")
    return loaded(name, folder, {})


def loralib(case: str, path: Path) -> dict[str, Any]:
    shapes, options = LORALIB[case]
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {n: torch.from_numpy(uniform(n, s)) for n, s in shapes.items()}
    torch.save(tensors, path) if path.suffix == ".pt" else save_file(tensors, path)
    return loaded("bert", path, options)


# Runs of `inlay train`: case → (base, kind of rows, what differs from the defaults).
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "completions": ("llama", "completion", {"method": "lora", "settings": {"rank": 1}, "where": "re:.*1.*q_proj"}),
    "labels": ("bert", "classification", {"method": "bitfit", "layers": [1], "max_length": 24}),
}
WRITTEN = ("run.yaml", "metrics.jsonl", "result.json", "adapter/adapter.safetensors", "adapter/training.json")


def trained(case: str, folder: Path) -> dict[str, Any]:
    """A run's folder, its paths replaced by names that exist nowhere, and what its adapter scores."""
    name, kind, changes = RUNS[case]
    with tempfile.TemporaryDirectory() as place:
        there = Path(place)
        bare, data = folder_of(name, there / "base"), tiny.jsonl(there / "rows.jsonl", kind)
        given = {"data": str(data), "base": str(bare), "out": str(there / "run"), "precision": "fp32"}
        run(RunConfig.of({**given, "steps": 4, "batch_size": 4, "eval_share": 0.25, **changes}), progress=False)
        for file in WRITTEN:
            raw = (there / "run" / file).read_bytes()
            (folder / file).parent.mkdir(parents=True, exist_ok=True)  # a header says how long it is: same length
            (folder / file).write_bytes(raw.replace(place.encode(), b"/golden".ljust(len(place), b"-")))
        return {
            "base": name,
            "rows": kind,
            "method": changes["method"],
            "metrics": scores(there / "run" / "adapter", bare, data),
        }


def scores(adapter: Path, bare: Path, data: Path) -> dict[str, float]:
    """What `inlay evaluate` prints."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        command(["evaluate", "--adapter", str(adapter), "--base", str(bare), "--data", str(data), "--json"])
    found: dict[str, float] = json.loads(said.getvalue())["metrics"]
    return found


def loaded(name: str, path: Path, options: dict[str, Any]) -> dict[str, Any]:
    model = base(name)
    inlay.load(model, path, **options)
    return {"model": name, "logits": sampled(name, model), **({"options": options} if options else {})}


WRITERS: dict[str, tuple[Callable[[str, Path], dict[str, Any]], list[str]]] = {
    "native": (native, list(NATIVE)),
    "peft": (peft_own, list(PEFT)),
    "peft-of-ours": (exported, list(EXPORTED)),
    "adapterhub": (adapterhub, list(ADAPTERHUB)),
    "loralib": (loralib, list(LORALIB)),
    "runs": (trained, list(RUNS)),
}


def lines(expected: dict[str, Any]) -> str:
    """JSON with a line a case."""
    rooms = [
        f"{json.dumps(room)}: {{\n" + ",\n".join(f"{json.dumps(n)}: {json.dumps(v)}" for n, v in cases.items()) + "\n}"
        for room, cases in expected.items()
    ]
    return "{\n" + ",\n".join(rooms) + "\n}\n"


def main(asked: list[str]) -> None:
    """Write all cases, or those asked for, as ``native/lora``."""
    path = GOLDEN / "expected.json"
    expected: dict[str, Any] = (
        json.loads(path.read_text()) if path.exists() else {"bases": {}, "adapters": {}, "runs": {}}
    )
    for room, (write, cases) in WRITERS.items():
        for case in cases:
            if asked and f"{room}/{case}" not in asked:
                continue
            target = GOLDEN / room / case
            shutil.rmtree(target, ignore_errors=True)
            entry = write(case, target)
            expected["runs" if room == "runs" else "adapters"][f"{room}/{case}"] = entry
            if room != "runs":
                expected["bases"].setdefault(entry["model"], sampled(entry["model"], base(entry["model"])))
            print(f"{room}/{case}")
    path.write_text(lines(expected))


if __name__ == "__main__":
    main(sys.argv[1:])
