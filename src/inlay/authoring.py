"""Everything that the author of a method needs to import; the files in `inlay.methods` import nothing else of the core.

A method is a frozen dataclass of hyper-parameters that says what to build at which places (README, "Adding a method").
`inlay.testing.check_method` checks it against the laws.

contracts      `DeltaMethod` builds a `Delta` for each layer; `PromptMethod` a `TokenPrompt` or a `KeyValuePrompt`;
               `SubsetMethod` a `Difference` to parameters of the base; `Method` builds any pieces; `Recipe`
pieces         what a method builds: `DeltaPiece`, `PromptPiece`, `SubsetPiece`, `Branch`; `Shared` between several
the model      seen read-only: `ModelView`, `Site`, `AttentionPlace`, `Kind`; `Places` and `select` say where
by site        `Pattern` and its helpers: values, such as ranks, that differ by site
from data      `Measured`, `Batches`, `observe_inputs`: initialisation from data, before anything is built
training       `Clock`: what happens around every optimizer step of an `Adapter`
forward        `Grouped` (several adapters at once), `current_span`, `transformed`, `cast`, `widened`
errors         each says what happened, what was expected and what to do (`problems` lists several)
"""

from __future__ import annotations

from inlay.core.contracts.adapter import Adapter, Clock, kind_and_module
from inlay.core.contracts.delta import Delta, Grouped, cast, widened
from inlay.core.contracts.method import (
    Batches,
    DeltaMethod,
    Measured,
    Method,
    PromptMethod,
    Recipe,
    SubsetMethod,
)
from inlay.core.contracts.pieces import Branch, DeltaPiece, Piece, PromptPiece, SubsetPiece
from inlay.core.contracts.prompt import KeyValuePrompt, KeyValues, TokenPrompt
from inlay.core.contracts.shared import Shared, shared_in
from inlay.core.contracts.site_pattern import Pattern, frozen, unused, value_at
from inlay.core.contracts.subset import DenseDifference, Difference
from inlay.core.errors import AdapterNameError, ConfigError, SelectionError, UnsupportedError, nearest, problems
from inlay.core.forward.active_adapters import bare, find_roster
from inlay.core.forward.transforms import transformed
from inlay.core.labels import IGNORED
from inlay.core.measure import observe_inputs
from inlay.core.model.layer import Kind
from inlay.core.model.originals import Originals, stored_whole
from inlay.core.model.parameter_changes import stamp
from inlay.core.model.roles import CROSS_ATTENTION, layer_of
from inlay.core.model.select import Places, select
from inlay.core.model.site import Site
from inlay.core.model.view import AttentionPlace, ModelView
from inlay.core.prompts.observe import keys_values
from inlay.core.prompts.span import current_span

__all__ = [
    # contracts
    "Delta", "DeltaMethod", "DenseDifference", "Difference", "KeyValuePrompt", "KeyValues", "Method", "PromptMethod",
    "Recipe", "SubsetMethod", "TokenPrompt",
    # pieces
    "Branch", "DeltaPiece", "Piece", "PromptPiece", "Shared", "SubsetPiece", "shared_in",
    # the model
    "CROSS_ATTENTION", "IGNORED", "AttentionPlace", "Kind", "ModelView", "Originals", "Places", "Site", "find_roster",
    "layer_of", "select", "stamp", "stored_whole",
    # by site
    "Pattern", "frozen", "unused", "value_at",
    # from data
    "Batches", "Measured", "bare", "keys_values", "observe_inputs",
    # training
    "Adapter", "Clock", "kind_and_module",
    # forward
    "Grouped", "cast", "current_span", "transformed", "widened",
    # errors
    "AdapterNameError", "ConfigError", "SelectionError", "UnsupportedError", "nearest", "problems",
]  # fmt: skip
