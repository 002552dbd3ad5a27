"""The rows of training steps: LoRA at 58 M and 135 M, five other methods, and what a forward pass keeps.

Where nothing is drawn at random, the first steps over which ours and the peer's losses must agree are those that are
timed, and more after them. With dropout they are taken before, without it, because the two draw their masks from
different generators.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import step
from benchmarks.contenders import LLAMA_58M, LLAMA_135M, Shape, in_peft, with_inlay
from benchmarks.peers import hub_bottleneck, sft_step
from benchmarks.report import Options, Part, Row, milliseconds
from benchmarks.timing import alternate, ratio
from inlay import IA3, DoRA, Pfeiffer, PrefixTuning, PromptTuning

TINY = Shape(hidden=64, intermediate=172, layers=2, heads=4, vocabulary=512)
WARMUP = 2
KEPT = 1.1  # times what the frozen base's own forward keeps
Peer = Callable[[nn.Module, nn.Module], Any]


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A case, whom it is against, and the targets by ratio.

    Attributes:
        peer: makes the peer's model of ours and the base.
        floor: whether the frozen base's own step is timed too.
        sft: whether TRL's trainer is.
        deep: whether so many layers round in half precision that losses are compared in float32, on fewer tokens;
            those of the timed steps are told.
    """

    case: step.Case
    peer: Peer = in_peft
    named: str = "PEFT"
    floor: bool = False
    sft: bool = False
    deep: bool = False


LORA = step.Case(name="LoRA r8 all linears, dropout 0.05, 58 M, half labelled", shape=LLAMA_58M, dropout=0.05)
ALL = replace(LORA, name="the same, no dropout, all labelled", dropout=0.0, labelled=1.0)
SMALL = replace(LLAMA_58M, layers=4)


def lora_contests() -> list[Contest]:
    """LoRA at 58 M parameters."""
    single = replace(ALL, name="the same in fp32", shape=replace(LLAMA_58M, dtype=torch.float32))
    return [
        Contest(case=replace(LORA, at_most={"inlay/peer": 0.45})),
        Contest(case=replace(ALL, at_most={"inlay/peer": 0.75, "inlay/floor": 0.95}), floor=True),
        Contest(case=replace(single, at_most={"inlay/peer": 0.85})),
    ]


def notes_contests() -> list[Contest]:
    """The 135 M shape of the notes, against PEFT and against TRL's trainer."""
    case = step.Case(
        name="135 M: 30 layers, vocabulary 49 k, r16, 25 % labelled", shape=LLAMA_135M, rank=16, rows=2, tokens=128,
        labelled=0.25, at_most={"inlay/peer": 0.5, "inlay/sft": 0.3},
    )  # fmt: skip
    return [Contest(case=case, sft=True, deep=True)]


def method_contests() -> list[Contest]:
    """Methods other than LoRA, on four layers."""
    at_most = {"inlay/peer": 0.8}
    case = step.Case(name="", shape=SMALL, where=None, at_most=at_most)
    return [
        Contest(case=replace(case, name="DoRA", method=DoRA(rank=8, alpha=16), where="all-linear")),
        Contest(case=replace(case, name="(IA)³", method=IA3())),
        Contest(case=replace(case, name="bottleneck (Pfeiffer)", method=Pfeiffer()), peer=hub_bottleneck,
                named="AdapterHub"),
        Contest(case=replace(case, name="prefix tuning", method=PrefixTuning(length=20))),
        Contest(case=replace(case, name="prompt tuning", method=PromptTuning(length=20))),
    ]  # fmt: skip


def lora(options: Options) -> Part:
    return all_contests(lora_contests(), options)


def notes(options: Options) -> Part:
    return all_contests(notes_contests(), options)


def methods(options: Options) -> Part:
    return all_contests(method_contests(), options)


def activations(options: Options) -> Part:
    """Bytes kept for the backward pass, without dropout and with it."""
    case = step.Case(name="activations kept, LoRA r8, 4 layers", shape=TINY if options.tiny else SMALL)
    part = Part(raw=[])
    for share in (0.0, 0.05):
        found = step.activations(replace(case, dropout=share), most=KEPT)
        part.raw.append(found)
        theirs = f"PEFT / frozen base's: {found['ratios']['peft/floor']:.3g}"
        work = f"activations saved for backward, 4-layer Llama, dropout {share:g}: ours / frozen base's"
        part.rows.append(Row(work=work, value=found["ratios"]["inlay/floor"], most=KEPT, detail=theirs))
    return part


def all_contests(contests: list[Contest], options: Options) -> Part:
    """The rows of several contests, one after another."""
    part = Part(raw=[])
    for contest in contests:
        options.say(f"  {contest.case.name}")
        found = compare(_shrunk(contest) if options.tiny else contest, options)
        part.raw.append(found)
        part.rows += _rows(contest, found)
        if not found["losses"]["agree"]:
            part.wrong.append(f"{contest.case.name}, losses: {found['losses']}")
    return part


def _shrunk(contest: Contest) -> Contest:
    shape = replace(TINY, dtype=contest.case.shape.dtype)
    return replace(contest, case=replace(contest.case, shape=shape, tokens=32))


def _rows(contest: Contest, found: dict[str, Any]) -> list[Row]:
    against = {"inlay/peer": f"{contest.named}'s", "inlay/floor": "floor", "inlay/sft": "TRL SFTTrainer's"}
    return [
        Row(
            work=f"{contest.case.name}: step / {against[name]}",
            value=found["ratios"][name]["of_medians"],
            most=most,
            detail=milliseconds(found["timings"]),
        )
        for name, most in contest.case.at_most.items()
    ]


def compare(contest: Contest, options: Options) -> dict[str, Any]:
    """Take steps with all contenders alternately; losses, timings and ratios."""
    case = contest.case
    base = case.shape.build().train()
    ours = with_inlay(base, case.trained, ["default"], seed=case.seed, where=case.where)
    models = {"inlay": ours, "peer": contest.peer(ours, base)}
    batch = case.batch()
    losses: dict[str, list[float]] = {name: [] for name in models}
    checked: dict[str, Callable[[], object]] = {
        name: recorded(step.training_step(model, batch), losses[name]) for name, model in models.items()
    }
    steps = dict(checked)
    if case.dropout:
        for model in models.values():
            model.eval()  # without masks
        take_on(checked, losses, options.checked)
        for model in models.values():
            model.train()
    if contest.floor:
        steps["floor"] = step.floor_step(base, batch)
    if contest.sft:
        steps["sft"] = sft_step(base, case.rank, batch, step.LEARNING_RATE)
    timings = alternate(steps, runs=options.runs, warmup=WARMUP)
    if not contest.deep:
        take_on(checked, losses, options.checked)
    agreement = agreed(losses, options, case.shape)
    return {
        "case": case.name,
        "shape": case.shape.to_dict(),
        "batch": [case.rows, case.tokens],
        "labelled": case.labelled,
        "method": case.trained.to_dict(),
        "peer": contest.named,
        "losses": _in_float32(contest, options) | {"as_timed": agreement} if contest.deep else agreement,
        "timings": {name: timing.to_dict() for name, timing in timings.items()},
        "ratios": {f"inlay/{name}": ratio(timings["inlay"], timings[name]) for name in timings if name != "inlay"},
    }


def _in_float32(contest: Contest, options: Options) -> dict[str, Any]:
    """Whether the losses are equal where nothing but the algorithm could make them differ."""
    case = replace(contest.case, shape=replace(contest.case.shape, dtype=torch.float32), tokens=32)
    base = case.shape.build().train()
    ours = with_inlay(base, case.trained, ["default"], seed=case.seed, where=case.where)
    batch = case.batch()
    losses: dict[str, list[float]] = {"inlay": [], "peer": []}
    models = {"inlay": ours, "peer": contest.peer(ours, base)}
    take_on({n: recorded(step.training_step(m, batch), losses[n]) for n, m in models.items()}, losses, options.checked)
    return agreed(losses, options, case.shape)


def take_on(steps: Mapping[str, Callable[[], object]], losses: dict[str, list[float]], until: int) -> None:
    """Go on until each has noted so many losses."""
    while min(map(len, losses.values())) < until:
        for take in steps.values():
            take()


def agreed(losses: dict[str, list[float]], options: Options, shape: Shape) -> dict[str, Any]:
    """Whether the first losses of ours and the peer's are equal."""
    first = {name: noted[: options.checked] for name, noted in losses.items()}
    return step.agreement(first["inlay"], first["peer"], step.TOLERANCE[shape.dtype])


def recorded(take: Callable[[], Tensor], losses: list[float]) -> Callable[[], object]:
    """A step that notes its loss."""
    return lambda: losses.append(float(take()))
