"""The adapters that a method combines (AdapterFusion): loaded from their folders while the method is attached."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inlay.core.contracts.method import Method
from inlay.core.errors import ConfigError, problems

if TYPE_CHECKING:
    from inlay.core.contracts.adapter import Adapter


def located(method: Method) -> Method:
    """The method with absolute paths of its folders, so that a saved configuration starts the same run from anywhere.

    Raises:
        ConfigError: a folder or file that it names does not exist.
    """
    given = method.takes_over()
    wrong = [f"{word!r}: no such folder or file" for word in given if not Path(word).expanduser().exists()]
    if wrong:
        heading = f"method {method.name!r} combines stored adapters: give their folders, such as runs/first/adapter"
        raise ConfigError(problems(heading, wrong))
    return method.taking_over([str(Path(word).expanduser().resolve()) for word in given]) if given else method


@contextmanager
def standing(model: Any, method: Method, taken: Collection[str]) -> Iterator[Method]:
    """Attach the adapters in the method's folders for a block; yields the method with their names.

    Their copies of whole modules (heads for their own tasks) are not loaded.

    Args:
        taken: names that are not free.

    Raises:
        AdapterFileError, BaseMismatchError: an adapter cannot be attached to this model.
    """
    import inlay

    names: list[str] = []
    try:
        for word in method.takes_over():
            free = _free_name(Path(word), {*taken, *inlay.adapters(model)})
            _load(model, Path(word), free)
            names.append(free)
        yield method.taking_over(names) if names else method
    finally:
        for name in names:
            inlay.detach(model, name)


def _load(model: Any, path: Path, name: str) -> Adapter:
    from inlay import formats
    from inlay.formats import native

    if formats.format_of(path) == "native":
        return native.read(model, path, name=name, trainable=False, copies=False)
    return formats.load(model, path, name=name)


def _free_name(path: Path, taken: Collection[str]) -> str:
    """A free name, taken from the run's folder, because the adapter's own folder is always called `adapter`."""
    last = path.parent.name if path.name == "adapter" else path.stem
    base = re.sub(r"[^A-Za-z0-9_-]+", "-", last) or "member"
    return next(n for n in (base, *(f"{base}-{i}" for i in range(2, 2 + len(taken) + 1))) if n not in taken)
