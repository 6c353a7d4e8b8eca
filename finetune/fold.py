"""One base tensor with its share of the adapter, row block by row block.

Accumulated in fp32, rounded once and without bias. A block is small enough for a core's cache, and row blocks are made
side by side; what one needs to know of the whole tensor (the scales of double quantisation, a correction) comes first.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from finetune import forms
from finetune.loading import DTYPES, BaseForm
from finetune.shards import Rows

Pair = tuple[torch.Tensor, torch.Tensor]
WORKERS = min(8, os.cpu_count() or 1)


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


def _updated(
    block: torch.Tensor, rows: slice, fold: Fold, weights: dict[str, torch.Tensor]
) -> tuple[float, torch.Tensor]:
    """Rows of a base tensor, fp32 and ours to change: [rows, in] → the norm of their change, and they with it."""
    change = 0.0
    if fold.rows:
        held = [
            (place, token - rows.start) for place, token in enumerate(fold.row_ids) if rows.start <= token < rows.stop
        ]
        for place, row in held:
            value = weights[fold.rows][place].float()
            change = math.hypot(change, float(torch.linalg.vector_norm(value - block[row])))
            block[row] = value
    before = block.clone() if fold.magnitude else block
    if fold.lora_a:
        a, b = weights[fold.lora_a].float(), weights[fold.lora_b][rows].float()
        block.addmm_(b, a, alpha=fold.scaling)
        # ‖B A‖² is the trace of (Bᵀ B)(A Aᵀ): two small products instead of two passes over the matrix.
        square = float(((b.T @ b).double() * (a @ a.T).double()).sum())
        change = math.hypot(change, fold.scaling * math.sqrt(max(square, 0.0)))
    if fold.magnitude:
        # DoRA: direction times a learned length per output row (Liu et al. 2024, equation 5).
        length = weights[fold.magnitude].float().reshape(-1)[rows]
        block *= (length / torch.linalg.norm(block, dim=1))[:, None]
        change = float(torch.linalg.vector_norm(before.sub_(block)))
    return change, block


def _seed(name: str) -> int:
    """128 bits."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "big")


def dithered(value: torch.Tensor, name: str) -> torch.Tensor:
    """fp32, which is used up, → bf16, up or down at random with the odds of where it lies between: right on average.

    A replayed weight lies on bf16's grid. Rounded to the nearest, every update below half a step is swallowed: 8 % of
    a QLoRA update at Qwen-14B's width (KL 1.5e-2 to the live model; 1.3e-4 this way, 1.0e-4 in fp32; decision 0006).
    The draw hangs on ``name`` alone, so that the same merge gives the same bytes: the bits of SFC64, which no version
    of numpy will change, and which cost a quarter of torch's own.
    """
    bits = value.contiguous().view(torch.int32).view(-1)
    half = (bits.numel() + 1) // 2
    drawn = torch.from_numpy(np.random.SFC64(_seed(name)).random_raw((half + 1) // 2).view(np.int32))[:half]
    # 32 bits are the noise of two values far apart, 0 to 2^16 - 1 each. It only adds to a magnitude, and then the lower
    # half is cut off: a zero stays one.
    bits[half:] += drawn.bitwise_right_shift(16).bitwise_and_(0xFFFF)[: bits.numel() - half]
    bits[:half] += drawn.bitwise_and_(0xFFFF)
    return bits.bitwise_and_(-(1 << 16)).view(torch.float32).view(value.shape).to(torch.bfloat16)


@dataclass(frozen=True, kw_only=True)
class Folding:
    """What the merged folder has of each base tensor: folded, and rounded as it is written. Row blocks are made side
    by side where there is a ``pool``; they are the same ones, and the same bytes, with any number of workers."""

    folds: dict[str, Fold]
    form: BaseForm
    weights: dict[str, torch.Tensor]
    pool: ThreadPoolExecutor | None = None
    _norms: dict[str, dict[int, tuple[float, float]]] = field(default_factory=dict)

    def rows(self, name: str, rows: Rows, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """A tensor that changes, in row blocks; ``dtype``: that of the base's."""
        fold = self.folds[name]
        settled = self._settled(rows) if fold.replay or fold.correct else None
        correction = self._correction(name, rows, fold.correct, settled) if fold.correct else None

        def made(start: int, stop: int) -> torch.Tensor:
            found = self._folded(name, rows, slice(start, stop), settled, correction)
            changed = fold.lora_a or fold.correct
            return dithered(found, f"{name}:{start}") if changed and dtype == torch.bfloat16 else found.to(dtype)

        return self._side_by_side(made, rows)

    def whole(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """One tensor that is in memory already: the same numbers."""
        if name not in self.folds:
            return value
        rows = Rows(shape=tuple(value.shape), read=lambda start, stop: value[start:stop])
        return torch.cat(list(self.rows(name, rows, value.dtype)))

    def relative_changes(self) -> dict[str, float]:
        """‖W′ − W‖ / ‖W‖ of each tensor that the adapter changes and that was folded, W being what it was added to."""
        found = {}
        for name, blocks in self._norms.items():
            change, base = (math.hypot(*norms) for norms in zip(*(blocks[at] for at in sorted(blocks)), strict=True))
            found[name] = float(f"{change / base:.4g}") if base else 0.0
        return found

    def unknown(self) -> list[str]:
        """Tensors whose change is not known, since they have not been folded."""
        return [name for name, fold in self.folds.items() if (fold.lora_a or fold.rows) and name not in self._norms]

    def _folded(
        self, name: str, rows: Rows, at: slice, settled: torch.Tensor | None, correction: Pair | None
    ) -> torch.Tensor:
        """Rows of a base tensor with their share of the adapter, fp32."""
        fold = self.folds[name]
        if fold.replacement:
            return self.weights[fold.replacement][at].float()
        block = rows.read(at.start, at.stop)
        if fold.replay:
            block = self._replayed(block, at.start, settled)
        block = block.to(torch.float32, copy=True)
        if correction is not None:
            block.addmm_(correction[0][at], correction[1])
        if not (fold.lora_a or fold.rows):
            return block
        norm = float(torch.linalg.vector_norm(block))
        change, after = _updated(block, at, fold, self.weights)
        self._norms.setdefault(name, {})[at.start] = change, norm
        return after

    def _replayed(self, block: torch.Tensor, start: int, settled: torch.Tensor | None) -> torch.Tensor:
        """Base rows from ``start`` on, as they acted in training."""
        block = self._held(block)
        word = self.form.weights
        if not forms.is_packed(word):
            return block
        return forms.get(word).replay(word, block, double=self.form.double, start=start, settled=settled)

    def _correction(self, name: str, rows: Rows, rank: int, settled: torch.Tensor | None) -> Pair:
        """Quantisation's change of a matrix, at a low rank: B [out, rank], A [rank, in], fp32.

        Its nearest one (Eckart and Young 1936) by a randomised SVD (Halko et al. 2011, algorithms 4.4 and 5.1), whose
        draw hangs on the name alone. Holds the matrix in fp32 once.
        """
        change = torch.empty(rows.shape)
        for start, stop in rows.bounds():
            block = rows.read(start, stop)
            change[start:stop] = self._replayed(block, start, settled).float() - block.float()
        rank = min(rank, *rows.shape)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_seed(name) >> 65)
            u, values, v = torch.svd_lowrank(change, q=min(rank + 8, *rows.shape), niter=2)
        return u[:, :rank] * values[:rank], v[:, :rank].T.contiguous()

    def _held(self, block: torch.Tensor) -> torch.Tensor:
        """Base rows in the dtypes that they went through at loading."""
        compute = DTYPES[self.form.compute]
        return block.to(DTYPES.get(self.form.weights, compute)).to(compute)

    def _settled(self, rows: Rows) -> torch.Tensor | None:
        """What quantising a part must know of the whole tensor."""
        word = self.form.weights
        if word not in forms.MEASURED:
            return None
        form = forms.measured(word)
        found = self._side_by_side(lambda start, stop: form.measure(self._held(rows.read(start, stop))), rows)
        return form.settle(torch.cat(list(found)), double=self.form.double)

    def _side_by_side(self, made: Callable[[int, int], torch.Tensor], rows: Rows) -> Iterator[torch.Tensor]:
        """The row blocks in their order, a few of them ahead of who takes them."""
        waiting: deque[Future[torch.Tensor]] = deque()
        for start, stop in rows.bounds():
            if self.pool is None:
                yield made(start, stop)
                continue
            waiting.append(self.pool.submit(made, start, stop))
            if len(waiting) > 2 * WORKERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
