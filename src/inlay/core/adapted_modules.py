"""The hosts of one model: the modules at which adapters do something, and what was changed in it so that they can.

The roster (`core/forward/active_adapters.py`) knows which adapters there are and which is active; this file is only
needed when adapters are attached or detached.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from inlay.core.class_exchange import adopt
from inlay.core.forward.active_adapters import Roster, roster_of
from inlay.core.forward.host import Host
from inlay.core.model import roles
from inlay.core.model.view import ModelView

_LIVING: weakref.WeakSet[Hosts] = weakref.WeakSet()


@dataclass(eq=False)
class Hosts:
    """Path → host, kept on the model's root beside its roster.

    Attributes:
        requires_grad: the base's flags before the first attach, by parameter name.
        attention: configurations that name one of our attention functions now, and what they named before.
    """

    roster: Roster
    by_path: dict[str, Host] = field(default_factory=dict)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    attention: list[tuple[Any, str | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        _LIVING.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)  # a deep copy
        _LIVING.add(self)

    @property
    def model(self) -> nn.Module:
        """The model's root."""
        return self.roster.model

    def __iter__(self) -> Iterator[Host]:
        """The hosts, in the order in which they were added."""
        return iter(list(self.by_path.values()))

    def at(self, path: str) -> Host:
        """The host at `path`; made if there is none."""
        host = self.by_path.get(path)
        if host is None:
            host = self.by_path[path] = Host(self.roster, path, self.model.get_submodule(path))
            host.by_row = _sees_rows(self.model, path, host.module)
            host.pooled = roles.layer_of(path) is None or not hasattr(self.model, "config")
        return host

    def grant(self, path: str, *features: str) -> Host:
        """Add features to the host at `path`, which is made if there is none."""
        host = self.at(path)
        adopt(host, host.features | set(features))
        return host

    def revoke(self, path: str, *features: str) -> None:
        """The inverse of `grant`; nothing happens if the host is gone already."""
        if path in self.by_path:
            host = self.by_path[path]
            adopt(host, host.features - set(features))


def hosts_of(model: nn.Module) -> Hosts:
    """The hosts of an attached model, even if it is compiled or wrapped for data parallelism.

    Raises:
        UnsupportedError: nothing is attached.
    """
    hosts = roster_of(model).model.__dict__["_inlay_hosts"]
    assert isinstance(hosts, Hosts)
    return hosts


def living() -> list[Hosts]:
    """The hosts of every attached model that is alive in this process."""
    return [hosts for hosts in _LIVING if hosts.roster.adapters]


def _sees_rows(model: nn.Module, path: str, module: nn.Module) -> bool:
    """Whether the first dimension of a module's input is the batch: not at an expert, not at a position table."""
    if isinstance(module, nn.Embedding):
        table = ModelView(model).input_embedding
        return table is None or module._parameters["weight"] is table._parameters["weight"]
    return roles.EXPERT.fullmatch(path) is None
