"""A backward pass may be differentiated: what comes out is right, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay import LoRA
from inlay.core.errors import UnsupportedError
from inlay.kernels.dropout import Dropout
from inlay.testing.models import ZOO
from tests.golden.hand import shake


class Net(nn.Module):
    """Layers, a nonlinearity and a dropout between them."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.first, self.last, self.dropout = nn.Linear(6, 8), nn.Linear(8, 8), nn.Dropout(share)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.dropout(self.first(x).tanh())).tanh()
        return out


def hessian_times(loss: Callable[[], Tensor], parameters: list[Any], along: list[Tensor]) -> list[Tensor]:
    slopes = torch.autograd.grad(loss(), parameters, create_graph=True)
    along_slope = torch.stack([(s * v).sum() for s, v in zip(slopes, along, strict=True)]).sum()
    return list(torch.autograd.grad(along_slope, parameters))


def differences(loss: Callable[[], Tensor], parameters: list[Any], along: list[Tensor]) -> list[Tensor]:
    """The same by differences of gradients."""
    step, slopes = 1e-5, []
    for size in (step, -2 * step, step):
        with torch.no_grad():
            for parameter, v in zip(parameters, along, strict=True):
                parameter.add_(v, alpha=size)
        slopes.append(torch.autograd.grad(loss(), parameters))
    return [(up - down) / (2 * step) for up, down in zip(*slopes[:2], strict=True)]


def check(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    def drawn() -> Tensor:
        torch.manual_seed(3)  # the same masks
        return loss()

    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(9)
    along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    found, expected = (torch.cat([t.flatten() for t in way(drawn, parameters, along)]) for way in
                       (hessian_times, differences))  # fmt: skip
    assert float((found - expected).norm()) < 1e-6 * float(expected.norm())


@pytest.mark.parametrize("frozen", [(), ("a",), ("a", "b")])
@pytest.mark.parametrize(("dropout", "share"), [(0.0, 0.0), (0.1, 0.5), (0.4, 0.1)])
def test_of_layers_and_dropouts(dropout: float, share: float, frozen: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = Net(share).double().train()
    adapter = shake(inlay.attach(model, LoRA(rank=2, dropout=dropout), where=["first", "last"]))
    for name, parameter in adapter._named(keep_vars=True).items():
        if name.startswith("delta/last/") and name.rpartition("/")[2] in frozen:
            parameter.requires_grad_(False)
    x = torch.randn(5, 6, dtype=torch.float64)
    if frozen == ("a",):
        with pytest.raises(UnsupportedError, match="A is frozen"):
            check(model, lambda: model(x).square().sum())
    else:
        check(model, lambda: model(x).square().sum())


def test_of_a_layer_whose_update_is_frozen() -> None:
    """Nothing is wanted of the update, only of a bias of the base that is trained beside it."""
    torch.manual_seed(0)
    model = Net(0.0).double()
    shake(inlay.attach(model, LoRA(rank=2), where=["first", "last"]))
    model.requires_grad_(False)
    model.first.bias.requires_grad_()
    x = torch.randn(5, 6, dtype=torch.float64)
    check(model, lambda: model(x).square().sum())


def test_of_the_loss_at_labels_are_refused() -> None:
    specimen = ZOO["llama"]
    model = specimen.build()
    parameters = list(inlay.attach(model, LoRA(rank=2)).parameters())
    with pytest.raises(UnsupportedError, match="without labels"):
        torch.autograd.grad(model(**specimen.batch(2, 0)).loss, parameters, create_graph=True)


def test_of_norms_and_gates() -> None:
    """In the type that their formulas serve: the gradient of a gradient is the twin's."""
    specimen = ZOO["llama"]
    found = []
    for attached in (True, False):
        model, batch = specimen.build(), specimen.batch(2, 0)
        model.config._attn_implementation = "eager"
        if attached:
            inlay.attach(model, LoRA(rank=2), where="all-linear")  # adds nothing yet
        model.requires_grad_(False)
        embedded = model.get_input_embeddings()(batch["input_ids"]).requires_grad_()
        (slope,) = torch.autograd.grad(
            model(inputs_embeds=embedded).logits.square().mean(), embedded, create_graph=True
        )
        found.append(torch.autograd.grad(slope.square().sum(), embedded)[0])
    assert float((found[0] - found[1]).norm()) < 1e-5 * float(found[1].norm())


def test_of_a_mask_of_bits() -> None:
    x, grad = torch.ones(64, dtype=torch.bfloat16).requires_grad_(), torch.ones(64, dtype=torch.bfloat16)
    y = Dropout.apply(x, 0.5, 7)  # type: ignore[no-untyped-call]
    (slope,) = torch.autograd.grad(y, x, grad.requires_grad_(), create_graph=True)
    assert torch.equal(torch.autograd.grad(slope.sum(), grad)[0], y)
