"""`inlay`: the commands, found when they are needed, and the one place where errors become exit codes.

0    done
2    a mistake the user can mend: one message on standard error, no traceback
130  Ctrl-C            143  SIGTERM
1    anything else: a fault of ours, with its traceback
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

# In the order of the help page. Each module has a function of its name.
COMMANDS = (
    "train", "evaluate", "generate", "methods", "inspect", "merge", "combine", "convert", "plan", "schema", "demo",
)  # fmt: skip


class LazyGroup(TyperGroup):
    """Commands from `COMMANDS`, each imported when asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        return [name for name in COMMANDS if _exists(name)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS or not _exists(cmd_name):
            return super().get_command(ctx, cmd_name)
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(cmd_name, no_args_is_help=False)(getattr(import_module(f"inlay.cli.{cmd_name}"), cmd_name))
        return typer.main.get_command(single)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Every command with its whole description; click's own cuts them."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl([(name, " ".join((c.help or "").split())) for name, c in commands.items()])

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        from inlay.core.errors import ConfigError, nearest

        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            raise ConfigError(f"no command {args[0]!r}{nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _say("stopped by Ctrl-C")
            raise typer.Exit(130) from None
        except Exception as error:
            code = exit_code(error)
            if code is None:
                raise
            _say(_message(error))
            raise typer.Exit(code) from None


def exit_code(error: BaseException) -> int | None:
    """The exit code of an error that is no fault of ours; None for all others."""
    import errno

    from inlay.core.errors import InlayError, UserError

    if isinstance(error, UserError):
        return 2
    if isinstance(error, InlayError):
        return getattr(error, "exit_code", None)
    return 2 if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) else None


def _message(error: BaseException) -> str:
    from inlay.core.errors import InlayError, UserError

    if isinstance(error, UserError):
        return f"error: {error}"
    return (
        str(error) if isinstance(error, InlayError) else f"error: the disk is full ({error}). Free space and try again"
    )


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _exists(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(f"inlay.cli.{name}") is not None


def _version(asked: bool) -> None:
    if asked:
        from inlay import __version__

        sys.stdout.write(f"inlay {__version__}\n")
        raise typer.Exit


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def inlay(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Set small trained pieces into a frozen model: train, evaluate, generate, merge."""


def main(args: list[str] | None = None) -> None:
    """Run the command line; ends the process."""
    typer.main.get_command(app).main(args, prog_name="inlay")
