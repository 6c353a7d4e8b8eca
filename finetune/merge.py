"""Fold an adapter into its base, shard by shard, into a folder that plain transformers loads.

Into the base *as it was trained against*: a 4-bit run never saw the full-precision weights, and folding into those
moves the model (measured: six points of accuracy on a 135M model). Accumulated in fp32, rounded once. What will be
done to each tensor is listed first (``FoldPlan``) and every adapter key must find its place before a byte is written.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from finetune.base import Base
from finetune.errors import Fault, ModelError
from finetune.kernels import frozen_linear
from finetune.model import DTYPES, BaseForm
from finetune.runfolder import json_bytes, read_json, write_synced
from finetune.shards import TORCH_DTYPES, ShardWriter

_PREFIX = "base_model.model."
_WEIGHT_FILES = re.compile(r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack)(\.index\.json)?$")
_NOT_COPIED = {"digests.json", "README.md", "manifest.json"}


@dataclass(frozen=True, kw_only=True)
class Fold:
    """What happens to one base tensor. ``replay``: rounded first as it was in training, quantised and dequantised."""

    replay: bool = False
    lora_a: str = ""
    lora_b: str = ""
    magnitude: str = ""
    scaling: float = 0.0
    replacement: str = ""


@dataclass(frozen=True, kw_only=True)
class FoldPlan:
    """Every base tensor that changes, and how; the others are copied."""

    folds: dict[str, Fold]
    form: BaseForm
    replayed: bool

    def lines(self) -> list[str]:
        folded = sum(bool(fold.lora_a) for fold in self.folds.values())
        replayed = sum(fold.replay for fold in self.folds.values())
        whole = sum(bool(fold.replacement) for fold in self.folds.values())
        first = f"{folded} tensors get their LoRA update, {whole} are replaced whole"
        base = f"{replayed} are replayed as {self.form.weights}" if self.replayed else "the base is taken as published"
        return [f"{first}; {base}"]


def make_plan(
    base: Base, form: BaseForm, weights: dict[str, torch.Tensor], config: dict[str, Any], *, replayed: bool
) -> FoldPlan:
    """Give every adapter tensor its place.

    Raises:
        ModelError: adapter tensors that fit no base tensor, with their names.
    """
    parts: dict[str, dict[str, str]] = {}
    faults = []
    for key in weights:
        module, _, part = key.removeprefix(_PREFIX).rpartition(".lora_")
        if module and f"{module}.weight" in base.tensors:
            parts.setdefault(f"{module}.weight", {})[part.removesuffix(".weight")] = key
        elif not module and key.removeprefix(_PREFIX) in base.tensors:
            parts[key.removeprefix(_PREFIX)] = {"whole": key}
        else:
            faults.append(Fault(f"adapter tensor {key} fits no tensor of the base", str(base.folder), "wrong base?"))
    folds = {}
    for name in base.tensors:
        replay = replayed and bool(re.search(r"\.layers\.\d+\..*_proj\.weight$", name))
        found = parts.get(name, {})
        if "whole" in found:
            folds[name] = Fold(replacement=found["whole"])
        elif found and not {"A", "B"} <= set(found):
            faults.append(Fault(f"{name} has only half of its LoRA pair", str(sorted(found)), "the adapter is damaged"))
        elif found:
            rank = weights[found["A"]].shape[0]
            folds[name] = Fold(
                replay=replay, lora_a=found["A"], lora_b=found["B"], magnitude=found.get("magnitude_vector", ""),
                scaling=_scaling(name.removesuffix(".weight"), rank, config),
            )  # fmt: skip
        elif replay:
            folds[name] = Fold(replay=True)
    if faults:
        raise ModelError.of(faults[:20])
    if not parts:
        raise ModelError("the adapter is empty", str(base.folder), "train it first")
    return FoldPlan(folds=folds, form=form, replayed=replayed)


def _scaling(module: str, rank: int, config: dict[str, Any]) -> float:
    """alpha / r (Hu et al. 2021, section 4.1), or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, theorem 3.2)."""
    pattern = config.get("alpha_pattern") or {}
    alpha = next((a for word, a in pattern.items() if re.match(rf"(.*\.)?({word})$", module)), config["lora_alpha"])
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def fold_tensor(value: torch.Tensor, fold: Fold, form: BaseForm, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """One folded tensor in fp32. value: [out, in] as stored in the shard."""
    if fold.replacement:
        return weights[fold.replacement].float()
    held = value.to(DTYPES.get(form.weights, DTYPES[form.compute])).to(DTYPES[form.compute])
    folded = frozen_linear.replay(held, form.weights, form.double) if fold.replay else value
    folded = folded.to(torch.float32, copy=True)
    if fold.lora_a:
        folded.addmm_(weights[fold.lora_b].float(), weights[fold.lora_a].float(), alpha=fold.scaling)
    if fold.magnitude:
        # DoRA: direction times a learned length per output row (Liu et al. 2024, equation 5).
        length = weights[fold.magnitude].float().reshape(-1)
        folded *= (length / torch.linalg.norm(folded, dim=1))[:, None]
    return folded


def apply(
    plan: FoldPlan, base: Base, weights: dict[str, torch.Tensor], out: Path, progress: Callable[[int, int], None]
) -> None:
    """Write the merged shards, with the base's own split and dtypes, into the folder ``out``."""
    done = 0
    for shard in base.shards:
        layout = {name: tensor for name, tensor in base.tensors.items() if tensor.shard == shard}
        with safe_open(base.folder / shard, framework="pt") as source, ShardWriter(out / shard, layout) as target:
            for name, tensor in layout.items():
                value = source.get_tensor(name)
                if name in plan.folds:
                    value = fold_tensor(value, plan.folds[name], plan.form, weights).to(TORCH_DTYPES[tensor.dtype])
                target.add(name, value)
                done += 1
                progress(done, len(base.tensors))


def copy_files(base: Base, out: Path) -> None:
    """Config, tokenizer, template and licence files as published; the stop token added to the generation's end."""
    for path in sorted(base.folder.iterdir()):
        if (
            path.is_file()
            and path.name not in _NOT_COPIED
            and not _WEIGHT_FILES.match(path.name)
            and path.suffix != ".py"
        ):
            shutil.copyfile(path, out / path.name)
    index = base.folder / "model.safetensors.index.json"
    if index.is_file():
        write_synced(out / index.name, index.read_bytes())
    config = {key: value for key, value in base.config.items() if key != "auto_map"}
    write_synced(out / "config.json", json_bytes(config))
    generation = read_json(base.folder / "generation_config.json") or {}
    stop = _token_id(base)
    ends = generation.get("eos_token_id", [])
    ends = ends if isinstance(ends, list) else [ends]
    generation["eos_token_id"] = [stop, *[end for end in ends if end != stop]]
    write_synced(out / "generation_config.json", json_bytes(generation))


def _token_id(base: Base) -> int:
    tokenizer = json.loads((base.folder / "tokenizer.json").read_bytes())
    return next(int(entry["id"]) for entry in tokenizer["added_tokens"] if entry["content"] == base.stop_token)
