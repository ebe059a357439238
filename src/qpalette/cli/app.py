"""The list of commands, and what happens to their errors."""

from __future__ import annotations

import errno
import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qpalette.cli import (
    bench,
    calibrate,
    chat,
    compare,
    compile,
    doctor,
    evaluate,
    export,
    generate,
    inspection,
    palette,
    plan,
    profile,
    push,
    quantize,
    sensitivity,
    serve,
    tune,
)
from qpalette.cli.output import print_error
from qpalette.core.environment import CPU_BYTES
from qpalette.core.errors import QPaletteError

DEBUG = "QPALETTE_DEBUG"
RESUMABLE = ("calibrate", "profile", "quantize", "sensitivity", "tune")
INTERRUPTED = 130  # 128 + SIGINT, as shells count


class _OneLineErrors(TyperGroup):
    """Turns what goes wrong on purpose into one line; with QPALETTE_DEBUG=1 into a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except QPaletteError as error:
            raise _failure(error, str(error)) from error
        except KeyboardInterrupt as error:
            resumes = "; the same command resumes where it stopped" if ctx.invoked_subcommand in RESUMABLE else ""
            print_error(f"interrupted{resumes}")
            raise typer.Exit(INTERRUPTED) from error
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # the reader of a pipe has left: no error to tell
            raise _failure(error, f"{error.filename or 'the system'}: {error.strerror or error}") from error


def _failure(error: Exception, message: str) -> Exception:
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        return error
    print_error(message)
    return typer.Exit(1)


app = typer.Typer(
    name="qpalette",
    cls=_OneLineErrors,
    help="Quantize language models at any rate, near Shannon's bound.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"qpalette {version('qpalette')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    os.environ.setdefault(CPU_BYTES, "1")  # the commands compute in float32 on a CPU for its range, and want speed


app.command("doctor")(doctor.doctor)
app.command("inspect")(inspection.inspect)
app.command("palette")(palette.palette)
app.command("calibrate")(calibrate.calibrate)
app.command("sensitivity")(sensitivity.sensitivity)
app.command("plan")(plan.plan)
app.command("quantize")(quantize.quantize)
app.command("tune")(tune.tune)
app.command("eval")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("export")(export.export)
app.command("push")(push.push)
app.command("bench")(bench.bench)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("profile")(profile.profile)
app.command("compile")(compile.compile_kernels)
app.command("serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(serve.serve)
