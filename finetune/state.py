"""A run's state on the disk: described at its start, taken up where it stands, saved after steps, closed at its end."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from finetune import checkpoint, ended, layouts, manifest, metrics, model, starts
from finetune import scores as score_file
from finetune.checkpoint import Checkpoint
from finetune.copies import Copies
from finetune.interrupts import StopRequest
from finetune.model import Policy
from finetune.peers import COMPARE, PeerLost, Peers
from finetune.recipe import yamlfile
from finetune.run import Run
from finetune.runfolder import json_bytes, make_folder, read_json, sync_file, write_atomic, write_json

_DISK = 2e8
"""Bytes a second that a checkpoint is expected to be written with, until a save was measured."""


def describe(run: Run) -> None:
    """What is trained, as files: the recipe with every default, the plan, the rows not taken as they stand."""
    write_atomic(run.folder.recipe, yamlfile.dump(run.prepared.recipe.to_yaml_dict()).encode())
    write_json(run.folder.plan, run.prepared.plan.to_dict())
    named = "".join(json.dumps(one.to_dict(), ensure_ascii=False) + "\n" for one in run.prepared.named)
    if named:
        write_atomic(run.folder.named_rows, named.encode())


def resume(run: Run, policy: Policy, optimizer: torch.optim.Optimizer, scaler: Any, saved: Checkpoint | None) -> int:
    """Put a checkpoint's state back and cut the metrics to it; returns the number of steps done."""
    step = 0
    if saved is not None:
        put_back(policy, optimizer, scaler, saved, run.folder.checkpoints)
        step = saved.step
        run.terminal.say(f"going on after step {step}")
        checkpoint.rotate(run.folder.checkpoints, step, run.prepared.recipe.train.keep_last)
    if saved is None and run.folder.metrics.exists() and run.folder.metrics.stat().st_size:
        run.terminal.say("there is no checkpoint to go on from: this run begins again at its first step")
    kept = metrics.cut(run.folder.metrics, step)
    if kept < step:
        run.terminal.say(f"{run.folder.metrics} has lost {step - kept} of {step} steps: the curve goes on without them")
    return step


def put_back(policy: Policy, optimizer: torch.optim.Optimizer, scaler: Any, saved: Checkpoint, place: Path) -> None:
    """A checkpoint's weights, moments and loss scale into what trains; ``place``: where it is from, for faults."""
    model.load_adapter(policy.model, saved.weights, place)
    checkpoint.restore_optimizer(optimizer, policy.trainable(), saved.moments)
    if scaler and saved.scaler:
        scaler.load_state_dict(saved.scaler)


def give(peers: Peers, saved: Checkpoint | None) -> None:
    """Send the others the checkpoint that the first process goes on from; none for a fresh start."""
    files = checkpoint.to_files(saved) if saved else dict.fromkeys(checkpoint.FILES, b"")
    for name in checkpoint.FILES:
        peers.send(files[name])


def take(peers: Peers) -> Checkpoint | None:
    """What the first process gives."""
    files = {name: peers.send() for name in checkpoint.FILES}
    return checkpoint.from_files(files) if files[checkpoint.STATE] else None


def fingerprint(policy: Policy, optimizer: torch.optim.Optimizer) -> str:
    """A digest of all that a checkpoint keeps: equal on all processes of a job."""
    total = hashlib.sha256()
    kept = {**model.adapter_weights(policy.model), **checkpoint.optimizer_tensors(optimizer, policy.trainable())}
    for name in sorted(kept):
        total.update(name.encode())
        total.update(kept[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


class Keeper:
    """Saves a run under way, has each save copied, and tells ``stop`` what that takes."""

    def __init__(
        self, run: Run, policy: Policy, optimizer: torch.optim.Optimizer, scaler: Any, stop: StopRequest,
        copies: Copies | None,
    ) -> None:  # fmt: skip
        self._run, self._state, self._stop, self._copies = run, (policy, optimizer, scaler), stop, copies
        weights = sum(value.numel() * value.element_size() for value in policy.trainable().values())
        stop.saved(3 * weights / _DISK)  # with the two moments of AdamW
        self._last = self.done = 0
        """The steps that are saved, and those that are done."""

    @contextlib.contextmanager
    def rescuing(self) -> Iterator[None]:
        """Where another process of the job is lost inside, the steps that were done are saved before all else."""
        try:
            yield
        except PeerLost as lost:
            if self.done != self._last:
                self._write(self.done)
            what = f"{lost.faults[0].what}; step {self.done} is saved in {self._run.folder.root}"
            raise PeerLost(what, fix="the same command goes on from here") from None

    def save(self, step: int) -> None:
        """The state after ``step`` steps, the same on all processes, durable; then older checkpoints go."""
        self.compare()
        self._write(step)

    def begin(self, step: int) -> None:
        """The run stands at ``step``, in the state that was saved then or in a fresh one: the same everywhere?"""
        self._last = self.done = step
        self.compare()

    def compare(self) -> None:
        """Hold the other processes' state against this one's."""
        self._run.peers.say(COMPARE)
        self._run.peers.compare(lambda: fingerprint(*self._state[:2]), "the state")

    def _write(self, step: int) -> None:
        began, folder = time.monotonic(), self._run.folder
        sync_file(folder.metrics)  # a checkpoint promises the lines of its steps, also after power loss
        write_checkpoint(self._run, *self._state, step)
        checkpoint.rotate(folder.checkpoints, step, self._run.prepared.recipe.train.keep_last)
        self._last = step
        if self._copies:
            self._copies.saved(step)
        self._stop.saved(time.monotonic() - began + (self._copies.seconds if self._copies else 0.0))


def write_checkpoint(run: Run, policy: Policy, optimizer: torch.optim.Optimizer, scaler: Any, step: int) -> None:
    """The run's state after ``step`` steps, beside the checkpoints that are there. Its metrics must be flushed."""
    standing = Checkpoint(
        step=step,
        weights=model.adapter_weights(policy.model),
        config=model.adapter_config(policy.model, run.prepared.plan.model),
        moments=checkpoint.optimizer_tensors(optimizer, policy.trainable()),
        scaler=scaler.state_dict() if scaler else None,
    )
    make_folder(run.folder.checkpoints)
    checkpoint.write(run.folder.checkpoints, standing)


def write_adapter(run: Run, policy: Policy) -> None:
    """The adapter folder, in PEFT's own format, with a manifest; scores of an earlier, shorter end go."""
    from safetensors.torch import save as tensors_to

    recipe = run.prepared.recipe
    made: dict[str, Any] = {
        "base": recipe.model,
        "commit": run.prepared.commit,
        "base_sha256": run.identity.base,
        "rope": recipe.rope,
        "form": {key: value for key, value in asdict(run.form()).items() if key != "device"},
    }
    if run.base.shape.scored:  # what a plain load must be told: see layouts.padding
        made["pad_token_id"] = layouts.padding(run.base)[1]
    weights, config = starts.result(policy.model, run.prepared.plan.model)
    files = {
        checkpoint.PROVENANCE: json_bytes(made),
        checkpoint.ADAPTER: tensors_to(weights, {"format": "pt"}),
        checkpoint.CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
    }
    digest = manifest.digest_bytes(files[checkpoint.ADAPTER])
    former = read_json(run.folder.adapter / manifest.NAME) or {"sha256": {}}
    if former["sha256"].get(checkpoint.ADAPTER) not in (None, digest):
        score_file.drop(run.folder, ended.AFTER, "merged")
    checkpoint.write_folder(run.folder.adapter, files)


def finish(run: Run, steps: int, facts: dict[str, Any] | None = None) -> None:
    """The last file of a run: its adapter is written and judged; ``facts`` as ``ended.end`` tells them."""
    digest = manifest.digest(run.folder.adapter / checkpoint.ADAPTER)
    write_json(run.folder.finished, {"steps": steps, "adapter": digest, **(facts or {})})
