"""The Typer application and its entry point.

Only typer and the standard library are imported before a command runs, so that help answers at once; each command
imports the engine when it is called.
"""

import os
import shlex
import signal
import sys
import traceback

import typer

from hqdm_cli import console
from hqdm_cli.commands import (
    bench,
    compare,
    distill,
    doctor,
    export,
    gc,
    methods,
    plan,
    profile,
    report,
    reproduce,
    run,
    sample,
    score,
    show,
    status,
    verify,
)  # fmt: skip
from hqdm_cli.journal import journalled
from pipelines import processes, stops
from pipelines.errors import Terminated

app = typer.Typer(
    name="hqdm",
    help="Quantise a diffusion model to few bits, from its checkpoint to a scored model in integer arithmetic.",
    epilog="""\b
Example:
  hqdm profile model.ckpt
  hqdm plan
  hqdm distill --bits w4a4
  hqdm export --format int
  hqdm sample
  hqdm score

Exit codes: 0 done, 1 something you can mend, 2 usage, 130 interrupted, 143 terminated.""",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# The first show progress and can keep a journal.
LONG = (profile, plan, distill, export, sample, score, compare, run, reproduce, bench)
SHORT = (status, show, verify, gc, methods, report, doctor)
OUT_OF_MEMORY = ("can't allocate memory", "CUDA out of memory")  # torch's words for it
for module in (*LONG, *SHORT):
    name = module.__name__.rpartition(".")[2]
    command = getattr(module, name)
    app.command(name, epilog=f"\b\nExample:\n  {module.EXAMPLE}")(journalled(command) if module in LONG else command)


def main(args: list[str] | None = None) -> int:
    """Run one command line; its exit code. Everything a user can mend is one `error:` line and a `hint:`."""
    args = list(sys.argv[1:] if args is None else args)
    processes.end_with_launcher()
    if processes.asked() > 1 and os.environ.get("RANK", "0") != "0":
        return _follow("--debug" in args)
    try:
        return _lead(args)
    finally:
        if processes.asked() > 1:
            processes.dismiss()


def _follow(debug: bool) -> int:
    """Share the leader's work. Who failed says why. That another process ended is no fault of this one: an agent that
    watches over all of them (torchrun, hqdm) has the exit code of that one, and elsewhere whoever restarts processes
    has to restart this one too.
    """
    from pipelines.runner import follow

    try:
        with stops.heard(signal.SIGINT):  # a process that waits for others ends by SIGTERM at once
            follow()
    except processes.PeerLost:
        return 0 if "TORCHELASTIC_RUN_ID" in os.environ else 1
    except KeyboardInterrupt:
        return 130
    except Exception as fault:
        return _failed(fault, debug)
    finally:
        processes.part_company()
    return 0


def _lead(args: list[str]) -> int:
    debug = "--debug" in args
    try:
        processes.check_settings()
        with stops.heard():
            code = typer.main.get_command(app).main(
                args=args or ["--help"], prog_name="hqdm", standalone_mode=False, obj={"args": args}
            )
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output left. Point stdout elsewhere, or the interpreter complains again while it closes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        code = 130
    except Terminated:
        code = 143
    except typer.TyperException as fault:  # the command line itself: an unknown option or command, a missing value
        path = getattr(getattr(fault, "ctx", None), "command_path", "hqdm")
        console.error(fault.format_message(), f"{path} --help")
        return fault.exit_code
    except Exception as fault:
        return _failed(fault, debug)
    if code in (130, 143):
        again = shlex.join(word for word in args if word != "--force")
        what = "interrupted" if code == 130 else "terminated"
        console.error(what, f"what was done is kept; the same command goes on: hqdm {again}")
    return code or 0


def _failed(fault: Exception, debug: bool) -> int:
    """Show an error of the engine; re-raise what is no user's fault, so that its traceback is seen."""
    from pipelines.errors import HqdmError

    if debug:
        traceback.print_exception(fault)
    if isinstance(fault, HqdmError):
        console.error(fault.what, fault.hint)
        return fault.exit_code
    if isinstance(fault, OSError) and fault.strerror:
        where = f"{fault.filename}: " if fault.filename else ""
        console.error(f"{where}{fault.strerror}", "see that the path, its rights and the space on its disk are right")
        return 1
    if isinstance(fault, MemoryError) or any(words in str(fault) for words in OUT_OF_MEMORY):
        console.error(f"out of memory: {fault}".rstrip(": "), "take a smaller --batch, or a machine with more memory")
        return 1
    raise fault
