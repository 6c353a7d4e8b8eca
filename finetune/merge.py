"""Fold an adapter into its base, shard by shard, into a folder that plain transformers loads.

Into the base *as it was trained against*: a 4-bit run never saw the full-precision weights, and folding into those
moves the model (measured: six points of accuracy on a 135M model). Accumulated in fp32, rounded once and without bias.
What will be done to each tensor is listed first (``FoldPlan``) and every adapter key must find its place before a byte
is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune import forms, shards
from finetune.base import Base
from finetune.errors import Fault, ModelError
from finetune.fold import WORKERS, Fold, Folding
from finetune.loading import BaseForm
from finetune.shards import TORCH_DTYPES, Rows

_PREFIX = "base_model.model."
_ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, kw_only=True)
class FoldPlan:
    """Every base tensor that changes, and how; the others are copied."""

    folds: dict[str, Fold]
    form: BaseForm
    replayed: bool

    def folding(self, weights: dict[str, torch.Tensor], pool: ThreadPoolExecutor | None = None) -> Folding:
        """The plan, ready to be applied to one tensor after another."""
        return Folding(folds=self.folds, form=self.form, weights=weights, pool=pool)

    def lines(self) -> list[str]:
        folded = sum(bool(fold.lora_a) for fold in self.folds.values())
        replayed = sum(fold.replay for fold in self.folds.values())
        whole = sum(bool(fold.replacement) for fold in self.folds.values())
        first = f"{folded} tensors get their LoRA update, {whole} are replaced whole"
        stored = self.form.weights in forms.STORED
        acts = f"{replayed} are {'dequantised from' if stored else 'replayed as'} {self.form.weights}"
        base = acts if self.replayed else "the base is taken as published"
        rank = max((fold.correct for fold in self.folds.values()), default=0)
        more = f", with a rank-{rank} correction towards {self.form.weights}" if rank else ""
        return [f"{first}; {base}{more}"]


def make_plan(
    base: Base, form: BaseForm, weights: dict[str, torch.Tensor], config: dict[str, Any], *, replayed: bool,
    correct: int = 0,
) -> FoldPlan:  # fmt: skip
    """Give every adapter tensor its place. ``correct``: the rank of a correction of a base that is not replayed.

    Raises:
        ModelError: adapter tensors that fit no base tensor, with their names.
    """
    parts: dict[str, dict[str, str]] = {}
    faults = empty(weights)
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
    held_small = set(quantised_names(base))
    for name in base.tensors:
        quantised = name in held_small
        ground = Fold(replay=quantised and replayed, correct=correct if quantised and not replayed else 0)
        found = parts.get(name, {})
        if "rows" in found:
            folds[name] = Fold(rows=found["rows"], row_ids=_row_ids(name, config))
        elif "whole" in found:
            folds[name] = Fold(replacement=found["whole"])
        elif found and not {"A", "B"} <= set(found):
            faults.append(Fault(f"{name} has only half of its LoRA pair", str(sorted(found)), "the adapter is damaged"))
        elif found:
            rank = weights[found["A"]].shape[0]
            folds[name] = replace(
                ground, lora_a=found["A"], lora_b=found["B"], magnitude=found.get("magnitude_vector", ""),
                scaling=_scaling(name.removesuffix(".weight"), rank, config),
            )  # fmt: skip
        elif ground != Fold():
            folds[name] = ground
    if faults:
        raise ModelError.of(faults[:20])
    if not parts:
        raise ModelError("the adapter is empty", str(base.folder), "train it first")
    return FoldPlan(folds=folds, form=form, replayed=replayed)


def quantised_names(base: Base) -> list[str]:
    """The tensors that a quantised form of this base holds in few bits."""
    return [name for name in base.tensors if re.search(r"\.layers\.\d+\..*_proj\.weight$", name)]


def empty(weights: dict[str, torch.Tensor]) -> list[Fault]:
    """Adapter tensors that say nothing, or nonsense."""
    faults = []
    for key, value in weights.items():
        if not bool(torch.isfinite(value).all()):
            faults.append(Fault(f"adapter tensor {key} holds NaN or infinity", "adapter", "train again"))
        elif not bool(value.any()):
            faults.append(Fault(f"adapter tensor {key} is zero: it was never trained", "adapter", "train it first"))
    return faults


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


def apply(
    plan: FoldPlan, base: Base, weights: dict[str, torch.Tensor], out: Path, layout: str,
    progress: Callable[[int, int], None],
) -> dict[str, float]:  # fmt: skip
    """Write the merged shards, with the base's own split and dtypes, into the folder ``out``; → how much each tensor
    changed that was not there already (``Folding.relative_changes``)."""
    threads = torch.get_num_threads()
    # A thread for each block: blocks that stay in a core's cache are too small to be shared between cores.
    with ThreadPoolExecutor(WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        folding = plan.folding(weights, pool)

        def changed(name: str, rows: Rows) -> Iterator[torch.Tensor]:
            folds = name in plan.folds
            return folding.rows(name, rows, TORCH_DTYPES[base.tensors[name].dtype]) if folds else rows.blocks()

        try:
            shards.rewrite(base, out, layout, changed, progress)
            with shards.Reader(base) as source:  # those of shards that an earlier command has finished
                for name in folding.unknown():
                    for _ in changed(name, source.streamed(name)):
                        pass
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
    return folding.relative_changes()
