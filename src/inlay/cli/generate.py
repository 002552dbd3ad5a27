"""`inlay generate`: texts from prompts, each with an adapter of its own if need be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from inlay.cli import flags
from inlay.cli.importing import importing
from inlay.cli.output import stages, write_json

BASE_ITSELF = "none"


def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One or more prompts.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder of an adapter, or 'none' for the base itself. Once for all prompts, or once for "
            "each prompt in the same order, or several for one prompt; all in one batch."
        ),
    ] = None,
    base: flags.BaseOfAdapter = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens a text.")] = 128,
    num_beams: Annotated[int, typer.Option(help="Beam search over so many; 1 is greedy.")] = 1,
    temperature: Annotated[float, typer.Option(help="Above 0, tokens are drawn at random.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draw.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--plain", help="With the chat template or without. Default: as in training."),
    ] = None,
    quantize: flags.QuantizeAsTrained = None,
    precision: flags.Precision = None,
    as_json: flags.AsJson = False,
) -> None:
    """Write what follows each prompt."""
    with importing():
        import torch

        from inlay.cli.models import load_adapted, prompt_tokens
        from inlay.evaluate.generate import generate_texts
        from inlay.evaluate.progress import counting
        from inlay.train.loading import load_base  # noqa: F401

    asked, chosen = paired(prompts, adapter or [])
    folders = list(dict.fromkeys(word for word in chosen if word is not None))
    check_writes(folders)
    loaded = load_adapted(base, folders, quantize=quantize, precision=precision)
    typer.echo(str(loaded.precision), err=True)
    torch.manual_seed(seed)
    with stages(as_json) as report:
        texts = generate_texts(
            loaded.model,
            loaded.tokenizer,
            [prompt_tokens(loaded, text, word, chat=chat) for text, word in zip(asked, chosen, strict=True)],
            max_new_tokens=max_new_tokens,
            num_beams=num_beams,
            temperature=temperature,
            batch_size=batch_size,
            adapters=[word and loaded.names[word] for word in chosen] if folders else None,
            progress=counting(report, "texts", len(asked)),
        )
    rows = [
        {"prompt": prompt, "adapter": word, "text": text}
        for prompt, word, text in zip(asked, chosen, texts, strict=True)
    ]
    if as_json:
        write_json(rows)
    else:
        _show(rows)


def paired(prompts: Sequence[str], adapters: Sequence[str]) -> tuple[list[str], list[str | None]]:
    """Prompts and adapters (None for the base itself) as equally long lists.

    Raises:
        ConfigError: several of both, but not as many.
    """
    from inlay.core.errors import ConfigError

    given = [None if word == BASE_ITSELF else word for word in adapters] or [None]
    if len(given) > 1 and len(prompts) > 1 and len(given) != len(prompts):
        raise ConfigError(
            f"{len(given)} adapters for {len(prompts)} prompts; give one adapter for all prompts, one for "
            f"each prompt, or several for a single prompt ({BASE_ITSELF!r} stands for the base itself)"
        )
    rows = max(len(given), len(prompts))
    return (
        list(prompts) * (rows if len(prompts) == 1 else 1),
        given * (rows if len(given) == 1 else 1),
    )


def check_writes(folders: Sequence[str]) -> None:
    """Raise a `ConfigError` where the adapters were trained to label texts, not to write them."""
    from inlay.cli.models import recorded_task
    from inlay.core.errors import ConfigError

    task = recorded_task(folders)
    if task not in (None, "causal", "seq2seq"):
        raise ConfigError(
            f"{', '.join(folders)} was trained for {task} and labels texts instead of writing them; "
            "use `inlay evaluate --predictions FILE`"
        )


def _show(rows: Sequence[dict[str, str | None]]) -> None:
    """A single text alone, so that it can be piped; several under headings."""
    if len(rows) == 1:
        typer.echo(rows[0]["text"])
        return
    for row in rows:
        typer.echo(f"── {row['prompt']}  [{row['adapter'] or 'base'}]")
        typer.echo(f"{row['text']}\n")
