"""One run, from a checked recipe to a finished adapter: begin or go on, train, save, judge.

The order of writes makes every moment resumable: identity first, then checkpoints, then the adapter, and
``finished.json`` last. Whatever is missing is made again by the same command.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from finetune import checkpoint, devices, evaluate, hardware, identity, loop, manifest, model, plan, recipe
from finetune.checkpoint import Checkpoint
from finetune.devices import Session
from finetune.errors import EnvironmentFault, ModelError, RecipeError
from finetune.identity import Identity
from finetune.interrupts import StopRequest, stop_requests
from finetune.loop import Course, StepDone
from finetune.model import BaseForm, Policy
from finetune.objectives import sft
from finetune.prepare import Prepared
from finetune.recipe import yamlfile
from finetune.runfolder import RunFolder, make_folder, read_json, sync_file, write_atomic, write_json
from finetune.scores import record
from finetune.terminal import Progress, Terminal, size

_OURS = {".lock", "identity.json"}


class Run:
    """A run in its folder, between start and finish."""

    def __init__(self, prepared: Prepared, terminal: Terminal) -> None:
        assert prepared.base is not None
        self.prepared, self.base, self.terminal = prepared, prepared.base, terminal
        self.folder = RunFolder(Path(prepared.plan.output))
        self.identity = self._identity()

    def _identity(self) -> Identity:
        chosen, data = self.prepared.plan, self.prepared.recipe.data
        total = sum(path.stat().st_size for path in self.base.files())
        shown, done = Progress(self.terminal, "reading the base, MB"), 0

        def tick(count: int) -> None:
            nonlocal done
            done += count
            if total > 2e9:
                shown(done // 1_000_000, total // 1_000_000)

        return Identity(
            recipe=dict(recipe.flatten(self.prepared.recipe)),
            data={path: manifest.digest(Path(path)) for path in (data.train_path, data.eval_path) if path},
            base=self.base.digests(tick),
            resolved={
                "compute": chosen.compute,
                "recompute": chosen.recompute,
                "micro_batch_tokens": chosen.micro_batch_tokens,
            },
            environment=dict(hardware.environment(self.prepared.hardware)),
        )

    def refuse_foreign(self) -> None:
        """A folder with somebody's files and no run in it is not ours to write into, not even a lock."""
        root = self.folder.root
        if self.folder.identity.exists() or not root.is_dir():
            return
        foreign = [entry.name for entry in root.iterdir() if entry.name not in _OURS and ".tmp-" not in entry.name]
        if foreign:
            what = f"the output folder holds other files ({foreign[0]})"
            raise EnvironmentFault(what, str(root), "give the recipe an empty or new `output:`")

    def settle(self, extend: bool) -> None:
        """Begin in an empty folder, or take up the run that is there. Call with the folder locked."""
        self.folder.clear_leftovers()
        stored = identity.read(self.folder.identity)
        if stored is None:
            self.refuse_foreign()
            self.identity.write(self.folder.identity)
            return
        for remark in identity.compare(stored, self.identity, self.folder.root, extend=extend):
            self.terminal.say(remark)
        self._check_length(stored)
        # What `auto` became belongs to the run: free memory may differ today, the bits must not.
        changed = Identity(
            recipe=self.identity.recipe,
            data=stored.data,
            base=stored.base,
            resolved=stored.resolved,
            environment=stored.environment,
        )
        if changed != stored:
            changed.write(self.folder.identity)
        self.identity = changed
        torch.set_num_threads(int(stored.environment["threads"]))

    def _check_length(self, stored: Identity) -> None:
        """A longer run must begin with the very steps of the shorter one."""
        lengths = [len(example.ids) for example in self.prepared.examples]
        train = self.prepared.recipe.train
        before = train.model_copy(
            update={"steps": _number(stored.recipe["train.steps"]), "epochs": _number(stored.recipe["train.epochs"])}
        )
        old = plan.course_steps(self.prepared.recipe.model_copy(update={"train": before}), lengths)
        new = plan.course_steps(self.prepared.recipe, lengths)
        if new[: len(old)] != old:
            what = f"the run has {len(old)} steps, which are not the first of these {len(new)}"
            raise RecipeError(what, "train.steps", "a run can be lengthened, not shortened or cut differently")

    def course(self) -> Course:
        train = self.prepared.recipe.train
        steps = plan.course_steps(self.prepared.recipe, [len(example.ids) for example in self.prepared.examples])
        return Course(
            steps=tuple(steps), peak_rate=train.learning_rate, warmup=train.warmup, kind=train.schedule,
            max_grad_norm=train.max_grad_norm, micro_batch_tokens=self.identity.resolved["micro_batch_tokens"],
            seed=train.seed, workers=train.workers,
        )  # fmt: skip

    def form(self) -> BaseForm:
        chosen = self.prepared.plan
        return BaseForm(
            weights=chosen.weights,
            double=chosen.double,
            compute=self.identity.resolved["compute"],
            device=chosen.device,
        )

    def how(self) -> evaluate.How:
        wanted = self.prepared.recipe.evaluate
        return evaluate.How(
            metrics=wanted.metrics, max_new_tokens=wanted.max_new_tokens, batch_rows=wanted.batch_rows,
            micro_batch_tokens=self.identity.resolved["micro_batch_tokens"],
        )  # fmt: skip

    def judges_at(self, step: int, total: int) -> bool:
        every = self.prepared.recipe.evaluate.every
        return every > 0 and step % every == 0 and step < total

    def judge(self, policy: Policy, name: str, *, adapter: bool = True) -> None:
        """Evaluate and store the scores under ``name``, unless they are there already."""
        held_out = self.prepared.held_out
        scores = read_json(self.folder.scores) or {}
        if held_out is None or name in scores:
            return
        bars: dict[str, Progress] = {}

        def show(what: str, done: int, of: int) -> None:
            bars.setdefault(what, Progress(self.terminal, f"judging {name}: {what}"))(done, of)

        judged = evaluate.judge(policy, held_out, self.how(), adapter=adapter, progress=show)
        record(self.folder, name, judged, held_out)


def _number(value: Any) -> Any:
    return None if value == "null" else value


def train(prepared: Prepared, terminal: Terminal, *, extend: bool = False) -> RunFolder:
    """Run a prepared recipe to its end, from wherever its folder stands.

    Raises:
        Interrupted: stopped on request; a durable checkpoint is on the disk.
        FinetuneError: as each step says.
    """
    run = Run(prepared, terminal)
    run.refuse_foreign()
    with run.folder.lock(), stop_requests() as stop:
        run.settle(extend)
        course = run.course()
        finished = read_json(run.folder.finished)
        if finished and finished.get("steps") == len(course.steps) and not manifest.faults(run.folder.adapter):
            terminal.say(f"this run is finished ({finished['steps']} steps): nothing to do in {run.folder.root}")
            return run.folder
        write_atomic(run.folder.recipe, yamlfile.dump(prepared.recipe.to_yaml_dict()).encode())
        write_json(run.folder.plan, prepared.plan.to_dict())
        config = dict(run.identity.recipe)
        session = devices.start(
            prepared.recipe.tracker, run.folder.root, run.folder.root.name, config, prepared.plan.device
        )
        try:
            _steps(run, course, session, stop)
        finally:
            session.finish()
    return run.folder


def _steps(run: Run, course: Course, session: Session, stop: StopRequest) -> None:
    """Load, resume, train to the end of the course, then write the adapter and judge it."""
    terminal, chosen = run.terminal, run.prepared.plan
    saved = checkpoint.newest(run.folder.checkpoints, terminal.say) if run.folder.checkpoints.is_dir() else None
    terminal.say(f"loading {chosen.model} as {chosen.weights} on {chosen.device_name}")
    policy = model.load_base(run.base, run.form())
    policy = model.attach(policy, chosen.adapter_fields, course.seed)
    parameters = policy.trainable()
    if run.identity.resolved["recompute"] == "layers":
        policy.recompute_layers()
    optimizer = loop.make_optimizer(parameters, run.prepared.recipe.train.weight_decay)
    scaler = torch.amp.GradScaler(chosen.device) if run.identity.resolved["compute"] == "fp16" else None
    start = _resume(run, policy, optimizer, scaler, saved)
    done, total = start, len(course.steps)
    if start == 0:
        run.judge(policy, "before", adapter=False)
    elif run.judges_at(start, total):  # it may have been killed between this checkpoint and its scores
        run.judge(policy, f"step {start}")
    events = loop.run(policy, sft, run.prepared.examples, course, optimizer, start, scaler)
    log = _Log(run, session, total, start)
    with stop.deferred():
        while done < total:
            event = _next(events, run)
            done = event.step
            log.step(event)
            asked = stop.requested  # read once: a request that comes later must not pass for one that was saved
            due = done % run.prepared.recipe.train.save_every == 0 or done == total
            if due or asked:
                _save(run, policy, optimizer, scaler, done)
            if not asked and run.judges_at(done, total):
                asked = not _judged(run, policy, stop, done)
                if asked and not due:
                    _save(run, policy, optimizer, scaler, done)
            if asked:
                raise stop.interrupted(f"step {done} of {total} is saved in {run.folder.root}")
    _finish(run, policy, done)
    run.judge(policy, "after")
    write_json(
        run.folder.finished, {"steps": done, "adapter": manifest.digest(run.folder.adapter / checkpoint.ADAPTER)}
    )


def _judged(run: Run, policy: Policy, stop: StopRequest, step: int) -> bool:
    """Judge between two steps; False where a request to stop cut it short."""
    try:
        with stop.at_once():
            run.judge(policy, f"step {step}")
    except KeyboardInterrupt:
        return False
    return True


def _next(events: Any, run: Run) -> StepDone:
    """The next step; a fault in it gets the last good checkpoint's name."""
    try:
        event: StepDone = next(events)
    except ModelError as error:
        last = checkpoint.newest(run.folder.checkpoints, run.terminal.say) if run.folder.checkpoints.is_dir() else None
        kept = f"last good checkpoint: {checkpoint.folder_name(last.step)}" if last else "no checkpoint was written yet"
        fault = error.faults[0]
        raise ModelError(fault.what, fault.where, f"{fault.fix}; {kept}") from None
    except torch.OutOfMemoryError as error:
        raise EnvironmentFault(
            f"out of memory: {str(error).splitlines()[0]}", "this step", "set train.micro_batch_tokens lower"
        ) from None
    return event


def _resume(run: Run, policy: Policy, optimizer: torch.optim.Optimizer, scaler: Any, saved: Checkpoint | None) -> int:
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
    if run.folder.metrics.exists():
        lines = run.folder.metrics.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= step]
        if kept != lines:
            write_atomic(run.folder.metrics, b"".join(kept))
    return step


def _step_of(line: bytes) -> float:
    """The step that a line of metrics tells of; infinite for a line that a crash left incomplete."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _save(run: Run, policy: Policy, optimizer: torch.optim.Optimizer, scaler: Any, step: int) -> None:
    state = Checkpoint(
        step=step,
        weights=model.adapter_weights(policy.model),
        config=model.adapter_config(policy.model, run.prepared.plan.model),
        moments=checkpoint.optimizer_tensors(optimizer, policy.trainable()),
        scaler=scaler.state_dict() if scaler else None,
    )
    sync_file(run.folder.metrics)  # a checkpoint promises the lines of its steps, also after power loss
    make_folder(run.folder.checkpoints)
    checkpoint.save(run.folder.checkpoints, state, run.prepared.recipe.train.keep_last)


def _finish(run: Run, policy: Policy, steps: int) -> None:
    """The adapter folder, in PEFT's own format, with a manifest; scores of an earlier, shorter end go."""
    from safetensors.torch import save as tensors_to

    files = {
        checkpoint.ADAPTER: tensors_to(model.adapter_weights(policy.model), {"format": "pt"}),
        checkpoint.CONFIG: (
            json.dumps(model.adapter_config(policy.model, run.prepared.plan.model), indent=2) + "\n"
        ).encode(),
    }
    digest = manifest.digest_bytes(files[checkpoint.ADAPTER])
    former = read_json(run.folder.adapter / manifest.NAME) or {"sha256": {}}
    if former["sha256"].get(checkpoint.ADAPTER) not in (None, digest):
        scores = read_json(run.folder.scores) or {}
        write_json(run.folder.scores, {key: value for key, value in scores.items() if key not in ("after", "merged")})
    checkpoint.write_folder(run.folder.adapter, files)


class _Log:
    """metrics.jsonl, the tracker and the live line."""

    def __init__(self, run: Run, session: Session, total: int, start: int) -> None:
        self.run, self.session, self.total = run, session, total
        self.progress = Progress(run.terminal, "step", start=start)

    def step(self, event: StepDone) -> None:
        speed, memory = event.tokens / event.seconds, hardware.memory_in_use()
        line: dict[str, Any] = {
            "step": event.step,
            "loss": event.loss,
            "learning_rate": event.learning_rate,
            "grad_norm": event.grad_norm,
            "tokens": event.tokens,
            "supervised_tokens": event.supervised,
            "samples": event.samples,
            "seconds": round(event.seconds, 4),
            "tokens_per_second": round(speed, 1),
            "memory": memory,
        }
        if event.loss_scale is not None:
            line["loss_scale"] = event.loss_scale
        append_line(self.run.folder.metrics, line)
        self.session.log({key: value for key, value in line.items() if key != "step"}, event.step)
        self.progress(event.step, self.total, f"loss {event.loss:.4f}  {speed:.0f} tokens/s  {size(memory)}")


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Add one JSON line. A line that a crash cut off is dropped when the run goes on."""
    from finetune.runfolder import disk_fault

    try:
        with path.open("ab") as file:
            file.write(json.dumps(value, allow_nan=False).encode() + b"\n")
    except OSError as error:
        raise disk_fault(error, path) from error
