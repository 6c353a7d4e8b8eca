"""Train several adapters over one base to their ends, in lockstep: the joint counterpart of ``train``.

Each member is a run in a folder of its own, with the files of a single one, and all are saved at the same steps. First
every member is saved, and only then do older checkpoints go, so that there is always a step that all of them have: a
killed run goes on from the newest such step, and has the bits of an unbroken one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune import checkpoint, datasample, devices, ended, hardware, lockstep, metrics, model, runpage, shared_base
from finetune import state as states
from finetune import train as training
from finetune.checkpoint import Checkpoint
from finetune.devices import Session
from finetune.errors import EnvironmentFault, ModelError
from finetune.interrupts import StopRequest, stop_requests
from finetune.lockstep import Member
from finetune.loop import Course, StepDone
from finetune.metrics import StepLog
from finetune.model import Policy
from finetune.objectives import sft
from finetune.prepare import Prepared
from finetune.run import Known, Run
from finetune.runfolder import RunFolder, remove, sync_file
from finetune.runpage import Pages
from finetune.terminal import ByteBar, Progress, Terminal, size
from finetune.timelimit import TimeLimit

_ALONE = "go on with each alone: --set adapters=NAME"


@dataclass(frozen=True, kw_only=True)
class Student:
    """A member's run: where it is to go, and the steps that it has checkpoints of, the newest first."""

    run: Run
    course: Course
    saved: tuple[int, ...]
    finished: bool

    @property
    def name(self) -> str:
        return self.run.prepared.located.name

    @property
    def total(self) -> int:
        return len(self.course.steps)

    def stands_at(self, step: int) -> bool:
        """Whether it can take part from that step of the whole on: with its state then, or past its own end."""
        own = min(step, self.total)
        return own == 0 or own in self.saved or (self.finished and step >= self.total)


@dataclass(frozen=True, kw_only=True)
class Seated:
    """A student with what it needs to train."""

    student: Student
    policy: Policy
    optimizer: torch.optim.Optimizer
    scaler: Any
    log: StepLog
    pages: Pages

    @property
    def run(self) -> Run:
        return self.student.run

    def member(self) -> Member:
        return Member(
            name=self.student.name, policy=self.policy, examples=self.run.samples, course=self.student.course,
            optimizer=self.optimizer, scaler=self.scaler,
        )  # fmt: skip


def train(
    prepared: Sequence[Prepared], terminal: Terminal, *, extend: bool = False, limit: TimeLimit | None = None
) -> list[RunFolder]:
    """Run the prepared members of one recipe to their ends, from wherever their folders stand.

    Raises: as ``train.train``; EnvironmentFault also where the members do not stand together any more.
    """
    root = Path(prepared[0].plan.output).parent
    if RunFolder(root).identity.exists():
        raise EnvironmentFault("this folder holds a run of its own", str(root), "give the recipe another `output:`")
    first = Run(prepared[0], terminal)
    runs = [first, *(Run(one, terminal, digests=first.identity.base) for one in prepared[1:])]
    for run in runs:
        run.folder.refuse_foreign()
    fresh = [run.folder for run in runs if not run.folder.root.exists()]
    try:
        _train(runs, terminal, root, extend, limit)
    except ModelError:
        for folder in fresh:
            if not folder.checkpoints.exists():  # a base that does not load leaves nothing behind
                remove(folder.root)
        raise
    return [run.folder for run in runs]


def _train(runs: Sequence[Run], terminal: Terminal, root: Path, extend: bool, limit: TimeLimit | None) -> None:
    with contextlib.ExitStack() as locks, stop_requests() as stop:
        stop.within(limit)
        for run in runs:
            locks.enter_context(run.folder.lock())
        for run in runs:
            run.settle(extend)
        students = [_student(run) for run in runs]
        if all(student.finished for student in students):
            terminal.say(f"these runs are finished: nothing to do in {root}")
            _report(runs, terminal)
            return
        start = _common_step(students, root)
        for run in runs:
            states.describe(run)
        first = runs[0].prepared
        config = {f"{one.name}.{key}": value for one in students for key, value in one.run.identity.recipe.items()}
        session = devices.start(first.recipe.tracker, root, root.name, config, first.plan.device)
        try:
            with contextlib.ExitStack() as notes:
                for run in runs:
                    notes.enter_context(ended.noting(run.folder))
                _steps(students, start, session, stop)
        finally:
            session.finish()
            _report(runs, terminal)


def _report(runs: Sequence[Run], terminal: Terminal) -> None:
    for run in runs:
        runpage.keep(run.folder, terminal)


def _student(run: Run) -> Student:
    there = run.folder.checkpoints.is_dir()
    saved = checkpoint.steps(run.folder.checkpoints, run.terminal.say) if there else []
    course = run.course()
    return Student(run=run, course=course, saved=tuple(saved), finished=training.is_finished(run, course))


def _common_step(students: Sequence[Student], root: Path) -> int:
    """The newest step from which all can go on together.

    Raises:
        EnvironmentFault: going back there would undo steps that not all have lived.
    """
    found = max(
        step
        for step in {0, *(step for student in students for step in student.saved)}
        if all(student.stands_at(step) for student in students)
    )
    newest = {student.name: max(student.saved, default=0) for student in students}
    lived = min(
        (metrics.last_step(student.run.folder.metrics) for student in students if not student.finished), default=0
    )
    if max(newest.values()) > max(found, lived):
        stand = ", ".join(f"{name} at {step}" for name, step in newest.items())
        raise EnvironmentFault(f"these adapters do not stand together any more: {stand}", str(root), _ALONE)
    return found


def _steps(students: Sequence[Student], start: int, session: Session, stop: StopRequest) -> None:
    """Load once, resume each, train to the end of the longest course; a member that ends is written and judged."""
    run = students[0].run
    terminal, chosen = run.terminal, run.prepared.plan
    terminal.say(f"loading {chosen.model} as {chosen.weights} on {chosen.device_name}")
    base = model.load_base(run.base, run.form(), ByteBar(run.terminal, "loading the base").at)
    # Who is finished takes no part; all others do, also one that only has to be written and judged.
    seated = [
        _seat(student, base, start, session)
        for student in students
        if not (student.finished and start >= student.total)
    ]
    joint = shared_base.join(base, [seat.policy for seat in seated])
    training.recompute(run, joint.policy)
    known: Known = []
    for seat in seated:
        seat.run.judge(seat.policy, "before", adapter=False, known=known)
        if start and seat.run.judges_at(start, seat.student.total):
            seat.run.judge(seat.policy, f"step {start}")
    events = lockstep.run(joint, sft, [seat.member() for seat in seated], start)
    with stop.deferred():
        _follow(seated, events, start, stop)


def _seat(student: Student, base: Policy, start: int, session: Session) -> Seated:
    """A student's adapter on a view of the base, in the state that it had at the common step."""
    run, own = student.run, min(start, student.total)
    saved: Checkpoint | None = checkpoint.read(run.folder.checkpoints / checkpoint.folder_name(own)) if own else None
    policy = training.attach(run, shared_base.view(base))
    optimizer, scaler = training.optimizer_of(run, policy)
    states.resume(run, policy, optimizer, scaler, saved)
    named = replace(session, prefix=f"{student.name}/")
    log = StepLog(run.folder.metrics, named, Terminal(quiet=True), student.total, own)
    datasample.write(run.folder, run.samples, run.prepared.held_out, policy.renderer)
    pages = Pages(run.folder, run.terminal, student.total, own)
    return Seated(student=student, policy=policy, optimizer=optimizer, scaler=scaler, log=log, pages=pages)


def _follow(seated: Sequence[Seated], events: Iterator[dict[str, StepDone]], start: int, stop: StopRequest) -> None:
    """Log, save, judge and finish after every joint step; a request to stop leaves all of them saved."""
    run, step = seated[0].run, start
    total = max(seat.student.total for seat in seated)
    progress = Progress(run.terminal, "step", start=start)
    while True:
        for seat in seated:
            at_end = step == seat.student.total or (step == start and step > seat.student.total)
            if at_end and not _finished(seat, stop):
                raise stop.interrupted(_kept(seated, step, total))
        if step >= total:
            return
        done = training.next_step(events, run)
        step += 1
        here = [seat for seat in seated if seat.student.name in done]
        for seat in here:
            seat.log.step(done[seat.student.name])
        progress(step, total, _told(done))
        stop.step_done(next(iter(done.values())).seconds)
        asked = stop.requested  # read once: a request that comes later must not pass for one that was saved
        due = step % run.prepared.recipe.train.save_every == 0 or any(step == seat.student.total for seat in here)
        if due or asked:
            began = time.monotonic()
            _save(here, step)
            stop.saved(time.monotonic() - began)
        for seat in here:
            if not asked and seat.run.judges_at(step, seat.student.total):
                asked = not training.judged(seat.run, seat.policy, stop, f"step {step}")
                if asked and not due:
                    _save(here, step)
            if not asked and (due or seat.run.judges_at(step, seat.student.total)):
                seat.pages.at(step)
        if asked:
            raise stop.interrupted(_kept(seated, step, total))


def _finished(seat: Seated, stop: StopRequest) -> bool:
    """Write and judge a member at its end; False where a request to stop cut that short."""
    states.write_adapter(seat.run, seat.policy)
    if not training.judged(seat.run, seat.policy, stop, "after"):
        return False
    states.finish(seat.run, seat.student.total)
    return True


def _save(seated: Sequence[Seated], step: int) -> None:
    """All of them, before any older checkpoint goes."""
    for seat in seated:
        sync_file(seat.run.folder.metrics)  # also says to the next start that every member has lived this step
    for seat in seated:
        states.write_checkpoint(seat.run, seat.policy, seat.optimizer, seat.scaler, step)
    for seat in seated:
        checkpoint.rotate(seat.run.folder.checkpoints, step, seat.run.prepared.recipe.train.keep_last)


def _kept(seated: Sequence[Seated], step: int, total: int) -> str:
    return f"step {step} of {total} is saved for each adapter in {seated[0].run.folder.root.parent}"


def _told(done: dict[str, StepDone]) -> str:
    events = list(done.values())
    speed = sum(event.tokens for event in events) / events[0].seconds
    losses = "  ".join(f"{name} {event.loss:.4f}" for name, event in done.items())
    return f"{losses}  {speed:.0f} tokens/s  {size(hardware.memory_in_use())}"
