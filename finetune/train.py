"""Train a prepared recipe to its end: load, resume, step, save, judge, finish.

The order of writes makes every moment resumable: identity first, then checkpoints, then the adapter, and
``finished.json`` last. Whatever is missing is made again by the same command.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch

from finetune import best, checkpoint, datasample, devices, ended, fallback, manifest, metrics, model, runpage
from finetune import optimizer as optimizers
from finetune import scores as score_file
from finetune.checkpoint import Checkpoint
from finetune.devices import Session
from finetune.errors import EnvironmentFault, ModelError
from finetune.interrupts import StopRequest, stop_requests
from finetune.loop import Course, StepDone
from finetune.metrics import StepLog
from finetune.model import Policy
from finetune.prepare import Prepared
from finetune.recipe import yamlfile
from finetune.run import Run
from finetune.runfolder import (
    RunFolder,
    json_bytes,
    make_folder,
    read_json,
    remove,
    sync_file,
    write_atomic,
    write_json,
)
from finetune.runpage import Pages
from finetune.terminal import ByteBar, Terminal


def train(prepared: Prepared, terminal: Terminal, *, extend: bool = False, until: int | None = None) -> RunFolder:
    """Run a prepared recipe to its end, from wherever its folder stands; ``until``: only to that step of it.

    Raises:
        Interrupted: stopped on request; a durable checkpoint is on the disk.
        FinetuneError: as each step says.
    """
    run = Run(prepared, terminal)
    run.folder.refuse_foreign()
    fresh = not run.folder.root.exists()
    try:
        return _train(run, terminal, extend, until)
    except ModelError:
        if fresh and not run.folder.checkpoints.exists():  # a base that does not load leaves nothing behind
            remove(run.folder.root)
        raise


def _train(run: Run, terminal: Terminal, extend: bool, until: int | None) -> RunFolder:
    prepared = run.prepared
    with run.folder.lock(), stop_requests() as stop:
        run.settle(extend)
        course = run.course()
        if is_finished(run, course):
            steps = read_json(run.folder.finished)["steps"]
            terminal.say(f"this run is finished ({steps} steps): nothing to do in {run.folder.root}")
            runpage.keep(run.folder, terminal)  # it may have been killed before its last page
            return run.folder
        with ended.noting(run.folder):
            describe(run)
            config, device = dict(run.identity.recipe), prepared.plan.device
            session = devices.start(prepared.recipe.tracker, run.folder.root, run.folder.root.name, config, device)
            try:
                _steps(run, course, session, stop, until)
            finally:
                session.finish()
                runpage.keep(run.folder, terminal)
    return run.folder


def is_finished(run: Run, course: Course) -> bool:
    """Whether the run stands at the end of this very course, its adapter whole."""
    finished = read_json(run.folder.finished)
    if not isinstance(finished, dict):
        return False
    stopped = finished.get("stopped")
    if stopped and stopped["patience"] != run.prepared.recipe.evaluate.early_stopping_patience:
        return False  # it is asked to wait longer now
    return finished.get("of", finished.get("steps")) == len(course.steps) and not manifest.faults(run.folder.adapter)


def describe(run: Run) -> None:
    """What is trained, as files: the recipe with every default, the plan, the rows not taken as they stand."""
    write_atomic(run.folder.recipe, yamlfile.dump(run.prepared.recipe.to_yaml_dict()).encode())
    write_json(run.folder.plan, run.prepared.plan.to_dict())
    named = "".join(json.dumps(one.to_dict(), ensure_ascii=False) + "\n" for one in run.prepared.named)
    if named:
        write_atomic(run.folder.named_rows, named.encode())


def _steps(run: Run, course: Course, session: Session, stop: StopRequest, until: int | None) -> None:
    """Load, resume, train to the end of the course, then write the adapter and judge it.

    ``until``: judge at that step and pause there. The course stays the whole one, and its bits are an unbroken run's.
    """
    terminal, chosen = run.terminal, run.prepared.plan
    saved = checkpoint.newest(run.folder.checkpoints, terminal.say) if run.folder.checkpoints.is_dir() else None
    terminal.say(f"loading {chosen.model} as {chosen.weights} on {chosen.device_name}")
    policy = attach(run, model.load_base(run.base, run.form(), ByteBar(terminal, "loading the base").at))
    optimizer, scaler = optimizer_of(run, policy)
    start = resume(run, policy, optimizer, scaler, saved)
    done, total = start, len(course.steps)
    best.resume(run, start, total)
    datasample.write(run.folder, run.samples, run.prepared.held_out, policy.renderer)
    pages = Pages(run.folder, terminal, total, start)
    pause = until if until is not None and until < total else None
    run.judge(policy, "before", adapter=False)  # also on going on, where the scores were lost
    if start and (run.judges_at(start, total) or start == pause):  # killed between this checkpoint and its scores?
        run.judge(policy, ended.at_step(start))
    stopped = best.after(run, policy, start, total) if start else None
    if pause is not None and pause <= start and not stopped:
        terminal.say(f"this run stands at step {start} of {total}: nothing to do until step {pause}")
        ended.note(run.folder, ended.PAUSED, f"at step {start}, as asked")
        return
    events = fallback.steps(run, policy, course, optimizer, start, scaler)
    log = StepLog(run.folder.metrics, session, terminal, total, start)
    with stop.deferred():
        while done < total and not stopped:
            event: StepDone = next_step(events, run)
            done = event.step
            log.step(event)
            asked = stop.requested  # read once: a request that comes later must not pass for one that was saved
            due = done % run.prepared.recipe.train.save_every == 0 or done in (total, pause)
            if due or asked:
                _save(run, policy, optimizer, scaler, done)
            if not asked and (run.judges_at(done, total) or done == pause):
                asked = not judged(run, policy, stop, ended.at_step(done))
                stopped = None if asked else best.after(run, policy, done, total)
                if (asked or stopped) and not due:
                    _save(run, policy, optimizer, scaler, done)
            if not asked and (due or run.judges_at(done, total)):
                pages.at(done)
            if asked:
                raise stop.interrupted(f"step {done} of {total} is saved in {run.folder.root}")
            if done == pause and not stopped:
                ended.note(run.folder, ended.PAUSED, f"at step {done}, as asked")
                terminal.say(f"paused after step {done} of {total}, as asked; without --until the command goes on")
                return
    conclude(run, policy, done, stopped)


def conclude(run: Run, policy: Policy, step: int, stopped: dict[str, Any] | None) -> None:
    """The end after ``step``: the adapter that is kept is written and judged, and finished.json says which it is."""
    facts, name = best.conclude(run, policy, step, stopped)
    for said in ended.sentences({"steps": step, **facts}):
        run.terminal.say(said)
    write_adapter(run, policy)
    if name is None:
        run.judge(policy, ended.AFTER)
    elif ended.AFTER not in score_file.read(run.folder):
        score_file.copy(run.folder, name, ended.AFTER)
    finish(run, step, facts)


def attach(run: Run, base: Policy) -> Policy:
    """The recipe's adapter on the base or a view of it: fresh, or with the weights that it begins from."""
    wanted, start = run.prepared.recipe.train, run.prepared.start
    policy = model.attach(
        base, run.prepared.plan.adapter_fields, wanted.seed, kernels=wanted.kernels != "off",
        compiled=wanted.compile is True,
    )  # fmt: skip
    return policy if start is None else model.start_from(policy, start.folder)


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


def finish(run: Run, steps: int, facts: dict[str, Any] | None = None) -> None:
    """The last file of a run: its adapter is written and judged; ``facts`` as ``ended.end`` tells them."""
    digest = manifest.digest(run.folder.adapter / checkpoint.ADAPTER)
    write_json(run.folder.finished, {"steps": steps, "adapter": digest, **(facts or {})})


def judged(run: Run, policy: Policy, stop: StopRequest, name: str) -> bool:
    """Judge between two steps; False where a request to stop cut it short."""
    try:
        with stop.at_once():
            run.judge(policy, name)
    except KeyboardInterrupt:
        return False
    return True


def next_step(events: Any, run: Run) -> Any:
    """What the loop yields next; a fault in it gets the last good checkpoint's name."""
    try:
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


def resume(run: Run, policy: Policy, optimizer: torch.optim.Optimizer, scaler: Any, saved: Checkpoint | None) -> int:
    """Put a checkpoint's state back and cut the metrics to it; returns the number of steps done."""
    step = 0
    if saved is not None:
        model.load_adapter(policy.model, saved.weights, run.folder.checkpoints)
        checkpoint.restore_optimizer(optimizer, policy.trainable(), saved.moments)
        if scaler and saved.scaler:
            scaler.load_state_dict(saved.scaler)
        step = saved.step
        run.terminal.say(f"going on after step {step}")
        checkpoint.rotate(run.folder.checkpoints, step, run.prepared.recipe.train.keep_last)
    if saved is None and run.folder.metrics.exists() and run.folder.metrics.stat().st_size:
        run.terminal.say("there is no checkpoint to go on from: this run begins again at its first step")
    kept = metrics.cut(run.folder.metrics, step)
    if kept < step:
        run.terminal.say(f"{run.folder.metrics} has lost {step - kept} of {step} steps: the curve goes on without them")
    return step


def _save(run: Run, policy: Policy, optimizer: torch.optim.Optimizer, scaler: Any, step: int) -> None:
    sync_file(run.folder.metrics)  # a checkpoint promises the lines of its steps, also after power loss
    write_checkpoint(run, policy, optimizer, scaler, step)
    checkpoint.rotate(run.folder.checkpoints, step, run.prepared.recipe.train.keep_last)


def write_checkpoint(run: Run, policy: Policy, optimizer: torch.optim.Optimizer, scaler: Any, step: int) -> None:
    """The run's state after ``step`` steps, beside the checkpoints that are there. Its metrics must be flushed."""
    state = Checkpoint(
        step=step,
        weights=model.adapter_weights(policy.model),
        config=model.adapter_config(policy.model, run.prepared.plan.model),
        moments=checkpoint.optimizer_tensors(optimizer, policy.trainable()),
        scaler=scaler.state_dict() if scaler else None,
    )
    make_folder(run.folder.checkpoints)
    checkpoint.write(run.folder.checkpoints, state)


def write_adapter(run: Run, policy: Policy) -> None:
    """The adapter folder, in PEFT's own format, with a manifest; scores of an earlier, shorter end go."""
    from safetensors.torch import save as tensors_to

    recipe = run.prepared.recipe
    made = {
        "base": recipe.model,
        "commit": run.prepared.commit,
        "base_sha256": run.identity.base,
        "rope": recipe.rope,
        "form": {key: value for key, value in asdict(run.form()).items() if key != "device"},
    }
    files = {
        checkpoint.PROVENANCE: json_bytes(made),
        checkpoint.ADAPTER: tensors_to(model.adapter_weights(policy.model), {"format": "pt"}),
        checkpoint.CONFIG: (
            json.dumps(model.adapter_config(policy.model, run.prepared.plan.model), indent=2) + "\n"
        ).encode(),
    }
    digest = manifest.digest_bytes(files[checkpoint.ADAPTER])
    former = read_json(run.folder.adapter / manifest.NAME) or {"sha256": {}}
    if former["sha256"].get(checkpoint.ADAPTER) not in (None, digest):
        score_file.drop(run.folder, ended.AFTER, "merged")
    checkpoint.write_folder(run.folder.adapter, files)
