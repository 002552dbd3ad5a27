"""Training a model whose bf16 weights do not fit in the memory that the process may have.

    python -m benchmarks.big_model [--steps 10]

A Llama of 1.6 billion random parameters is written shard by shard, never whole in memory: 3.2 GB in bf16. Then a
process of its own, whose address space is limited below that (`resource.setrlimit(RLIMIT_AS)`, which counts every
byte it maps, files as well), loads it with ``quantize="nf4"`` and takes ten steps of QLoRA. A second process with
the same limit tries to load it in bf16, which must fail. Peaks are the process's own (`ru_maxrss`, VmPeak).
Results: runs/quantised/big_model.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.provenance import ROOT, provenance, write_json

OUT = ROOT / "runs" / "quantised" / "big_model.json"
BIG = {"hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 20, "vocab_size": 32000}
LIMIT_SHARE = 0.9  # of the weights in bf16
ROWS, TOKENS = 1, 64


def config_of(sizes: dict[str, int]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        **sizes, num_attention_heads=sizes["hidden_size"] // 128, num_key_value_heads=sizes["hidden_size"] // 128,
        tie_word_embeddings=True, dtype="bfloat16", max_position_embeddings=2048,
    )  # fmt: skip


def write_model(folder: Path, sizes: dict[str, int]) -> int:
    """A random model as sharded safetensors, a shard a layer; returns its parameters."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    config = config_of(sizes)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in LlamaForCausalLM(config).named_parameters()}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    groups: dict[str, list[str]] = {}
    for name in shapes:
        groups.setdefault(name.split("layers.")[-1].split(".")[0] if "layers." in name else "ends", []).append(name)
    index = {}
    torch.manual_seed(0)
    for number, names in enumerate(groups.values()):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        norm = {n: torch.ones(shapes[n]) if len(shapes[n]) == 1 else torch.randn(shapes[n]).mul_(0.02) for n in names}
        save_file({n: t.to(torch.bfloat16) for n, t in norm.items()}, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(torch.Size(s).numel() for s in shapes.values())


def limit_memory(limit: int, beside_libraries: bool) -> None:
    """Set the limit on this process's address space.

    Args:
        beside_libraries: what is mapped once everything is imported does not count.
    """
    if beside_libraries:
        import bitsandbytes  # noqa: F401
        import torch
        from transformers import LlamaForCausalLM  # noqa: F401

        import inlay.train  # noqa: F401

        torch.ones(1, requires_grad=True).sum().backward()  # its thread
        limit += status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def train(folder: Path, steps: int) -> dict[str, Any]:
    """Steps of QLoRA in this process."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import inlay
    from inlay.bases.loading import read_quantised, stored_tensors
    from inlay.core.model.layer import store_of

    torch.manual_seed(0)
    started, config = time.perf_counter(), AutoConfig.from_pretrained(folder)
    tensors: dict[str, Any] = {**stored_tensors(str(folder))}
    model, _ = read_quantised(AutoModelForCausalLM, config, tensors, "nf4", torch.bfloat16)
    loaded = {"seconds_to_load": time.perf_counter() - started, "peak_loading_bytes": peak_resident()}
    packed = sum(s.bytes for m in model.modules() if (s := store_of(m)) is not None)
    plain = sum(p.numel() * p.element_size() for p in model.parameters() if p.is_floating_point())
    adapter = inlay.attach(model, inlay.LoRA(rank=8, alpha=16), where="all-linear")
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(adapter.parameter_groups(2e-4))
    ids = torch.randint(config.vocab_size, (ROWS, TOKENS))
    losses, started = [], time.perf_counter()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return loaded | {
        "weights_quantised_bytes": packed + plain,
        "trained_parameters": adapter.count,
        "losses": losses,
        "seconds_a_step": (time.perf_counter() - started) / steps,
        "peak_resident_bytes": peak_resident(),
        "peak_address_space_bytes": status("VmPeak"),
    }


def load_dense(folder: Path) -> dict[str, Any]:
    """The same model in bf16."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    except Exception as error:  # MemoryError, RuntimeError, OSError, and safetensors' own type
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        return {"fits": False, "error": said.replace(f"{folder}/", "")[:200]}
    return {"fits": True}


def peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def status(name: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name))
    return int(line.split()[1]) * 1024


def apart(action: str, folder: Path, limit: int, steps: int, *, beside_libraries: bool) -> dict[str, Any]:
    """One of the two, in a process of its own; what it prints last is its result."""
    command = [sys.executable, "-m", "benchmarks.big_model", "--action", action, "--folder", str(folder)]
    command += ["--limit", str(limit), "--steps", str(steps)]
    command += ["--beside-libraries"] if beside_libraries else []
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        return {"exit": done.returncode, "error": done.stderr.strip().splitlines()[-1][:300] if done.stderr else ""}
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measure(
    sizes: dict[str, int], steps: int, *, share: float = LIMIT_SHARE, beside_libraries: bool = False
) -> dict[str, Any]:
    """Both, and the limit that they were under.

    Args:
        share: of the weights in bf16 that the limit is.
        beside_libraries: as for `limit_memory`.
    """
    folder = Path(tempfile.mkdtemp(prefix="big-model-"))
    try:
        parameters = write_model(folder, sizes)
        limit = int(2 * parameters * share)
        return {
            "model": sizes,
            "parameters": parameters,
            "bf16_bytes": 2 * parameters,
            "limit_bytes": limit,
            "limit": "RLIMIT_AS",
            "batch": [ROWS, TOKENS],
            "nf4": apart("train", folder, limit, steps, beside_libraries=beside_libraries),
            "bf16": apart("dense", folder, limit, steps, beside_libraries=beside_libraries),
        }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--action", choices=("all", "train", "dense"), default="all", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--beside-libraries", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.action != "all":
        limit_memory(asked.limit, asked.beside_libraries)
        print(json.dumps(train(asked.folder, asked.steps) if asked.action == "train" else load_dense(asked.folder)))
    else:
        found = measure(BIG, asked.steps)
        print(json.dumps(found, indent=2))
        if asked.steps >= 10:
            write_json(OUT, found | {"provenance": provenance(seeds=[0], packages=["bitsandbytes"])})


if __name__ == "__main__":
    main()
