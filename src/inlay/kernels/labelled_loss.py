"""Logits at labelled positions only, with the loss and its gradient computed in the same pass.

A causal model called with labels computes logits (rows, tokens, vocabulary), converts them to float32 and throws away
those of prompts and padding. Here the model runs without labels, and its output head passes on the hidden states
instead of computing logits. The loss at the labelled positions, and its gradient with respect to the hidden states, are
computed one chunk of rows at a time:

    hidden (n, h) ── W ── z (chunk, vocabulary) ── softmax − onehot ── W ── gradient (n, h)

This needs no configuration and works for any model whose output head is a frozen linear layer: the first call with
labels is tried both ways, and only if logits and loss agree does the model take the short way from then on. The logits
can still be asked for: they are computed, with their graph, when something uses them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inlay.core.errors import UnsupportedError
from inlay.core.forward.host import Host
from inlay.core.forward.transforms import transformed, watched
from inlay.core.labels import IGNORED
from inlay.core.model.view import ModelView
from inlay.core.upstream import losses
from inlay.kernels import gpu, second_derivatives
from inlay.kernels.alike import alike
from inlay.kernels.cross_entropy import cross_entropy_
from inlay.kernels.lazy import LazyTensor, Mode

LOGITS_AT_ONCE = 2**23  # numbers in a chunk of logits: 16 MiB in half precision
FEWEST_ROWS = 256  # with fewer, matrix products are slower: 128 rows take 6 to 9 % longer; 512 are not faster
TRIAL_TOKENS = 128  # tokens of the row on which both ways are tried
FEATURE = "loss-at-labels"
PROBE_ROWS = 16  # rows whose logits exist at once where labels are made up
SPREAD = 3.0  # spread of the logits of made-up hidden states
LOSSES = losses()  # the loss functions of transformers' own models
AGREEMENT = 2e-3  # relative difference allowed between the two losses: half precision sums in another order


@dataclass
class HeadRequest:
    """What the output head should do (compute no logits, or those of `instead`), and the input it got."""

    skip: bool
    instead: Tensor | None = None
    hidden: list[Tensor] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)


_SCORING: ContextVar[HeadRequest | None] = ContextVar("inlay_scoring", default=None)
# Model → form of call → whether both ways agreed.
_SEEN: weakref.WeakKeyDictionary[nn.Module, dict[Any, bool]] = weakref.WeakKeyDictionary()


def head(host: Host, inner: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The output head's forward: logits, or none if the loss is computed elsewhere."""
    asked = None if transformed() else _SCORING.get()
    if asked is None:
        return inner(hidden, *args, **kwargs)
    hidden = hidden if asked.instead is None else asked.instead
    asked.hidden.append(hidden)
    if asked.skip:
        return hidden.new_empty((*hidden.shape[:-1], 0))
    asked.scores.append(inner(hidden, *args, **kwargs))
    return asked.scores[-1]


def is_head(module: nn.Module, view: ModelView) -> bool:
    """Whether a module is the model's output head."""
    return module is view.output_head


def labelled(host: Host, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The model's own forward, with the loss computed at labelled positions only, if the result is the same."""
    layer = _head_of(host) if not transformed() else None
    labels = kwargs.get("labels")
    if layer is None or not isinstance(labels, Tensor) or labels.dim() != 2 or not _usual(host.module, kwargs):
        return inner(*args, **kwargs)
    form = (tuple(sorted(kwargs)), len(args), host.module.training, Mode.now(labels.device).autocast)
    seen = _SEEN.setdefault(host.module, {})
    if form not in seen:
        if not labels.is_meta and not bool(labels.ne(IGNORED).any()):
            return inner(*args, **kwargs)  # nothing to compare with
        seen[form] = _agree(host, layer, inner, args, kwargs)
    if not seen[form]:
        return inner(*args, **kwargs)
    asked = HeadRequest(skip=True)
    out = _run(host, inner, args, kwargs, asked)
    if _more_losses(out):  # switched on since the trial
        seen[form] = False
        return inner(*args, **kwargs)
    hidden = asked.hidden[-1]
    loss = _loss(host, layer, hidden, labels, kwargs)
    logits = LazyTensor.of(_logits_of(host, layer), hidden, (*hidden.shape[:-1], layer.weight.shape[0]))
    if isinstance(out, tuple):
        return (loss, logits, *out[1:])
    out["logits"] = logits
    return type(out)(**{"loss": loss, **{k: v for k, v in out.items() if k != "loss"}})


def forget(model: nn.Module) -> None:
    """Let the next call with labels compare both ways again."""
    _SEEN.pop(model, None)


def compared(model: nn.Module) -> bool:
    """Whether the model's calls with labels have been tried both ways."""
    return bool(_SEEN.get(model))


def _usual(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the call leaves labels, logits and their order to the model, and the model its loss to transformers.

    A loss function of the user's (with class weights) may agree on the tokens of a trial and on no others.
    """
    loss = getattr(model, "loss_function", None)
    return (
        kwargs.get("shift_labels") is None
        and not kwargs.get("logits_to_keep")
        and kwargs.get("ignore_index", IGNORED) == IGNORED
        and (loss is None or loss in LOSSES.values())
    )


def _more_losses(out: Any) -> bool:
    """Whether the model adds a loss of its own even without labels: the load of experts, too small for a trial to
    notice."""
    values = out if isinstance(out, tuple) else out.values()
    return any(isinstance(v, Tensor) and v.dim() == 0 for v in values)


def _head_of(host: Host) -> nn.Linear | None:
    """The frozen, unadapted output head of a language model, or None."""
    model: Any = host.module
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if (
        layer is None
        or not isinstance(layer, nn.Linear)
        or any(p.requires_grad for p in layer._parameters.values() if p is not None)
    ):
        return None
    at: Host | None = layer.__dict__.get("_inlay_host")
    if at is None or FEATURE not in at.features or at.original_class is not nn.Linear or not _bare(layer, at):
        return None
    used = host.roster.current().used
    touched = any(n in owner for n in used for owner in (at.deltas, at.differences, at.copies))
    return None if touched or at.feeds or host.roster.merged is not None else layer


def _bare(layer: nn.Linear, at: Host) -> bool:
    """Whether the user has nothing on the layer that sees or changes its input, output or weight."""
    own = at.original_forward is None and "forward" not in layer.__dict__
    return own and "weight" in layer._parameters and not watched(layer)


def _run(
    host: Host, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], asked: HeadRequest
) -> Any:
    """Run the model without labels; a decoder that makes its input from shifted labels gets that input."""
    model: Any = host.module
    given = {**kwargs, "labels": None}
    given.pop("num_items_in_batch", None)
    if _encoder_decoder(host) and all(given.get(f"decoder_{n}") is None for n in ("input_ids", "inputs_embeds")):
        given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=kwargs["labels"])
    token = _SCORING.set(asked)
    try:
        return inner(*args, **given)
    finally:
        _SCORING.reset(token)


def _agree(
    host: Host, layer: nn.Linear, inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether the model's own way and the short one give the same; the trial leaves no graph and draws no numbers.

    A few tokens are enough, and save the memory of all logits. On a meta model only shapes are compared, so that a plan
    sees what training will do.
    """
    kwargs = kwargs if args else _few(host, kwargs)
    with torch.no_grad(), torch.random.fork_rng():
        asked, out = _own_way(inner, args, kwargs)
        if len(asked.hidden) != 1 or not _same(host, layer, asked, out, kwargs):
            return False
        states, labels = _probe(host, layer, asked.hidden[0], kwargs["labels"])
        told = {**kwargs, "labels": labels}
        del asked, out
        asked, out = _own_way(inner, args, told, states)
        if not _same(host, layer, asked, out, told):
            return False
        del out
        asked = HeadRequest(skip=True)
        try:  # some models add to their logits (a bias over the vocabulary), so they must exist
            out = _run(host, inner, args, kwargs, asked)
        except (RuntimeError, AttributeError, TypeError, IndexError, ValueError):
            return False
        return len(asked.hidden) == 1 and not _more_losses(out)


def _own_way(
    inner: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], states: Tensor | None = None
) -> tuple[HeadRequest, Any]:
    """Run the model's own way; returns its output and its head's input, which is `states` if these are given."""
    asked = HeadRequest(skip=False, instead=states)
    token = _SCORING.set(asked)
    try:
        return asked, inner(*args, **kwargs)
    finally:
        _SCORING.reset(token)


def _same(host: Host, layer: nn.Linear, asked: HeadRequest, out: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the short way's logits and loss, for the input the head got, equal the model's own."""
    loss, logits = (out[0], out[1]) if isinstance(out, tuple) else (out.get("loss"), out.get("logits"))
    if loss is None or logits is None or logits.shape != asked.scores.pop().shape:
        return False
    hidden, scores_of = asked.hidden[0], _logits_of(host, layer)
    if hidden.dtype != layer.weight.dtype and Mode.now(hidden.device).autocast is None:
        return False  # the model casts in front of its head
    for states, row in zip(hidden, logits, strict=True):  # row by row: all logits once more are too much
        if not _holds(torch.isclose(scores_of(states).float(), row.float(), rtol=1e-2, atol=1e-2).all()):
            return False
    ours = _loss(host, layer, hidden, kwargs["labels"], kwargs)
    return _holds((ours - loss).abs() <= AGREEMENT * loss.abs().clamp(min=1e-3))


def _probe(host: Host, layer: nn.Linear, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Made-up hidden states, and labels at the same places, that distinguish ways to compute the loss.

    An untrained model has nearly the same loss for every pairing of positions and labels. So the states differ from
    position to position, and a decoder's labels are likely for the position before them and unlikely for their own.
    """
    states = torch.randn_like(hidden)
    states *= SPREAD / F.linear(states[0, :1], layer.weight).float().std().clamp(min=1e-6).to(states.dtype)
    made = labels.clone()
    for row, own in zip(made, states, strict=True) if not _encoder_decoder(host) else ():
        before_less_own = (own[:-1] - own[1:]).split(PROBE_ROWS)
        better = torch.cat([F.linear(some, layer.weight).argmax(-1) for some in before_less_own]).to(row.dtype)
        row[1:] = torch.where(row[1:] == IGNORED, row[1:], better)
    return states, made


def _few(host: Host, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call reduced to the row with most labels, and in a decoder to some tokens from its first label on.

    The whole call if it has inputs other than tokens and their masks, or if prompts and spans of its rows are known
    already.
    """
    labels, roster = kwargs["labels"], host.roster
    tensors = {n: v for n, v in kwargs.items() if isinstance(v, Tensor) and v.dim()}
    if labels.is_meta or not roster.current().single or roster.call.get() is not None:
        return kwargs
    if any(v.dim() != 2 or v.shape[0] != labels.shape[0] for v in tensors.values()):
        return kwargs
    row = int(labels.ne(IGNORED).sum(1).argmax())
    window = slice(None)
    if not _encoder_decoder(host):
        if any(v.shape != labels.shape for v in tensors.values()):
            return kwargs
        first = int(labels[row].ne(IGNORED).to(torch.uint8).argmax())
        window = slice(max(0, first - 1), max(0, first - 1) + TRIAL_TOKENS)
    return {**kwargs, **{n: v[row : row + 1, window] for n, v in tensors.items()}}


def _holds(fact: Tensor) -> bool:
    return fact.is_meta or bool(fact)


def _encoder_decoder(host: Host) -> bool:
    return bool(getattr(host.module.config, "is_encoder_decoder", False))


def _logit_scaling(host: Host) -> tuple[float, float | None]:
    """The factor and the soft cap that a model applies to its logits, read from its configuration."""
    config: Any = host.module.config
    text = config.get_text_config()
    divided, factor = getattr(text, "logits_scaling", None), getattr(text, "logit_scale", None)
    cap = getattr(text, "final_logit_softcapping", None)
    return (1 / divided if divided else float(factor or 1.0)), cap


def _logits_of(host: Host, layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """A function from hidden states to logits (…, vocabulary) in the model's dtype, by the head as it is now."""
    weight, bias = layer.weight, layer.bias
    factor, cap = _logit_scaling(host)
    held = [t for t in (weight, bias) if t is not None]
    before = list(map(_state, held))

    def scores(hidden: Tensor) -> Tensor:
        if list(map(_state, held)) != before:
            raise UnsupportedError(
                "the output head was changed after the model computed its loss and before its logits were used; they "
                "are only computed then. Use them before the change, or call the model without labels"
            )
        made = F.linear(hidden, weight, bias)
        made = made if factor == 1.0 else made * factor
        return made if cap is None else torch.tanh(made / cap) * cap

    return scores


def _state(tensor: Tensor) -> tuple[int, int]:
    """A value that differs if a frozen tensor's values have changed. Unlike `core.model.parameter_changes.stamp` it
    stays the same after an optimizer's step, because a training loop may use its logits then."""
    return tensor.data_ptr(), -1 if tensor.is_inference() else tensor._version


def _loss(host: Host, layer: nn.Linear, hidden: Tensor, labels: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The mean over labelled positions, or the sum over ``num_items_in_batch`` if the caller counts those of a step."""
    if not _encoder_decoder(host):
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    at = labels.reshape(-1).ne(IGNORED).nonzero().squeeze(1)
    chosen = hidden.reshape(-1, hidden.shape[-1]).index_select(0, at)  # (n, hidden)
    target = labels.reshape(-1).index_select(0, at)
    factor, cap = _logit_scaling(host)
    items = kwargs.get("num_items_in_batch")
    total: Tensor = LabelledLoss.apply(chosen, layer.weight, layer.bias, target, factor, cap)  # type: ignore[no-untyped-call]
    return total / (at.numel() if items is None else items)


def naive(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, factor: float, cap: float | None
) -> Tensor:
    """Summed cross-entropy with all logits at once: the oracle of `LabelledLoss`."""
    scores = F.linear(hidden, weight, bias) * factor
    scores = scores if cap is None else torch.tanh(scores / cap) * cap
    return F.cross_entropy(scores.float(), target, reduction="sum")


def _cross_entropy_of(scores: Tensor) -> Callable[..., Tensor]:
    """The cross-entropy kernel for the device."""
    if gpu.serves(scores):
        from inlay.kernels.gpu.labelled_loss import cross_entropy_ as on_gpu

        return on_gpu
    return cross_entropy_


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None) -> Tensor:
    """Logits (rows, vocabulary), in the memory of the chunk before: new pages cost a tenth of the product."""
    if before is None or not before.dtype == hidden.dtype == weight.dtype:  # autocast computes in a third dtype
        return F.linear(hidden, weight, bias)
    out = before[: hidden.shape[0]]
    if bias is None:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.addmm(bias, hidden, weight.t(), out=out)


class LabelledLoss(torch.autograd.Function):
    """Summed cross-entropy of chosen positions; stores its gradient, (n, hidden), and no logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, factor: float, cap: float | None
    ) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        scores: Tensor | None = None
        rows = max(FEWEST_ROWS, LOGITS_AT_ONCE // weight.shape[0])
        rows = -(-hidden.shape[0] // max(1, -(-hidden.shape[0] // rows))) or 1  # chunks of equal size
        for start in alike(range(0, hidden.shape[0], rows)):
            piece, labels = hidden[start : start + rows], target[start : start + rows, None]
            scores = _product(piece, weight, bias, scores)
            loss += _cross_entropy_of(scores)(scores, labels, factor, cap, writes=wanted).sum()
            if gradient is not None and gradient.dtype == weight.dtype:
                torch.mm(scores.to(weight.dtype), weight, out=gradient[start : start + rows])
            elif gradient is not None:  # autocast: half-precision states in front of a head in float32
                gradient[start : start + rows] = torch.mm(scores.to(weight.dtype), weight)
        ctx.gradient = gradient
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        second_derivatives.refuse(
            "the loss at the labels", "call the model without labels and compute the loss from its logits"
        )
        return ctx.gradient * grads[0].to(ctx.gradient.dtype), None, None, None, None, None
