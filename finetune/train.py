"""Train a prepared recipe to its end: load, resume, step, save, judge, finish.

The order of writes makes every moment resumable: identity first, then checkpoints, then the adapter, and
``finished.json`` last. Whatever is missing is made again by the same command.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, replace
from typing import Any

import torch

from finetune import (
    best,
    checkpoint,
    datasample,
    devices,
    ended,
    fallback,
    manifest,
    model,
    runpage,
    schedule,
    starts,
    state,
    teacher,
)
from finetune import optimizer as optimizers
from finetune import scores as score_file
from finetune.copies import Copies
from finetune.devices import Session
from finetune.errors import EnvironmentFault, ModelError
from finetune.interrupts import StopRequest, stop_requests
from finetune.loop import Course, StepDone
from finetune.metrics import StepLog
from finetune.model import Policy
from finetune.peers import ALONE, STEP, Peers
from finetune.prepare import Prepared
from finetune.run import Run
from finetune.runfolder import RunFolder, read_json, remove
from finetune.runpage import Pages
from finetune.terminal import ByteBar, Terminal
from finetune.timelimit import TimeLimit

_EVEN = 0.8
"""Share of the time at work below which it is said how there is more of it."""


def train(
    prepared: Prepared, terminal: Terminal, *, extend: bool = False, until: int | None = None,
    limit: TimeLimit | None = None, peers: Peers = ALONE,
) -> RunFolder:  # fmt: skip
    """Run a prepared recipe to its end, from wherever its folder stands; ``until``: only to that step of it.

    ``limit``: stop, saved, at the last step that this time has room for. ``peers``: processes that compute a share of
    each step.

    Raises:
        Interrupted: stopped on request; a durable checkpoint is on the disk.
        FinetuneError: as each step says.
    """
    run = Run(prepared, terminal, peers=peers)
    run.folder.refuse_foreign()
    fresh = not run.folder.root.exists()
    try:
        return _train(run, terminal, extend, until, limit)
    except ModelError:
        if fresh and not run.folder.checkpoints.exists():  # a base that does not load leaves nothing behind
            remove(run.folder.root)
        raise


def _train(run: Run, terminal: Terminal, extend: bool, until: int | None, limit: TimeLimit | None) -> RunFolder:
    prepared = run.prepared
    with contextlib.ExitStack() as ends:
        ends.enter_context(run.folder.lock())
        stop = ends.enter_context(stop_requests())
        stop.within(limit)
        copies = _copies(run, extend)
        run.settle(extend)
        course = run.course()
        finished = is_finished(run, course)
        run.peers.send(b"" if finished else json.dumps(asdict(run.identity)).encode())
        if copies:
            ends.enter_context(copies.kept())
        if finished:
            steps = read_json(run.folder.finished)["steps"]
            terminal.say(f"this run is finished ({steps} steps): nothing to do in {run.folder.root}")
            runpage.keep(run.folder, terminal)  # it may have been killed before its last page
            return run.folder
        with ended.noting(run.folder):
            state.describe(run)
            if run.peers.world > 1:
                terminal.say(shared(run, course))
            config, device = dict(run.identity.recipe), prepared.plan.device
            session = devices.start(prepared.recipe.tracker, run.folder.root, run.folder.root.name, config, device)
            try:
                try:
                    end = _steps(run, course, session, stop, until, copies)
                    if end and run.peers.sharded:  # it judges, and its passes are everybody's
                        conclude(run, *end)
                finally:
                    run.peers.over()
                if end and not run.peers.sharded:  # the first one's alone
                    conclude(run, *end)
            finally:
                session.finish()
                runpage.keep(run.folder, terminal)
    return run.folder


def _copies(run: Run, extend: bool) -> Copies | None:
    """Where the recipe has the run copied to; an empty folder gets the newest copy from there."""
    wanted = run.prepared.recipe.train
    if wanted.copy_to is None:
        return None
    copies = Copies(wanted.copy_to, run.folder, wanted.keep_last, run.terminal)
    run.folder.clear_leftovers()
    copies.fetch(run.identity, extend=extend)
    return copies


def shared(run: Run, course: Course) -> str:
    """How evenly the steps' micro-batches can be dealt out, in words; the first hundred steps are looked at."""
    lengths, world = run.samples.lengths, run.peers.world
    work = spent = 0
    for step in course.steps[:100]:
        sizes = [int(lengths[index]) for index in step]
        tokens = [sum(sizes[i] for i in pack) for pack in schedule.pack(sizes, course.micro_batch_tokens)]
        work += sum(tokens)
        spent += world * max(sum(tokens[number] for number in numbers) for numbers in schedule.deal(tokens, world))
    said = f"{world} processes share each step's micro-batches and are at work {work / spent:.0%} of the time"
    return said if work / spent > _EVEN else f"{said}: set train.micro_batch_tokens lower, or processes"


def is_finished(run: Run, course: Course) -> bool:
    """Whether the run stands at the end of this very course, its adapter whole."""
    finished = read_json(run.folder.finished)
    if not isinstance(finished, dict):
        return False
    stopped = finished.get("stopped")
    if stopped and stopped["patience"] != run.prepared.recipe.evaluate.early_stopping_patience:
        return False  # it is asked to wait longer now
    return finished.get("of", finished.get("steps")) == len(course.steps) and not manifest.faults(run.folder.adapter)


def _steps(
    run: Run, course: Course, session: Session, stop: StopRequest, until: int | None, copies: Copies | None
) -> tuple[Policy, int, dict[str, Any] | None] | None:
    """Load, resume, train to the end of the course; as ``conclude`` takes it, None where it pauses before.

    ``until``: judge at that step and pause there. The course stays the whole one, and its bits are an unbroken run's.
    """
    terminal, chosen = run.terminal, run.prepared.plan
    saved = checkpoint.newest(run.folder.checkpoints, terminal.say) if run.folder.checkpoints.is_dir() else None
    terminal.say(f"loading {chosen.model} as {chosen.weights} on {chosen.device_name}")
    policy = attach(run, run.load(ByteBar(terminal, "loading the base").at))
    if run.peers.sharded:
        run.announce(policy, stop)
    optimizer, scaler = optimizer_of(run, policy)
    start = state.resume(run, policy, optimizer, scaler, saved)
    state.give(run.peers, saved)
    done, total = start, len(course.steps)
    best.resume(run, start, total)
    datasample.write(run.folder, run.samples, run.prepared.held_out, policy.renderer)
    pages = Pages(run.folder, terminal, total, start)
    pause = until if until is not None and until < total else None
    teacher.keep(run, policy)
    run.judge(policy, "before", adapter=False)  # also on going on, where the scores were lost
    if start and (run.judges_at(start, total) or start == pause):  # killed between this checkpoint and its scores?
        run.judge(policy, ended.at_step(start))
    stopped = best.after(run, policy, start, total) if start else None
    if pause is not None and pause <= start and not stopped:
        terminal.say(f"this run stands at step {start} of {total}: nothing to do until step {pause}")
        ended.note(run.folder, ended.PAUSED, f"at step {start}, as asked")
        return None
    events = fallback.steps(run, policy, course, optimizer, start, scaler)
    keeper = state.Keeper(run, policy, optimizer, scaler, stop, copies)
    log = StepLog(run.folder.metrics, session, terminal, total, start)
    keeper.begin(start)
    with stop.deferred(), contextlib.closing(events), keeper.rescuing():
        while done < total and not stopped:
            event: StepDone = next_step(events, run)
            keeper.done = done = event.step
            log.step(event)
            stop.step_done(event.seconds)
            asked = (
                stop.requested or run.peers.asked()
            )  # read once: a request that comes later must not pass for one that was saved
            due = done % run.prepared.recipe.train.save_every == 0 or done in (total, pause)
            if due or asked:
                keeper.save(done)
            if not asked and (run.judges_at(done, total) or done == pause):
                asked = not judged(run, policy, stop, ended.at_step(done))
                stopped = None if asked else best.after(run, policy, done, total)
                if (asked or stopped) and not due:
                    keeper.save(done)
            if not asked and (due or run.judges_at(done, total)):
                pages.at(done)
            if asked:
                raise stop.interrupted(f"step {done} of {total} is saved in {run.folder.root}")
            if done == pause and not stopped:
                ended.note(run.folder, ended.PAUSED, f"at step {done}, as asked")
                terminal.say(f"paused after step {done} of {total}, as asked; without --until the command goes on")
                return None
    return policy, done, stopped


def conclude(run: Run, policy: Policy, step: int, stopped: dict[str, Any] | None) -> None:
    """The end after ``step``: the adapter that is kept is written and judged, and finished.json says which it is."""
    facts, name = best.conclude(run, policy, step, stopped)
    for said in ended.sentences({"steps": step, **facts}):
        run.terminal.say(said)
    state.write_adapter(run, policy)
    if name is None:
        run.judge(policy, ended.AFTER)
    elif ended.AFTER not in score_file.read(run.folder):
        score_file.copy(run.folder, name, ended.AFTER)
    state.finish(run, step, facts)


def attach(run: Run, base: Policy) -> Policy:
    """The recipe's adapter on the base or a view of it, and beside it the teacher that it learns from, if any."""
    found = run.prepared.teacher
    said = None if found is None else teacher.load(found, base, run.form(), run.terminal)
    return replace(_attach(run, base), teacher=said)


def _attach(run: Run, base: Policy) -> Policy:
    """The adapter: fresh, or with the weights that it begins from."""
    wanted, fields = run.prepared.recipe.train, run.prepared.plan.adapter_fields
    method = run.prepared.recipe.adapter.method
    how: dict[str, Any] = {"kernels": wanted.kernels != "off", "compiled": wanted.compile is True}
    if not starts.is_made(method, fields):
        policy, start = model.attach(base, fields, wanted.seed, method=method, **how), run.prepared.start
        return policy if start is None else model.start_from(policy, start.folder)
    folder = run.folder.root / starts.FOLDER
    if not folder.is_dir() and any(run.folder.checkpoints.glob("step-*")):
        what, fix = "what this adapter began with is gone", "take it from a backup, or give another `output:`"
        raise ModelError(what, str(folder), fix)
    if run.peers.world > 1:
        starts.refuse_to_make(method, run.prepared.plan)
    return starts.attach(folder, base, fields, wanted.seed, run.samples, **how)


def recompute(run: Run, policy: Policy) -> None:
    """Make the policy recompute what the run's plan says; a single run asks ``fallback`` at every step."""
    resolved = run.identity.resolved
    if resolved["recompute"] != "none":
        policy.recompute_layers(resolved.get("recomputed_layers"), offload=resolved["recompute"] == "offload")


def optimizer_of(run: Run, policy: Policy) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler | None]:
    """The recipe's optimizer, and fp16's loss scaler where the run computes in that."""
    wanted = run.prepared.recipe.train
    made = optimizers.make(
        policy.model, wanted.optimizer, weight_decay=wanted.weight_decay, lora_plus_ratio=wanted.lora_plus_ratio
    )
    fp16 = run.identity.resolved["compute"] == "fp16"
    return made, torch.amp.GradScaler(run.prepared.plan.device) if fp16 else None


def judged(run: Run, policy: Policy, stop: StopRequest, name: str) -> bool:
    """Judge between two steps; False where a request to stop cut it short."""
    try:
        with contextlib.nullcontext() if run.peers.sharded else stop.at_once():
            run.judge(policy, name)
    except KeyboardInterrupt:
        return False
    return True


def next_step(events: Any, run: Run) -> Any:
    """What the loop yields next; a fault in it gets the last good checkpoint's name."""
    run.peers.say(STEP)
    try:
        with run.peers.noticing():
            return next(events)
    except ModelError as error:
        last = checkpoint.newest(run.folder.checkpoints, run.terminal.say) if run.folder.checkpoints.is_dir() else None
        kept = f"last good checkpoint: {checkpoint.folder_name(last.step)}" if last else "no checkpoint was written yet"
        fault = error.faults[0]
        raise ModelError(fault.what, fault.where, f"{fault.fix}; {kept}") from None
    except torch.OutOfMemoryError as error:
        raise EnvironmentFault(
            f"out of memory: {str(error).splitlines()[0]}", "this step", "set train.micro_batch_tokens lower"
        ) from None
