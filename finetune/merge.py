"""Fold an adapter into its base, shard by shard, into a folder that plain transformers loads.

Into the base *as it was trained against*: a 4-bit run never saw the full-precision weights, and folding into those
moves the model (measured: six points of accuracy on a 135M model). Accumulated in fp32, rounded once and without bias.
What will be done to each tensor is listed first (``FoldPlan``) and every adapter key must find its place before a byte
is written.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune import shards
from finetune.base import Base
from finetune.errors import Fault, ModelError
from finetune.kernels import frozen_linear
from finetune.loading import DTYPES, BaseForm

_PREFIX = "base_model.model."
_ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, kw_only=True)
class Fold:
    """What happens to one base tensor. ``replay``: rounded first as it was in training, quantised and dequantised;
    ``rows``: the adapter tensor that takes the place of the rows ``row_ids``."""

    replay: bool = False
    lora_a: str = ""
    lora_b: str = ""
    magnitude: str = ""
    scaling: float = 0.0
    replacement: str = ""
    rows: str = ""
    row_ids: tuple[int, ...] = ()


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
        rows_of = f"{key.removeprefix(_PREFIX).removesuffix(_ROWS)}.weight" if key.endswith(_ROWS) else ""
        if rows_of in base.tensors:
            parts.setdefault(rows_of, {})["rows"] = key
            continue
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
        if "rows" in found:
            folds[name] = Fold(rows=found["rows"], row_ids=_row_ids(name, config))
        elif "whole" in found:
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


def _row_ids(name: str, config: dict[str, Any]) -> tuple[int, ...]:
    """The token ids whose rows of this matrix were trained."""
    indices = config["trainable_token_indices"]
    module = name.removesuffix(".weight")
    return tuple(next(ids for word, ids in indices.items() if module.endswith(word)))


def _scaling(module: str, rank: int, config: dict[str, Any]) -> float:
    """alpha / r (Hu et al. 2021, section 4.1), or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023, theorem 3.2)."""
    pattern = config.get("alpha_pattern") or {}
    alpha = next((a for word, a in pattern.items() if re.match(rf"(.*\.)?({word})$", module)), config["lora_alpha"])
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def fold_tensor(value: torch.Tensor, fold: Fold, form: BaseForm, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """One folded tensor in fp32. value: [out, in] as stored in the shard."""
    if fold.replacement:
        return weights[fold.replacement].float()
    if fold.rows:
        return value.float().index_copy_(0, torch.tensor(fold.row_ids), weights[fold.rows].float())
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


def dithered(value: torch.Tensor, name: str) -> torch.Tensor:
    """fp32 → bf16, up or down at random with the odds of where it lies between: right on average.

    A replayed weight lies on bf16's grid. Rounded to the nearest, every update below half a step is swallowed: 8 % of
    a QLoRA update at Qwen-14B's width (KL 1.5e-2 to the live model; 1.3e-4 this way, 1.0e-4 in fp32; decision 0006).
    The draw hangs on the tensor's ``name`` alone, so that the same merge gives the same bytes.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32)
    return ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def change(plan: FoldPlan, weights: dict[str, torch.Tensor]) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """What the merged folder has of each base tensor, by name: folded, and rounded as it is written."""

    def changed(name: str, value: torch.Tensor) -> torch.Tensor:
        if name not in plan.folds:
            return value
        fold = plan.folds[name]
        found = fold_tensor(value, fold, plan.form, weights)
        return dithered(found, name) if fold.lora_a and value.dtype == torch.bfloat16 else found.to(value.dtype)

    return changed


def apply(
    plan: FoldPlan, base: Base, weights: dict[str, torch.Tensor], out: Path, layout: str,
    progress: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Write the merged shards, with the base's own split and dtypes, into the folder ``out``."""
    shards.rewrite(base, out, layout, change(plan, weights), progress)
