"""`weft`: one verb for each step of the journey."""

from __future__ import annotations

import errno
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from weft import __version__
from weft.cli import data, eval, export, generate, models, plan, profile, prompt, serve, train, triton, tune, verify
from weft.cli.export_triton import triton as export_triton

NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOTDIR, errno.ENAMETOOLONG)
"""Why a disk takes nothing: it is full, not this user's to write on, or the path leads through a file or is too long."""

JOURNEY = (
    "data", "models", "plan", "tune", "train", "verify", "profile", "export", "generate", "serve", "serve-triton",
    "prompt", "eval",
)  # fmt: skip
"""The verbs, in the order in which they are wanted."""


STOPPED = 130
"""The exit code of what Ctrl-C has ended, as a shell has it."""


class Verbs(TyperGroup):
    """Typer would list those without verbs of their own first, and give what Ctrl-C ends the exit code of a failure."""

    def list_commands(self, ctx: typer.Context) -> list[str]:  # type: ignore[override]
        return list(JOURNEY)

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(told_stopped()) from None


app = typer.Typer(
    cls=Verbs,
    help="Train a neural network too large for one GPU or one server, prove the run right, and put it into production.",
    epilog="The journey: weft data → weft train → weft verify → weft export → weft serve. Start with `make demo`.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.add_typer(data.app, name="data")
app.command("models")(models.models)
app.add_typer(plan.app, name="plan")
app.command("tune")(tune.tune)
app.command("train")(train.train)
app.add_typer(profile.app, name="profile")
app.add_typer(verify.app, name="verify")
app.add_typer(export.app, name="export")
export.app.command("triton")(export_triton)
app.command("generate")(generate.generate)
app.command("serve")(serve.serve)
app.command("eval")(eval.evaluate)
app.add_typer(prompt.app, name="prompt")
app.command("serve-triton")(triton.serve_triton)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    if version:
        print(__version__)
        raise typer.Exit


def told_stopped() -> int:
    print("weft: stopped", file=sys.stderr)
    return STOPPED


def main() -> None:
    """Run the command line. A user's mistake (ValueError), and a disk that takes nothing, is a sentence on stderr and exit
    code 2."""
    try:
        app()
    except KeyboardInterrupt:  # before any verb began
        sys.exit(told_stopped())
    except ValueError as error:
        print(f"weft: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in NOT_WRITTEN:
            raise
        where = f": {error.filename}" if error.filename else ""
        print(f"weft: error: {error.strerror}{where}", file=sys.stderr)
        sys.exit(2)
