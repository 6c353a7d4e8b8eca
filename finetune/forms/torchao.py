"""int8 by torchao, weights only: one scale for each row, made as full-precision weights are read.

torchao quantises; its codes and scales are taken out of its tensor, whose own dispatch PEFT, autograd and the fused
kernels would each meet in their own way. A row depends on nothing but itself, so a merge may go row block by row block.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from finetune.decoder import DecoderShape
from finetune.errors import EnvironmentFault


@dataclass(frozen=True, kw_only=True)
class RowInt8:
    """A matrix [out, in]. codes: int8 [out, in]; scales: [out, 1]."""

    codes: torch.Tensor
    scales: torch.Tensor

    slow = False

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """code · scale in fp32, rounded once, as torchao dequantises."""
        return (self.codes.float() * self.scales.float()).to(dtype)


def pack(weight: torch.Tensor) -> RowInt8:
    """A weight [out, in] on its device, in the compute dtype."""
    refuse_missing("quantize.weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of binary extensions for cards that it does not find, and of torch's names
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

    # bias=False: a row of the weight is all that counts. set_inductor_config would change torch for the whole process.
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
    holder = torch.nn.Sequential(linear)
    quantize_(holder, Int8WeightOnlyConfig(set_inductor_config=False))
    made: Any = linear.weight
    return RowInt8(codes=made.qdata, scales=made.scale)


def bytes_per_weight(word: str, shape: DecoderShape, *, double: bool, device: str) -> float:
    return 1.0 + 4 / shape.hidden


def refuse_missing(where: str) -> None:
    if importlib.util.find_spec("torchao") is None:
        what, fix = "torchao is not installed", "pip install 'finetune-qwen[torchao]', or take quantize.weights: int8"
        raise EnvironmentFault(what, where, fix)


def replay(
    word: str, block: torch.Tensor, *, double: bool, start: int = 0, settled: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows of a weight, quantised anew and dequantised."""
    return pack(block).dense(block.dtype)
