"""Private names of other libraries stand in `core/upstream.py` and nowhere else.

Its first lines say what is private. A name with a leading underscore counts as ours where a class of ours defines it;
what only looks like a name is in `SUFFIXES`, and loggers are in `LOGGERS`: one that is renamed is merely not silenced.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import inlay
from inlay.core import upstream

SOURCE = Path(inlay.__file__).parent
HERE = "core/upstream.py"
LIBRARIES = {"torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "bitsandbytes", "torchao"}
LIBRARIES |= {"peft", "trl", "triton", "pydantic", "typer", "rich", "jinja2", "huggingface_hub", "sklearn", "xgboost"}
# Modules of these that their documentation names, as what one imports from.
DOCUMENTED = {
    *(
        "torch.nn",
        "torch.nn.functional",
        "torch.nn.attention",
        "torch.optim",
        "torch.optim.optimizer",
        "torch.autograd",
    ),
    *("torch.overrides", "torch.utils.checkpoint", "torch.utils.data", "torch.utils.flop_counter"),
    *("transformers.utils", "transformers.pytorch_utils", "transformers.trainer_callback"),
    *("safetensors.torch", "torchao.quantization", "torchao.utils", "triton.language"),
    *("rich.console", "rich.live", "rich.progress", "rich.table", "rich.text", "typer.core"),
}
SUFFIXES = {"_", "_a", "_b", "_embeddings", "_token_id", "_twin"}  # parts of names of ours
LOGGERS = {"torch.utils._pytree", "bitsandbytes.autograd._functions"}

PRIVATE = re.compile(r"_[A-Za-z]\w*")
DOTTED = re.compile(r"(?:[A-Za-z]\w*[.:])*_[a-zA-Z]\w*(?:[.:]\w+)*")


def private(name: str) -> bool:
    return PRIVATE.fullmatch(name) is not None and not name.startswith("_inlay")


def own_names(trees: list[ast.Module]) -> set[str]:
    """What classes of ours define with a leading underscore: methods, fields, and what is set on self."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.ClassDef):
                    found.add(inner.name)
                targets = inner.targets if isinstance(inner, ast.Assign) else [getattr(inner, "target", None)]
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls") else set()
    return {name for name in found if private(name)}


def foreign_names(tree: ast.Module, own: set[str]) -> Iterator[tuple[int, str]]:
    """Line and name of everything private that a file uses and that is not ours."""
    ours = {  # modules of ours, whose private functions a neighbour may call
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("inlay")
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
            if not (isinstance(node.value, ast.Name) and node.value.id in ours):
                yield node.lineno, node.attr
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, n) for n in imported([alias.name for alias in node.names]))
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("inlay", "__future__")):
            module = node.module or ""
            yield from ((node.lineno, n) for n in imported([module]))
            yield from ((node.lineno, f"{module}.{a.name}") for a in node.names if private(a.name))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = DOTTED.fullmatch(node.value) and any(private(part) for part in re.split("[.:]", node.value))
            if named and node.value not in own | SUFFIXES | LOGGERS:
                yield node.lineno, node.value


def imported(modules: list[str]) -> list[str]:
    """Those that no documentation names."""
    return [m for m in modules if m.partition(".")[0] in LIBRARIES and "." in m and m not in DOCUMENTED]


@functools.cache
def trees() -> dict[str, ast.Module]:
    paths = sorted(SOURCE.rglob("*.py"))
    return {str(p.relative_to(SOURCE)): ast.parse(p.read_text(encoding="utf-8")) for p in paths}


def test_private_names_stand_in_one_file() -> None:
    files = trees()
    own = own_names(list(files.values()))
    elsewhere = [
        f"src/inlay/{file}:{line} uses {name}"
        for file, tree in files.items()
        if file != HERE
        for line, name in foreign_names(tree, own)
        if name not in upstream.DE_FACTO
    ]
    assert elsewhere == [], f"take these from src/inlay/{HERE}, with a test of what we rely on, or use a public name"


def test_exemptions_are_still_needed() -> None:
    files = trees()
    strings = {n.value for t in files.values() for n in ast.walk(t) if isinstance(n, ast.Constant)}
    attributes = {n.attr for t in files.values() for n in ast.walk(t) if isinstance(n, ast.Attribute)}
    modules = {n.module for t in files.values() for n in ast.walk(t) if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for t in files.values() for n in ast.walk(t) if isinstance(n, ast.Import) for a in n.names}
    assert strings >= SUFFIXES | LOGGERS
    assert set(upstream.DE_FACTO) <= attributes
    assert modules >= DOCUMENTED


def test_names_of_ours_hide_none_of_theirs() -> None:
    """An attribute counts as ours by its name alone, so ours must not be the name of one that is listed."""
    own = own_names([tree for file, tree in trees().items() if file != HERE])
    listed = {name for _, name in foreign_names(trees()[HERE], set())}
    last = {re.split("[.:]", name)[-1] for name in listed}
    assert own & (last | set(upstream.DE_FACTO)) - set(upstream.OVERRIDDEN) == set()


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("module._call_impl", ["_call_impl"]),
        ("self._prepare_inputs(batch)", ["_prepare_inputs"]),
        ("self._ours = 1; x._ours", []),
        ("class A:\n    def _ours(self): pass\nA()._ours()", []),
        ("def _local(): pass\nx._local", ["_local"]),
        ("from inlay.methods import _sparse\n_sparse._take(x)", []),
        ("torch._C._on()", ["_C", "_on"]),
        (
            "from torch.nn.modules.module import _hooks as h",
            ["torch.nn.modules.module", "torch.nn.modules.module._hooks"],
        ),
        ("from transformers.loss.loss_utils import LOSS_MAPPING", ["transformers.loss.loss_utils"]),
        ("import torch._dynamo", ["torch._dynamo"]),
        ("getattr(config, '_attn_implementation', None)", ["_attn_implementation"]),
        ("module.__dict__['_orig_mod']", ["_orig_mod"]),
        ("resolve_name('torch:ops.aten._op.default')", ["torch:ops.aten._op.default"]),
        ("from torch.optim import Optimizer; x.__class__; x._inlay_host; '_'; 'a _word in a text'", []),
    ],
)
def test_the_reader_of_names(source: str, names: list[str]) -> None:
    tree = ast.parse(source)
    assert sorted(name for _, name in foreign_names(tree, own_names([tree]))) == sorted(names)


def test_what_replaces_a_private_name_is_listed() -> None:
    """A private name in a class of ours that the library's class uses too: meant, or a clash that nobody noticed."""
    clashes = {
        f"{cls.__module__}.{cls.__qualname__} has {name}, and so has {base.__qualname__} of {base.__module__}"
        for cls, names in classes()
        for base in cls.__mro__[1:]
        if base.__module__.partition(".")[0] in LIBRARIES
        for name in (names - set(upstream.OVERRIDDEN)) & names_in(base)
    }
    assert clashes == set()
    assert {"_parameters", "_apply", "_call_impl"} <= names_in(nn.Module)


def names_in(cls: type[Any]) -> set[str]:
    """What a class defines, and what its methods read and set."""
    plain = (getattr(value, "fget", None) or getattr(value, "__func__", value) for value in vars(cls).values())
    codes = [code for function in plain if (code := getattr(function, "__code__", None)) is not None]
    return set(vars(cls)).union(*(code.co_names for code in codes))


def classes() -> Iterator[tuple[type[Any], set[str]]]:
    """Classes of `src/inlay` that define private names, with these; but of files whose library is missing."""
    for file, tree in trees().items():
        for node in tree.body:
            names = own_names([ast.Module([node], [])]) if isinstance(node, ast.ClassDef) and node.bases else set()
            if names:
                module = pytest.importorskip(f"inlay.{file.removesuffix('.py').replace('/', '.')}")
                yield getattr(module, node.name), names
