"""Fold an adapter into its base, shard by shard, into a folder that plain transformers loads.

Into the base *as it was trained against*: a 4-bit run never saw the full-precision weights, and folding into those
moves the model (measured: six points of accuracy on a 135M model). Accumulated in fp32, rounded once and without bias.
What will be done to each tensor is listed first (``FoldPlan``) and every adapter key must find its place before a byte
is written.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune import shards
from finetune.base import Base
from finetune.errors import Fault, ModelError
from finetune.kernels import four_bit, frozen_linear
from finetune.loading import DTYPES, BaseForm
from finetune.shards import TORCH_DTYPES, Rows

_PREFIX = "base_model.model."
_ROWS = ".token_adapter.trainable_tokens_delta"
Pair = tuple[torch.Tensor, torch.Tensor]
_WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True, kw_only=True)
class Fold:
    """What happens to one base tensor. ``replay``: rounded first as it was in training, quantised and dequantised;
    ``correct``: that rounding is added instead, by its nearest update of so low a rank; ``rows``: the adapter tensor
    that takes the place of the rows ``row_ids``."""

    replay: bool = False
    correct: int = 0
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
        quantised = bool(re.search(r"\.layers\.\d+\..*_proj\.weight$", name))
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


def _updated(block: torch.Tensor, rows: slice, fold: Fold, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Rows of a base tensor, fp32 and ours to change: [rows, in] → with their share of the adapter."""
    if fold.rows:
        for place, token in enumerate(fold.row_ids):
            if rows.start <= token < rows.stop:
                block[token - rows.start] = weights[fold.rows][place].float()
    if fold.lora_a:
        block.addmm_(weights[fold.lora_b][rows].float(), weights[fold.lora_a].float(), alpha=fold.scaling)
    if fold.magnitude:
        # DoRA: direction times a learned length per output row (Liu et al. 2024, equation 5).
        length = weights[fold.magnitude].float().reshape(-1)[rows]
        block *= (length / torch.linalg.norm(block, dim=1))[:, None]
    return block


def _seed(name: str) -> int:
    """128 bits."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big")


def dithered(value: torch.Tensor, name: str) -> torch.Tensor:
    """fp32 → bf16, up or down at random with the odds of where it lies between: right on average.

    A replayed weight lies on bf16's grid. Rounded to the nearest, every update below half a step is swallowed: 8 % of
    a QLoRA update at Qwen-14B's width (KL 1.5e-2 to the live model; 1.3e-4 this way, 1.0e-4 in fp32; decision 0006).
    The draw hangs on ``name`` alone, so that the same merge gives the same bytes: the bits of SFC64, which no version
    of numpy will change, and which cost a quarter of torch's own.
    """
    bits = value.contiguous().view(torch.int32)
    drawn = torch.from_numpy(np.random.SFC64(_seed(name)).random_raw(-(-bits.numel() // 4)).view(np.int16))
    # One draw of 64 bits is the noise of four values, -2^15 to 2^15 - 1 each.
    noisy = torch.add(bits, drawn[: bits.numel()].view(bits.shape)).add_(1 << 15).bitwise_and_(-(1 << 16))
    return noisy.view(torch.float32).to(torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What the merged folder has of each base tensor: folded, and rounded as it is written. Row blocks are made side
    by side where there is a ``pool``; they are the same ones, and the same bytes, with any number of workers."""

    plan: FoldPlan
    weights: dict[str, torch.Tensor]
    pool: ThreadPoolExecutor | None = None

    def rows(self, name: str, rows: Rows, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """A tensor that changes, in row blocks; ``dtype``: that of the base's."""
        fold = self.plan.folds[name]
        scales = self._scales(rows) if fold.replay or fold.correct else None
        correction = self._correction(name, rows, fold.correct, scales) if fold.correct else None

        def made(start: int, stop: int) -> torch.Tensor:
            found = self._folded(rows, slice(start, stop), fold, scales, correction)
            changed = fold.lora_a or fold.correct
            return dithered(found, f"{name}:{start}") if changed and dtype == torch.bfloat16 else found.to(dtype)

        return self._side_by_side(made, rows)

    def whole(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """One tensor that is in memory already: the same numbers."""
        if name not in self.plan.folds:
            return value
        rows = Rows(shape=tuple(value.shape), read=lambda start, stop: value[start:stop])
        return torch.cat(list(self.rows(name, rows, value.dtype)))

    def _folded(
        self, rows: Rows, at: slice, fold: Fold, scales: torch.Tensor | None, correction: Pair | None
    ) -> torch.Tensor:
        """Rows of a base tensor with their share of the adapter, fp32."""
        if fold.replacement:
            return self.weights[fold.replacement][at].float()
        block = rows.read(at.start, at.stop)
        if fold.replay:
            block = self._replayed(block, at.start, scales)
        block = block.to(torch.float32, copy=True)
        if correction is not None:
            block.addmm_(correction[0][at], correction[1])
        return _updated(block, at, fold, self.weights)

    def _replayed(self, block: torch.Tensor, start: int, scales: torch.Tensor | None) -> torch.Tensor:
        """Base rows from ``start`` on, as they acted in training."""
        block, form = self._held(block), self.plan.form
        begin = start * (block.numel() // len(block)) // four_bit.BLOCK
        part = None if scales is None else scales[begin : begin - (-block.numel() // four_bit.BLOCK)]
        return frozen_linear.replay(block, form.weights, form.double, part)

    def _correction(self, name: str, rows: Rows, rank: int, scales: torch.Tensor | None) -> Pair:
        """Quantisation's change of a matrix, at a low rank: B [out, rank], A [rank, in], fp32.

        Its nearest one (Eckart and Young 1936) by a randomised SVD (Halko et al. 2011, algorithms 4.4 and 5.1), whose
        draw hangs on the name alone. Holds the matrix in fp32 once.
        """
        change = torch.empty(rows.shape)
        for start, stop in rows.bounds():
            block = rows.read(start, stop)
            change[start:stop] = self._replayed(block, start, scales).float() - block.float()
        rank = min(rank, *rows.shape)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_seed(name) >> 65)
            u, values, v = torch.svd_lowrank(change, q=min(rank + 8, *rows.shape), niter=2)
        return u[:, :rank] * values[:rank], v[:, :rank].T.contiguous()

    def _held(self, block: torch.Tensor) -> torch.Tensor:
        """Base rows in the dtypes that they went through at loading."""
        compute = DTYPES[self.plan.form.compute]
        return block.to(DTYPES.get(self.plan.form.weights, compute)).to(compute)

    def _scales(self, rows: Rows) -> torch.Tensor | None:
        """What quantising a part must know of the whole tensor."""
        if self.plan.form.weights not in ("nf4", "fp4"):
            return None
        found = self._side_by_side(lambda start, stop: four_bit.block_maxima(self._held(rows.read(start, stop))), rows)
        return four_bit.scales_of(torch.cat(list(found)), double=self.plan.form.double)

    def _side_by_side(self, made: Callable[[int, int], torch.Tensor], rows: Rows) -> Iterator[torch.Tensor]:
        """The row blocks in their order, a few of them ahead of who takes them."""
        waiting: deque[Future[torch.Tensor]] = deque()
        for start, stop in rows.bounds():
            if self.pool is None:
                yield made(start, stop)
                continue
            waiting.append(self.pool.submit(made, start, stop))
            if len(waiting) > 2 * _WORKERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def apply(
    plan: FoldPlan, base: Base, weights: dict[str, torch.Tensor], out: Path, layout: str,
    progress: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Write the merged shards, with the base's own split and dtypes, into the folder ``out``."""
    threads = torch.get_num_threads()
    # A thread for each block: blocks that stay in a core's cache are too small to be shared between cores.
    with ThreadPoolExecutor(_WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        merged = Merged(plan=plan, weights=weights, pool=pool)

        def changed(name: str, rows: Rows) -> Iterator[torch.Tensor]:
            folds = name in plan.folds
            return merged.rows(name, rows, TORCH_DTYPES[base.tensors[name].dtype]) if folds else rows.blocks()

        try:
            shards.rewrite(base, out, layout, changed, progress)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)
