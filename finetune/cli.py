"""The command line: each verb calls the pipeline once. The only place that prints an error and picks an exit code.

Imports no torch: ``--help`` and a faulty recipe are answered before any of it loads.
"""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from finetune import __version__, datacli
from finetune.errors import EnvironmentFault, Fault, FinetuneError, Interrupted, ModelError
from finetune.options import Overrides, RecipePath, check_recipe, silent
from finetune.terminal import Terminal, clean

app = typer.Typer(
    name="finetune",
    help="One recipe trains, resumes, judges, merges and proves a LoRA/QLoRA derivative of Qwen-14B.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

RunPath = Annotated[Path, typer.Argument(help="the run's folder (`output:` of its recipe)", show_default=False)]


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
    as_json: Annotated[bool, typer.Option("--json", help="print the plan as JSON")] = False,
    card: Annotated[
        float | None, typer.Option("--card", help="plan for a CUDA card with so many GB, not for this machine", min=1)
    ] = None,
) -> None:
    """Check a recipe, its data and its model, and say what a run would do and cost."""
    check_recipe(recipe, set_)
    from finetune import pipeline

    made = pipeline.plan(recipe, set_ or (), silent() if as_json else Terminal(), card)
    if as_json:
        typer.echo(json.dumps(made.to_dict(), indent=2))


@app.command()
def train(
    recipe: RecipePath,
    set_: Overrides = None,
    extend: Annotated[bool, typer.Option("--extend", help="lengthen a run to the recipe's new steps")] = False,
) -> None:
    """Run a recipe, or go on with it where it was interrupted."""
    check_recipe(recipe, set_)
    from finetune import pipeline

    pipeline.train(recipe, set_ or (), Terminal(), extend=extend)


app.add_typer(datacli.app, name="data")


@app.command(name="eval")
def eval_(run: RunPath) -> None:
    """Judge a finished run: its base and its adapter on the held-out rows."""
    from finetune import pipeline

    pipeline.evaluate_run(run, Terminal())


@app.command()
def merge(
    run: RunPath,
    out: Annotated[Path, typer.Option("--out", help="the folder to write, which must not exist")],
    base: Annotated[
        str, typer.Option("--base", help="replayed (as trained against), original (as published), or what is nearer")
    ] = "auto",
    layout: Annotated[
        str, typer.Option("--layout", help="native (plain transformers) or original (the first Qwen's own)")
    ] = "native",
) -> None:
    """Fold a run's adapter into its base, and prove that the result is the trained model."""
    _one_of(base, _BASES, "--base")
    _one_of(layout, _LAYOUTS, "--layout")
    from finetune import pipeline

    pipeline.merge(run, out, base, Terminal(), layout)


_BASES, _LAYOUTS = ("auto", "replayed", "original"), ("native", "original")


def _one_of(word: str, legal: Sequence[str], option: str) -> None:
    if word not in legal:
        raise typer.BadParameter(f"must be {', '.join(legal[:-1])} or {legal[-1]}", param_hint=option)


@app.command()
def release(
    run: RunPath,
    out: Annotated[Path, typer.Option("--out", help="the folder to publish, which must not exist")],
    what: Annotated[str, typer.Option("--what", help="merged, adapter or both")] = "merged",
    base: Annotated[str, typer.Option("--base", help="as of `finetune merge`")] = "auto",
    layout: Annotated[str, typer.Option("--layout", help="as of `finetune merge`")] = "native",
    data_licence: Annotated[
        str | None, typer.Option("--data-licence", help="the data's licence, where no text beside it says it")
    ] = None,
    allow_unknown: Annotated[
        bool, typer.Option("--allow-unknown-licence", help="go on where a licence is not known; the card says so")
    ] = False,
    key: Annotated[Path | None, typer.Option("--sign", help="sign with this private key (extra sign)")] = None,
) -> None:
    """Make the folder that one publishes: weights, card, licence, notice, manifest, digests."""
    _one_of(what, ("merged", "adapter", "both"), "--what")
    _one_of(base, _BASES, "--base")
    _one_of(layout, _LAYOUTS, "--layout")
    from finetune import pipeline

    pipeline.release(
        run, out, what, Terminal(), choice=base, layout=layout, data_licence=data_licence, allow_unknown=allow_unknown,
        key=key,
    )  # fmt: skip


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="a release", show_default=False)],
    key: Annotated[Path | None, typer.Option("--key", help="the public key that it must be signed with")] = None,
) -> None:
    """Check every byte of a release. Exit 1 where anything differs. Needs no torch."""
    from finetune import signature
    from finetune import verify as checks

    try:
        faults = checks.faults(folder)
        faults += signature.check_signature(folder, key) if key is not None else []
    except checks.NoRelease as error:
        raise ModelError(str(error), str(folder), "name a folder that `finetune release` made") from None
    except signature.CannotCheck as error:
        raise EnvironmentFault(str(error), str(folder), "pip install 'finetune-qwen[sign]'") from None
    if faults:
        raise FinetuneError.of([Fault(fault, str(folder)) for fault in faults])
    typer.echo(f"{folder}: every file is what was released{'' if key is None else ', and the signature is right'}")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="a model folder, or an adapter's", show_default=False)],
    out: Annotated[Path, typer.Argument(help="the folder to write, which must not exist", show_default=False)],
    to: Annotated[str, typer.Option("--to", help="native (plain transformers) or original (the first Qwen's own)")],
) -> None:
    """Write a model or an adapter in the other layout. The numbers stay as they are."""
    _one_of(to, _LAYOUTS, "--to")
    from finetune import pipeline

    pipeline.convert(source, out, to, Terminal())


@app.command()
def chat(run: RunPath) -> None:
    """Talk to a finished run's model, or to a merged folder."""
    from finetune import pipeline

    pipeline.chat(run, Terminal())


@app.command()
def dashboard(
    runs: Annotated[Path, typer.Argument(help="the folder that holds the runs")] = Path("runs"),
    port: Annotated[int, typer.Option("--port", help="0 takes the first free one", min=0, max=65535)] = 0,
) -> None:
    """Open the local dashboard of all runs, on this machine only."""
    from finetune import pipeline

    pipeline.dashboard(runs, port, Terminal())


@app.command(name="schema")
def schema_() -> None:
    """Print the JSON schema of recipes, for editors."""
    from finetune import recipe

    typer.echo(json.dumps(recipe.schema(), indent=2))


@app.command(hidden=True)
def summary(run: RunPath, began: float) -> None:
    """The closing lines of ``make quickstart``; ``began`` is a Unix time."""
    from finetune import pipeline

    pipeline.summary(run, time.time() - began, Terminal())


def main_in_process(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; errors go to stderr as one message, never a traceback."""
    try:
        code = app(list(arguments), standalone_mode=False)
    except FinetuneError as error:
        return _report(error)
    except OSError as error:
        fault = EnvironmentFault(error.strerror or str(error), str(error.filename or ""), "mend that and run again")
        return _report(fault)
    except Exception as error:  # noqa: BLE001 — the last line of defence: a user never sees a traceback
        return _unexpected(error)
    if code == _CTRL_C:  # typer's answer to KeyboardInterrupt
        return _report(Interrupted(_STOPPED, fix=_GO_ON))
    return code if isinstance(code, int) else 0


def _unexpected(error: Exception) -> int:
    """Usage errors of the command line explain themselves; anything else is a defect of ours and says so."""
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if callable(show) and isinstance(code, int):
        show()
        return code
    if _debug:
        traceback.print_exc()
    else:
        text = clean(f"{type(error).__name__}: {error}")
        sys.stderr.write(
            f"unexpected failure: {text}\n  run with `finetune --debug …` for the traceback, and report it\n"
        )
    return 70


def _report(error: FinetuneError) -> int:
    if _debug:
        traceback.print_exc()
    for what, where, fix in error.faults:
        place = f"{where}: " if where else ""
        sys.stderr.write(f"{error.label}: {clean(place + what, 600)}{'; ' + clean(fix, 400) if fix else ''}\n")
    return error.exit_code


def _quiet_libraries() -> None:
    """Chatter of the libraries below that a user can do nothing about. Errors stay errors: they are raised."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)  # lengths are judged here
    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it also logs what it raises
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def main() -> None:
    """The ``finetune`` command. SIGTERM is Ctrl-C from the first moment on, also before training listens for it."""
    # Read when torch loads. Threads that sleep while they wait: on a machine shared with other work, spinning ones
    # made generation several times slower (55 s against 6 s, seen once). On an idle machine it was not measured.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no × gets a ?
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = main_in_process(sys.argv[1:])
    except KeyboardInterrupt:  # outside the part that typer watches
        code = _report(Interrupted(_STOPPED, fix=_GO_ON))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(code))
    sys.exit(code)
