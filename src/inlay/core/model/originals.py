"""The weights that a quantised base was made from, read again from its folder, one at a time.

LoftQ needs the part of a weight that quantisation loses; the base's files still have it. A tensor is found by the
layer's path (a file may leave out or add the model's outer prefix) and accepted only if it differs from the dequantised
weight by no more than quantisation explains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from inlay.core.errors import ConfigError, UnsupportedError
from inlay.core.model.site import Site

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
FURTHEST = 0.9  # of the weight's norm; two bits change it by about 0.55, another layer's weight by more than 1


def stored_whole(layer: nn.Module) -> bool:
    """Whether the layer stores its weight as such, not as codes of fewer bits."""
    weight = layer._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return False
    return type(weight.detach()) is Tensor or hasattr(weight, "full_tensor")


class Originals:
    """The safetensors files of a base.

    Args:
        source: folder or hub id, as in the base's configuration.
    """

    def __init__(self, source: str) -> None:
        self.source = source

    def weight(self, site: Site) -> Tensor:
        """The site's weight before quantising, canonical layout, float32, on the layer's device.

        Raises:
            UnsupportedError: the base's files are gone, do not have it, or have another weight there.
        """
        now = site.read_weight()[0].float()
        if stored_whole(site.module):
            return now
        name = f"{site.path}.weight"
        keys = [key for key in self._files if key == name or name.endswith(f".{key}") or key.endswith(f".{name}")]
        if not keys:
            raise UnsupportedError(
                f"{site.path} is quantised, and {self.source or 'the base'} has no safetensors file with the weight "
                "it was quantised from; attach before quantising, or keep the base's folder in place"
            )
        found = self._read(max(keys, key=len)).to(now.device).float()
        for candidate in (found, found.t() if found.ndim == 2 else found):
            whole = candidate if site.part is None else site.part.take(candidate, 0)
            if whole.shape == now.shape and (whole - now).norm() <= FURTHEST * whole.norm():
                return whole
        raise UnsupportedError(
            f"{site.path} is quantised from another weight than the one in {self.source}; load the base from the "
            "folder that it was quantised from"
        )

    @cached_property
    def _files(self) -> Mapping[str, Path]:
        """Tensor name → the file that holds it; empty if there are no files."""
        from safetensors import safe_open

        index, single = self._path(INDEX), self._path(SINGLE)
        if index is not None:
            names = weight_map(index)
            paths = {name: self._path(name) for name in set(names.values())}
            return {key: path for key, name in names.items() if (path := paths[name]) is not None}
        if single is None:
            return {}
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)

    def _path(self, name: str) -> Path | None:
        from transformers.utils import cached_file

        if not self.source:
            return None
        found = cached_file(
            self.source, name, local_files_only=True, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
        )  # fmt: skip
        return None if found is None else Path(found)

    def _read(self, key: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self._files[key], framework="pt") as file, torch.no_grad():
            tensor: Tensor = file.get_tensor(key)
        return tensor


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name → the file that holds it, read from a checkpoint's index.

    Raises:
        ConfigError: the index is damaged.
    """
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
            raise ValueError("its weight_map does not lead from tensors to files")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{index}: not an index of safetensors files ({error!r}). Copy it again") from error
    return found
