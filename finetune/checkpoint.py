"""Save, verify, rotate, resume: a run's state on disk, whole or not there.

A checkpoint is written under a temporary name, every file flushed, its manifest of digests last, then renamed and the
parent flushed; older ones go only after that. Reading trusts nothing: digests are checked, and a damaged newest
checkpoint falls back to the one before. Tensors are safetensors, the rest JSON; nothing is pickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as tensors_from
from safetensors.torch import save as tensors_to

from finetune import manifest
from finetune.errors import ModelError
from finetune.runfolder import atomic_folder, discard, json_bytes, sync_folder, write_synced

ADAPTER, CONFIG, OPTIMIZER, STATE = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "optimizer.safetensors",
    "state.json",
)
FILES = (ADAPTER, CONFIG, OPTIMIZER, STATE)


PROVENANCE = "finetune.json"
"""Beside a finished adapter: the base that it belongs to, and the choices that it is valid with."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The state after ``step`` steps. ``moments`` are the optimizer's tensors by parameter; ``scaler`` is fp16's."""

    step: int
    weights: dict[str, torch.Tensor]
    config: dict[str, Any]
    moments: dict[str, torch.Tensor]
    scaler: dict[str, Any] | None = None


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def save(folder: Path, checkpoint: Checkpoint, keep_last: int) -> Path:
    """Write a checkpoint below ``folder`` and then remove all but the newest ``keep_last``. Raises as ``write``."""
    target = write(folder, checkpoint)
    rotate(folder, checkpoint.step, keep_last)
    return target


def write(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint below ``folder``; the others stay.

    Raises:
        ModelError: an adapter weight is not finite; nothing is written, the checkpoint before stays.
        EnvironmentFault: the disk refuses; the checkpoint before stays.
    """
    for name, value in checkpoint.weights.items():
        if not bool(torch.isfinite(value).all()):
            raise ModelError(f"adapter tensor {name} is not finite after step {checkpoint.step}", str(folder))
    target = folder / folder_name(checkpoint.step)
    write_folder(target, to_files(checkpoint))
    return target


def to_files(checkpoint: Checkpoint) -> dict[str, bytes]:
    """The content of each of its files."""
    return {
        ADAPTER: tensors_to(checkpoint.weights, {"format": "pt"}),
        CONFIG: json_bytes(checkpoint.config),
        OPTIMIZER: tensors_to(checkpoint.moments),
        STATE: json_bytes({"step": checkpoint.step, "scaler": checkpoint.scaler}),
    }


def rotate(folder: Path, step: int, keep_last: int) -> None:
    """Keep the newest ``keep_last`` up to ``step``, which must verify. Later ones go too: a run that stands at
    ``step`` has passed them over as damaged, and they must not push good ones out."""
    found = _newest_first(folder)
    kept = [path for path in found if int(path.name[5:]) <= step][:keep_last]
    stale = [path for path in found if path not in kept]
    for path in stale:
        discard(path)
    if stale:
        sync_folder(folder)


def write_folder(target: Path, files: dict[str, bytes]) -> None:
    """A folder of files under a manifest, in place in one rename."""
    with atomic_folder(target) as temporary:
        for name, data in files.items():
            write_synced(temporary / name, data)
        manifest.write(temporary, {name: manifest.digest_bytes(data) for name, data in files.items()})


def _newest_first(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def steps(folder: Path, say: Callable[[str], None]) -> list[int]:
    """The steps of all checkpoints that verify, the newest first. Damaged ones are named through ``say``."""
    found = []
    for path in _newest_first(folder):
        if faults := manifest.faults(path):
            say(f"checkpoint {path} is passed over: {faults[0]}")
        else:
            found.append(int(path.name[5:]))
    return found


def newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None. A damaged one is named through ``say`` and passed over."""
    for path in _newest_first(folder):
        faults = manifest.faults(path)
        if not faults:
            return read(path)
        say(f"checkpoint {path.name} is passed over: {faults[0]}")
    return None


def read(path: Path) -> Checkpoint:
    return from_files({name: (path / name).read_bytes() for name in FILES})


def from_files(files: dict[str, bytes]) -> Checkpoint:
    state = json.loads(files[STATE])
    return Checkpoint(
        step=state["step"],
        weights=tensors_from(files[ADAPTER]),
        config=json.loads(files[CONFIG]),
        moments=tensors_from(files[OPTIMIZER]),
        scaler=state["scaler"],
    )


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """The optimizer's state as flat tensors named ``parameter|entry``; a counter that is a number becomes int64."""
    return {
        f"{name}|{entry}": torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
        for name, (key, _) in _owners(optimizer, parameters).items()
        for entry, value in optimizer.state.get(key, {}).items()
    }


def _owners(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter]
) -> dict[str, tuple[Any, torch.nn.Parameter]]:
    """Name in the file → where the optimizer keeps that state, and the parameter that it moves.

    PEFT's LoRA-FA keeps it by name, and calls a pair of A and B by what stands before both.
    """
    if "names" not in optimizer.param_groups[0]:
        return {name: (parameter, parameter) for name, parameter in parameters.items()}
    pairs = {f"{name[: name.find('lora')]}lora" if "lora" in name else name: one for name, one in parameters.items()}
    return {name: (name, parameter) for name, parameter in pairs.items()}


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: dict[str, torch.nn.Parameter], tensors: dict[str, torch.Tensor]
) -> None:
    """Put saved state back, each tensor on its parameter's device (step counters stay on the CPU, as AdamW keeps them).

    Raises:
        ModelError: the state belongs to other parameters.
    """
    owners = _owners(optimizer, parameters)
    strangers = {key.rpartition("|")[0] for key in tensors} - set(owners)
    if strangers:
        raise ModelError(f"the optimizer state has {sorted(strangers)[0]}, the adapter has not", "checkpoint")
    if hasattr(optimizer, "init_state"):  # bitsandbytes': it makes its buffers itself, those that can be paged too
        known = {id(owners[key.rpartition("|")[0]][1]) for key in tensors}
        for index, group in enumerate(optimizer.param_groups):
            for number, parameter in enumerate(group["params"]):
                if id(parameter) in known:
                    optimizer.init_state(group, parameter, index, number)
    for name_and_entry, value in tensors.items():
        name, _, entry = name_and_entry.rpartition("|")
        key, parameter = owners[name]
        state = optimizer.state[key]
        buffer = state.get(entry)
        if isinstance(buffer, torch.Tensor) and (buffer.dtype, buffer.shape) == (value.dtype, value.shape):
            buffer.copy_(value)
        elif value.dtype == torch.int64 and value.ndim == 0:
            state[entry] = int(value)
        else:
            state[entry] = value if value.ndim == 0 else value.to(parameter.device)


def read_adapter(folder: Path) -> Checkpoint:
    """A finished adapter's weights and config; ``step`` is 0 and there are no moments."""
    return Checkpoint(
        step=0,
        weights=tensors_from((folder / ADAPTER).read_bytes()),
        config=json.loads((folder / CONFIG).read_bytes()),
        moments={},
    )
