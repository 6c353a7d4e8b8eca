"""The command line: each verb calls the pipeline once. The only place that prints an error and picks an exit code.

Imports no torch: ``--help`` and a faulty recipe are answered before any of it loads.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import json
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from finetune import __version__, datacli, hardware, interrupts, judgecli, runcli, shipcli, startcli, talkcli, traincli
from finetune.errors import EnvironmentFault, Fault, FinetuneError, Interrupted
from finetune.options import AsJson, Overrides, Quiet, RecipePath, RunPath, check_recipe, print_json, terminal
from finetune.terminal import Terminal, clean

app = typer.Typer(
    name="finetune",
    help="One recipe trains, resumes, judges, merges and proves a LoRA/QLoRA derivative of Qwen-14B.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of a failure")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    global _debug
    _debug = debug


_debug = False
_CTRL_C = 130
_STOPPED, _GO_ON = "stopped on request", "give the same command again"


@app.command()
def plan(
    recipe: RecipePath,
    set_: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    card: Annotated[
        float | None, typer.Option("--card", help="plan for a CUDA card with so many GB, not for this machine", min=1)
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="load the model, take two steps and correct the prediction; writes nothing")
    ] = False,
    processes: Annotated[int, typer.Option("--processes", help="plan for each of so many", min=1, max=4096)] = 1,
    fsdp_config: Annotated[
        Path | None, typer.Option("--fsdp-config", help="write accelerate's settings of FSDP 2 for the plan too")
    ] = None,
    deepspeed_config: Annotated[
        Path | None, typer.Option("--deepspeed-config", help="write DeepSpeed's settings of ZeRO-3 for the plan too")
    ] = None,
) -> None:
    """Check a recipe, its data and its model, and say what a run would do and cost."""
    check_recipe(recipe, set_)
    from finetune import pipeline

    screen = terminal(quiet=quiet, as_json=as_json)
    if probe and (card or processes > 1):
        what = "two steps can be taken on this machine alone, by one process: leave --card and --processes out"
        raise typer.BadParameter(what, param_hint="--probe")
    if probe:
        made = pipeline.probe(recipe, set_ or (), screen)
    else:
        asked = {kind: path for kind, path in (("fsdp", fsdp_config), ("zero3", deepspeed_config)) if path is not None}
        made = pipeline.plan(recipe, set_ or (), screen, card, processes, asked).to_dict()
    if as_json:
        print_json(made)


app.add_typer(datacli.app, name="data")


app.command(name="eval")(judgecli.eval_)
for _verb in (
    *startcli.VERBS,
    traincli.train,
    *shipcli.VERBS,
    *runcli.VERBS,
    *talkcli.VERBS,
    judgecli.predict,
    judgecli.teach,
):
    app.command(name=_verb.__name__.rstrip("_"))(_verb)


@app.command()
def report(run: RunPath, as_json: AsJson = False, quiet: Quiet = False) -> None:
    """(Re)write a run's report.html from the files in its folder, and print where it is. Needs no torch."""
    from finetune import runpage

    pages = [str(path) for path in runpage.rewrite(run)]
    if as_json:
        print_json({"pages": pages})
    elif not quiet:
        for path in pages:
            typer.echo(path)


@app.command()
def dashboard(
    runs: Annotated[Path, typer.Argument(help="a run, or the folder that holds the runs")] = Path("runs"),
    port: Annotated[int, typer.Option("--port", help="0 takes the first free one", min=0, max=65535)] = 0,
    viewer: Annotated[
        Literal["trackio", "wandb", "tensorboard"] | None,
        typer.Option("--viewer", help="which one; without it that of the newest record"),
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="print where all runs stand, from their own files")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="as --text, again every few seconds until Ctrl-C")] = False,
    every: Annotated[float, typer.Option("--every", help="seconds between two looks of --watch", min=0.1)] = 3.0,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Open the local viewer of what the runs recorded; with --text, --watch or --json tell where all of them stand."""
    from finetune import runtable

    if watch and as_json:
        raise typer.BadParameter("it is one object: leave --watch out", param_hint="--json")
    if as_json:
        print_json(runtable.to_dict(runs))
    elif watch:
        with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
            runtable.watch(runs, sys.stdout, every)
    elif text:
        for line in runtable.lines(runs):
            typer.echo(line)
    else:
        from finetune import dashboard as viewers

        viewers.show(runs, port, viewer, terminal(quiet=quiet))


@app.command(name="schema")
def schema_() -> None:
    """Print the JSON schema of recipes, for editors."""
    from finetune import recipe

    typer.echo(json.dumps(recipe.schema(), indent=2))


@app.command(hidden=True)
def summary(run: RunPath, began: float) -> None:
    """The closing lines of ``make quickstart``; ``began`` is a Unix time."""
    from finetune import report

    for line in report.summary_lines(run, time.time() - began):
        Terminal().say(line)


def main_in_process(arguments: Sequence[str], ended: Callable[[], None] = lambda: None) -> int:
    """Run one command and return its exit code; errors go to stderr as one message, never a traceback.

    ``ended``: called as soon as the outcome is known.
    """
    try:
        code = app(list(arguments), standalone_mode=False)
    except FinetuneError as error:
        ended()
        return _report(error, as_json="--json" in arguments)
    except OSError as error:
        ended()
        fault = EnvironmentFault(error.strerror or str(error), str(error.filename or ""), "mend that and run again")
        return _report(fault, as_json="--json" in arguments)
    except Exception as error:  # noqa: BLE001 — the last line of defence: a user never sees a traceback
        ended()
        if not interrupts.asked():
            return _unexpected(error, as_json="--json" in arguments)
        code = _CTRL_C  # a library made another error of it
    ended()
    if code == _CTRL_C:  # typer's answer to KeyboardInterrupt
        return _report(Interrupted(_STOPPED, fix=_GO_ON), as_json="--json" in arguments)
    return code if isinstance(code, int) else 0


def _unexpected(error: Exception, *, as_json: bool) -> int:
    """Usage errors of the command line explain themselves; anything else is a defect of ours and says so."""
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if callable(show) and isinstance(code, int):
        show()
        if as_json:
            _print_faults(code, "usage", [Fault(clean(getattr(error, "message", "") or str(error), 600))])
        return code
    if _debug:
        traceback.print_exc()
    else:
        text = clean(f"{type(error).__name__}: {error}")
        sys.stderr.write(
            f"unexpected failure: {text}\n  run with `finetune --debug …` for the traceback, and report it\n"
        )
    return 70


def _report(error: FinetuneError, *, as_json: bool = False) -> int:
    """Say what is wrong, for a person on standard error and, where a program asked, as the one object it waits for."""
    if _debug:
        traceback.print_exc()
    for what, where, fix in error.faults:
        place = f"{where}: " if where else ""
        sys.stderr.write(f"{error.label}: {clean(place + what, 600)}{'; ' + clean(fix, 400) if fix else ''}\n")
    if as_json:
        _print_faults(error.exit_code, error.label, error.faults)
    return error.exit_code


def _print_faults(code: int, kind: str, faults: Sequence[Fault]) -> None:
    """The object that a program gets where it asked for one; a full disk can tell it nothing."""
    with contextlib.suppress(OSError):
        print_json({"error": {"exit_code": code, "kind": kind, "faults": [fault._asdict() for fault in faults]}})


def _quiet_libraries() -> None:
    """Chatter of the libraries below that a user can do nothing about. Errors stay errors: they are raised."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)  # lengths are judged here
    logging.getLogger("torchao").setLevel(logging.ERROR)  # binaries for cards that are not here
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # what torchao does at its import
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it also logs what it raises
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # Nothing is written into a layer's output; it would end in an error, since its weights stayed in shards.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def _flushed(code: int) -> int:
    """The exit code once standard output is written: a full disk may say so at the very end."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fault = EnvironmentFault(f"what was printed is lost: {error.strerror}", "standard output", "free some space")
        return code or _report(fault)
    return code


def _deaf() -> None:
    """A request to stop has nothing left to stop: it would end in the middle of the last message, or of tidying up."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def main() -> None:
    """The ``finetune`` command. SIGTERM is Ctrl-C from the first moment on, also before training listens for it."""
    hardware.set_libraries()
    _quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no × gets a ?
    atexit.register(_deaf)  # the last one of all: what ends the interpreter is not cut either
    signal.signal(signal.SIGTERM, interrupts.first)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job is not to hear it
        signal.signal(signal.SIGINT, interrupts.first)
    try:
        code = main_in_process(sys.argv[1:], _deaf)
    except KeyboardInterrupt:  # outside the part that typer watches
        _deaf()
        code = _report(Interrupted(_STOPPED, fix=_GO_ON))
    code = _flushed(code)
    # Under -m CPython ends by SIGINT, whatever code it is given, where the last text that was executed (by exec, as
    # dataclasses are made) was cut by KeyboardInterrupt; another text, as each namedtuple is made of, takes that back.
    namedtuple("Text", "")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(code))
    sys.exit(code)
