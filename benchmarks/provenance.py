"""What a measurement has to say about itself: versions, hardware, commit, seeds, date.

Also how results are written (beside, then renamed, so that a stopped run leaves the last whole file) and how
much memory the process has had at most.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft", "tokenizers", "datasets", "accelerate", "safetensors", "numpy")
# What decides the numbers; changes elsewhere (documentation, the results themselves) do not make them
# doubtful.
DECISIVE = ("src", "benchmarks", "pyproject.toml", "constraints.txt")


def provenance(*, seeds: Sequence[int], packages: Iterable[str] = ()) -> dict[str, Any]:
    """Everything needed to judge or repeat a measurement.

    Args:
        seeds: that the measurement used.
        packages: whose versions matter beside the usual ones.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(),
        "seeds": list(seeds),
        "git": git_state(),
        "versions": versions(packages),
        "hardware": hardware(),
    }


def versions(packages: Iterable[str] = ()) -> dict[str, str]:
    """Python's, inlay's and the packages' versions; a package that is absent is left out."""
    from inlay import __version__

    found = {"python": platform.python_version(), "inlay": __version__}
    for name in (*PACKAGES, *packages):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """The processor, the cores this process may use, torch's threads, and how busy the machine was."""
    import torch

    return {
        "processor": _processor(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "cores_usable": _usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average_1_minute": _load(),
    }


def git_state() -> dict[str, Any]:
    """The commit, and whether what decides the numbers differs from it; None where git does not answer."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", *DECISIVE)
    return {"commit": commit, "dirty": None if changed is None else bool(changed)}


def command() -> str:
    """The command line as a reader can repeat it: absolute paths are cut to their last part."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    start = f"python -m {spec.name}" if spec is not None else f"python {Path(sys.argv[0]).name}"
    return " ".join([start, *(Path(a).name if os.path.isabs(a) else a for a in sys.argv[1:])])


def peak_memory_mib() -> float:
    """The most memory this process has had resident.

    Linux says so itself; `getrusage` would count what the parent had when it started this process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return round(int(line.split()[1]) / 1024, 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1024 * 1024 if sys.platform == "darwin" else 1024), 1)


def write_json(path: Path, content: Any) -> None:
    """Write a results file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".partial")
    part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def read_json(path: Path) -> dict[str, Any]:
    """An earlier results file, or an empty one."""
    if not path.exists():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    name = facts.get("model name") or platform.processor()
    extensions = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in facts.get("flags", "").split()]
    family = f"family {facts['cpu family']} model {facts['model']}" if "cpu family" in facts else ""
    return " ".join(filter(None, [name, family, f"({', '.join(extensions)})" if extensions else ""]))


def _usable_cores() -> int | None:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None
