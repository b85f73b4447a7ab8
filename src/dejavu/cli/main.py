"""The `dejavu` command: its subcommands, and the one place where errors become exit statuses.

0: done. 2: a user's mistake, one line on stderr that names the value and the fix. 1: ours, with a traceback. 130: ^C.
Commands import what is heavy when they run, so that `dejavu --help` and usage errors come at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from dejavu.cli.adapt import adapt
from dejavu.cli.bench import bench
from dejavu.cli.bench_serve import bench_serve
from dejavu.cli.chat import chat
from dejavu.cli.demo import demo
from dejavu.cli.evaluation import evaluation
from dejavu.cli.export import export
from dejavu.cli.generation import generate
from dejavu.cli.info import info
from dejavu.cli.plant import plant
from dejavu.cli.profile import profile
from dejavu.cli.quantize import quantize
from dejavu.cli.report import report
from dejavu.cli.serve import serve
from dejavu.cli.train import train
from dejavu.cli.trial import trial
from dejavu.version import __version__

# typer does not export these two; from the oldest to the newest version that pyproject.toml allows they are the bases of one that it does.
USAGE_ERROR = typer.BadParameter.__base__ or typer.BadParameter
CLICK_ERROR = USAGE_ERROR.__base__ or USAGE_ERROR
INTERRUPTED = 130

app = typer.Typer(
    name="dejavu",
    help="Contextual sparsity for language models: read only the weights that the token at hand needs.",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(f"dejavu {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


for name, command in {
    "demo": demo,
    "try": trial,
    "profile": profile,
    "train": train,
    "adapt": adapt,
    "eval": evaluation,
    "generate": generate,
    "chat": chat,
    "bench": bench,
    "serve": serve,
    "bench-serve": bench_serve,
    "report": report,
    "export": export,
    "quantize": quantize,
    "plant": plant,
    "info": info,
}.items():
    app.command(name)(command)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's) and return its exit status."""
    try:
        status = typer.main.get_command(app).main(arguments, prog_name="dejavu", standalone_mode=False)
    except CLICK_ERROR as error:
        return _mistake(_usage(error, sys.argv[1:] if arguments is None else arguments))
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone, as in `dejavu info | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        return _mistake(str(error))
    except MemoryError as error:
        return _mistake(str(error) or "this machine's memory is not enough; take a smaller model, or one of fewer bytes with --dtype")
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # of torch, which is not imported to ask
            return _mistake("the GPU's memory is not enough; end what else runs there, or take a smaller model, --dtype, cache or batch")
        traceback.print_exc()
        print("This is a bug of dejavu; please report it with the lines above.", file=sys.stderr)
        return 1
    return status if isinstance(status, int) else 0


def main() -> None:
    """Entry point of the `dejavu` script."""
    sys.exit(run())


def _usage(error: Any, arguments: Sequence[str]) -> str:
    """What is wrong with the command line, with the value where the library leaves it out."""
    context = error.ctx if isinstance(error, USAGE_ERROR) else None
    where = "dejavu" if context is None else context.command_path
    given = _given(error.param.opts, arguments) if isinstance(error, typer.BadParameter) and error.param is not None else None
    value = "" if given is None or given in error.format_message() else f", not {given!r}"
    return f"{error.format_message().rstrip('.')}{value}; see `{where} --help`"


def _given(options: Sequence[str], arguments: Sequence[str]) -> str | None:
    """The last value of an option on the command line."""
    found = None
    for argument, following in zip(arguments, [*arguments[1:], None], strict=True):
        name, equals, value = argument.partition("=")
        if name in options:
            found = value if equals else following
    return found


def _mistake(message: str) -> int:
    print("dejavu: " + " ".join(message.split()), file=sys.stderr)
    return 2
