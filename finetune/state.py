"""A run's state on the disk: described at its start, taken up where it stands, saved after steps, closed at its end."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from typing import Any

import torch

from finetune import checkpoint, ended, manifest, metrics, model
from finetune import scores as score_file
from finetune.checkpoint import Checkpoint
from finetune.copies import Copies
from finetune.interrupts import StopRequest
from finetune.model import Policy
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


class Keeper:
    """Saves a run under way, has each save copied, and tells ``stop`` what that takes."""

    def __init__(
        self, run: Run, policy: Policy, optimizer: torch.optim.Optimizer, scaler: Any, stop: StopRequest,
        copies: Copies | None,
    ) -> None:  # fmt: skip
        self._run, self._state, self._stop, self._copies = run, (policy, optimizer, scaler), stop, copies
        weights = sum(value.numel() * value.element_size() for value in policy.trainable().values())
        stop.saved(3 * weights / _DISK)  # with the two moments of AdamW

    def save(self, step: int) -> None:
        """The state after ``step`` steps, durable; then older checkpoints go."""
        began, folder = time.monotonic(), self._run.folder
        sync_file(folder.metrics)  # a checkpoint promises the lines of its steps, also after power loss
        write_checkpoint(self._run, *self._state, step)
        checkpoint.rotate(folder.checkpoints, step, self._run.prepared.recipe.train.keep_last)
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


def finish(run: Run, steps: int, facts: dict[str, Any] | None = None) -> None:
    """The last file of a run: its adapter is written and judged; ``facts`` as ``ended.end`` tells them."""
    digest = manifest.digest(run.folder.adapter / checkpoint.ADAPTER)
    write_json(run.folder.finished, {"steps": steps, "adapter": digest, **(facts or {})})
