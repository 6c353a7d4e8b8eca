"""The ways to break a run: each breaks it at one point, gives the same command again, and returns a verdict."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from finetune import manifest
from tests.faults import Mode, Op, Outcome
from tests.faults.sweep import Lane, Verdict, snapshot

WRITES = {"write", "pwrite64", "writev", "pwritev", "ftruncate"}
RENAMES = {"rename", "renameat", "renameat2"}
DELETIONS = {"unlink", "unlinkat", "rmdir"}
NEEDS_SPACE = WRITES | RENAMES | {"openat", "open", "mkdir"}


class At(NamedTuple):
    """A point among the counted operations of a config's run."""

    config: str
    mode: Mode
    n: int


def killed_at(lane: Lane, at: At) -> Verdict:
    point, outcome = lane.faulted(at.config, at.mode, at.n)
    return lane.again(at.config, point, broken="" if outcome.signal == signal.SIGKILL else "it was not killed")


class Moment(NamedTuple):
    """A share of the time that a config's whole run takes."""

    config: str
    share: float


def killed_in_time(lane: Lane, moment: Moment) -> Verdict:
    seconds = moment.share * lane.whole(moment.config).seconds
    outcome = lane.train(moment.config, fresh=True, kill_after_seconds=seconds)
    ended = outcome.signal == signal.SIGKILL or outcome.exit_code == 0
    point = f"{moment.config} killed after {seconds:.3f} s (at {outcome.seconds:.3f})"
    return lane.again(moment.config, point, broken="" if ended else f"it ended with {outcome.exit_code}")


def refused_at(lane: Lane, at: At) -> Verdict:
    """The disk refuses: one coded line, the checkpoints before unharmed, nothing half-written."""
    point, outcome = lane.faulted(at.config, at.mode, at.n)
    return lane.again(at.config, point, broken=_after_refusal(lane.run_folder, outcome, at.n))


def _after_refusal(run: Path, outcome: Outcome, n: int) -> str:
    if outcome.exit_code == 0 and outcome.log[n - 1].name in DELETIONS | {"mkdir"}:
        # What could not be deleted has a temporary name, which the next command clears. A folder that is there already
        # is asked for again, and whether that fails is all the same.
        return ""
    if outcome.exit_code == 0 and _of_report(outcome.log, n):
        return "" if "report.html was not written: " in outcome.stdout else "not said: the report was not written"
    lines = outcome.stderr.splitlines()
    if outcome.exit_code != 5 or len(lines) != 1 or not lines[0].startswith("environment: "):
        return f"it ended with {outcome.exit_code}: {outcome.stderr[-300:]}"
    checkpoints = run / "checkpoints"
    sound = {path.name for path in checkpoints.glob("step-*") if not manifest.faults(path)}
    lost = _committed(outcome.log[: n - 1], checkpoints) - sound
    if lost:
        return f"lost {', '.join(sorted(lost))}"
    left = [str(path.relative_to(run)) for path in run.rglob("*.tmp-*")]
    return f"left {', '.join(left)}" if left and outcome.log[n - 1].name not in DELETIONS else ""


def _of_report(log: Sequence[Op], n: int) -> bool:
    """Whether operation ``n`` writes the report, or flushes its name: what fails there is said and stops nothing."""
    op, before = log[n - 1], log[n - 2]
    return "report.html" in op.path or (op.name == "fsync" and before.name in RENAMES and "report.html" in before.path)


def _committed(log: Sequence[Op], checkpoints: Path) -> set[str]:
    """The checkpoints that renames had put in place, and not away again."""
    found: set[str] = set()
    for op in log:
        if op.name in RENAMES:
            new, old = Path(op.path), Path(op.other)
            found |= {new.name} if new.parent == checkpoints and ".tmp-" not in new.name else set()
            found -= {old.name} if old.parent == checkpoints else set()
    return found


class Damage(NamedTuple):
    """What happens to a checkpoint file while nobody looks: ``kind`` is flip, cut or remove."""

    steps: int
    files: tuple[str, ...]
    kind: str
    seed: int


def damaged(lane: Lane, damage: Damage) -> Verdict:
    """Damage the newest checkpoint of a run that was killed; with no files, that of every checkpoint."""
    stopped = _stopped_after(lane, damage.steps)
    shutil.rmtree(lane.run_folder, ignore_errors=True)
    shutil.copytree(stopped, lane.run_folder)
    newest = lane.run_folder / "checkpoints" / f"step-{damage.steps:08d}"
    files = [newest / name for name in damage.files] or list(newest.parent.glob("step-*/adapter_model.safetensors"))
    draw = random.Random(damage.seed)
    for file in files:
        _spoil(file, damage.kind, draw)
    point = f"step {damage.steps}: {damage.kind} {', '.join(damage.files) or 'all'} (seed {damage.seed})"
    return lane.again("packing", point, said=f"checkpoint {newest.name} is passed over")


def _spoil(file: Path, kind: str, draw: random.Random) -> None:
    if kind == "remove":
        file.unlink()
        return
    data = bytearray(file.read_bytes())
    place = draw.randrange(len(data))
    if kind == "cut":
        file.write_bytes(data[:place])
        return
    data[place] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def _stopped_after(lane: Lane, steps: int) -> Path:
    """A copy of the run folder as a kill right after the checkpoint of ``steps`` left it."""
    kept = lane.folder / f"stopped-{steps}"
    if not kept.exists():
        log = lane.whole("packing").log
        rename = next(op.number for op in log if op.name == "rename" and op.path.endswith(f"step-{steps:08d}"))
        lane.faulted("packing", Mode.KILL_AFTER, rename)
        shutil.copytree(lane.run_folder, kept)
    return kept


class Request(NamedTuple):
    """A signal after a share of the whole run's time, to the process or (with its workers) to its group."""

    config: str
    share: float
    number: int
    group: bool = False


def asked_to_stop(lane: Lane, request: Request) -> Verdict:
    seconds = request.share * lane.whole(request.config).seconds
    args = {"signals": [[seconds, request.number]], "group": request.group}
    outcome = lane.train(request.config, "tests.faults.jobs:train_signalled", fresh=True, args=args)
    point = f"{request.config} {signal.Signals(request.number).name} after {seconds:.3f} s"
    return lane.again(request.config, point, broken=after_request(lane.run_folder, outcome), saves=False)


def after_request(run: Path, outcome: Outcome) -> str:
    """Exit code 6 and one line (or it was over before); the newest checkpoint holds every step that was made."""
    if (outcome.exit_code, outcome.stderr) == (0, ""):
        return ""
    lines = outcome.stderr.splitlines()
    if outcome.exit_code != 6 or len(lines) != 1 or not lines[0].startswith("interrupted: stopped on request"):
        return f"it ended with {outcome.exit_code or outcome.signal}: {outcome.stderr[-600:]}"
    files = snapshot(run) if run.is_dir() else {}
    steps = [line["step"] for line in files.get("metrics.jsonl", [])]
    saved = [path for path in sorted((run / "checkpoints").glob("step-*")) if not manifest.faults(path)]
    newest = int(saved[-1].name[5:]) if saved else 0
    if steps and steps[-1] != newest:
        return f"{steps[-1]} steps were made, checkpoint {newest} is the newest"
    return ""


def asked_in(lane: Lane, where: tuple[str, str, int]) -> Verdict:
    """SIGTERM at the start of a call of a function, named as ``train_signalled_in`` takes it."""
    config, place, call = where
    args = {"place": place, "call": call, "numbers": [int(signal.SIGTERM)]}
    outcome = lane.train(config, "tests.faults.jobs:train_signalled_in", fresh=True, args=args)
    broken = after_request(lane.run_folder, outcome) or ("" if outcome.exit_code == 6 else "it went on to the end")
    return lane.again(config, f"{config} SIGTERM in {place}, call {call}", broken=broken, saves=False)


def orphaned(lane: Lane, moment: Moment) -> Verdict:
    """Only the main process is killed: what it started lives on for a while, and must not hold the folder."""
    seconds = moment.share * lane.whole(moment.config).seconds
    shutil.rmtree(lane.run_folder, ignore_errors=True)
    lane.train(moment.config, "tests.faults.jobs:train_orphaning", args={"seconds": seconds})
    return lane.again(moment.config, f"{moment.config} main process alone killed after {seconds:.3f} s")


def last_of(log: Sequence[Op], names: set[str], *parts: str) -> int:
    """The number of the last operation of these names on a path that holds every part."""
    return max(op.number for op in log if op.name in names and all(part in op.path for part in parts))


def results_folder(otherwise: Path) -> Path:
    """Where sweeps leave their figures: the folder that FINETUNE_RESULTS names, or a scratch one."""
    return Path(os.environ.get("FINETUNE_RESULTS") or otherwise)
