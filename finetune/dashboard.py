"""The viewer of what the runs of one folder recorded: trackio or TensorBoard on 127.0.0.1, wandb's own in the terminal.

Which one: that of the newest record. No viewer of ours: ``runtable`` shows all runs as text, whatever their tracker.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from finetune import runtable
from finetune.devices import PROJECT, place_trackio, refuse_unusable, trackio_folder
from finetune.errors import EnvironmentFault
from finetune.runfolder import RunFolder, read_json
from finetune.terminal import Terminal, clean

_PATTERNS = {"trackio": "*.db", "wandb": "*run-*/run-*.wandb", "tensorboard": "**/events.out.tfevents.*"}
"""Viewer → the files that hold what its tracker recorded, in the folder that it makes."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a tracker wrote: ``place`` is its folder, ``file`` the newest in it.

    ``changed``: when the newest run of that tracker wrote its last step, as Unix time (a viewer touches the files).
    """

    viewer: str
    place: Path
    file: Path
    changed: float


def records(runs: Path) -> list[Record]:
    """What the runs at and below a folder recorded; the newest first."""
    changed: dict[tuple[str, Path], float] = {("trackio", trackio_folder(runs)): 0.0}
    for run in runtable.folders(runs):
        for viewer, place in _places(run.absolute()):
            when = _last_step(RunFolder(run), viewer)
            changed[viewer, place] = max(when, changed.get((viewer, place), 0.0))
    found = []
    for (viewer, place), when in changed.items():
        files = [path for path in place.glob(_PATTERNS[viewer]) if path.is_file()]
        if files:
            newest = max(files, key=lambda path: path.stat().st_mtime)
            found.append(Record(viewer=viewer, place=place, file=newest, changed=when))
    return sorted(found, key=lambda one: one.changed, reverse=True)


def _places(run: Path) -> Iterator[tuple[str, Path]]:
    """Where a run may have recorded: alone, or as one of several adapters in the folder above."""
    for whole in (run, run.parent):
        yield "trackio", trackio_folder(whole.parent)
        yield "wandb", whole / "wandb"
        yield "tensorboard", whole / "trackers"


def _last_step(run: RunFolder, viewer: str) -> float:
    """When the run wrote its last step; 0 where it has another tracker now."""
    known = read_json(run.identity)
    recipe = known.get("recipe") if isinstance(known, dict) else None
    try:
        return run.metrics.stat().st_mtime if isinstance(recipe, dict) and recipe.get("tracker") == viewer else 0.0
    except OSError:
        return 0.0


def show(runs: Path, port: int, viewer: str | None, terminal: Terminal) -> None:
    """Show the newest record, or the newest that ``viewer`` shows, until Ctrl-C or the viewer's own end.

    Raises:
        EnvironmentFault: nothing was recorded for it below ``runs``, or what it needs is not there.
    """
    found = records(runs)
    chosen = next((one for one in found if viewer in (None, one.viewer)), None)
    if chosen is None:
        what = f"no runs tracked by {viewer} here" if viewer and found else "no tracked runs here"
        there = f"--viewer {found[0].viewer}, or " if found else f"train with `tracker: {viewer or 'trackio'}`, or "
        raise EnvironmentFault(what, str(runs), f"{there}see all runs as text: finetune dashboard {runs} --text")
    others = sorted({one.viewer for one in found} - {chosen.viewer})
    if others:
        why = "which you asked for" if viewer else "which has the newest record"
        terminal.say(f"{chosen.viewer}, {why}; also here: {', '.join(f'--viewer {one}' for one in others)}")
    same = [one for one in found if one.viewer == chosen.viewer and one != chosen]
    if same and chosen.viewer != "tensorboard":
        terminal.say(f"showing {chosen.place}; name a folder to see another: {same[0].place.parent}")
    shows: dict[str, Callable[[Record, Path, int, Terminal], None]]
    shows = {"trackio": _trackio, "wandb": _wandb, "tensorboard": _tensorboard}
    shows[chosen.viewer](chosen, runs, port, terminal)


def _trackio(record: Record, runs: Path, port: int, terminal: Terminal) -> None:
    place_trackio(record.place)
    import trackio

    # It prints a token that allows writing: not for a log, so its own lines are not shown.
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            server = trackio.show(
                project=PROJECT, host="127.0.0.1", open_browser=False, block_thread=False, server_port=port or None
            )
    except Exception as error:  # its web server has many ways to say that it did not come up
        what = f"trackio's server did not start: {clean(str(error))}"
        fix = f"try again, on another --port, or see all runs as text: finetune dashboard {runs} --text"
        raise EnvironmentFault(what, str(record.place), fix) from error
    _serve(next(part for part in server if isinstance(part, str) and part.startswith("http")), runs, terminal)


def _tensorboard(record: Record, runs: Path, port: int, terminal: Terminal) -> None:
    refuse_unusable("tensorboard", "--viewer tensorboard")
    from tensorboard import program

    server = program.TensorBoard()
    words = ["--logdir", str(runs), "--host", "127.0.0.1", "--port", str(port), "--load_fast", "false"]
    server.configure(argv=["tensorboard", *words])
    _serve(server.launch(), runs, terminal)


def _serve(url: str, runs: Path, terminal: Terminal) -> None:
    with contextlib.suppress(KeyboardInterrupt):
        terminal.say(f"dashboard of {runs}: {url.partition('?')[0]}   (Ctrl-C ends)")
        while True:
            time.sleep(3600)


def _wandb(record: Record, runs: Path, port: int, terminal: Terminal) -> None:
    """wandb's own viewer reads the run's file from the disk; it takes the terminal until its user leaves it (q)."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        fix = f"see all runs as text: finetune dashboard {runs} --text"
        raise EnvironmentFault("the viewer of wandb's runs needs a terminal", str(record.place), fix)
    command = [sys.executable, "-P", "-m", "wandb", "leet", "run", str(record.file)]
    with contextlib.suppress(KeyboardInterrupt):
        code = subprocess.run(command, env={**os.environ, "WANDB_ERROR_REPORTING": "false"}, check=False).returncode
        if code:
            raise EnvironmentFault(f"wandb's viewer ended with {code}", str(record.file), "its message stands above")
