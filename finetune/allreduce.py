"""Gradients, summed over the processes of a job: in few large pieces, the same bits on every process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from finetune.errors import EnvironmentFault

_BUCKET = 64 * 1024 * 1024
"""Numbers of the gradient that are summed in one piece."""


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Every parameter's gradient becomes the sum of all processes'; one without a gradient gives zeros.

    Raises:
        RuntimeError: another process is gone.
        EnvironmentFault: out of memory; the others are in the middle of the sum, so that the step cannot be repeated.
    """
    try:
        for part in _buckets(parameters):
            _sum(part)
    except torch.OutOfMemoryError as error:
        what = f"out of memory while gradients were summed: {str(error).splitlines()[0][:200]}"
        raise EnvironmentFault(what, "", "set train.micro_batch_tokens lower") from None


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters of one kind and place, so many at a time."""
    kinds: dict[Any, list[torch.nn.Parameter]] = {}
    for one in parameters:
        part = kinds.setdefault((one.dtype, one.device), [])
        if part and sum(other.numel() for other in part) + one.numel() > _BUCKET:
            yield part
            part = kinds[one.dtype, one.device] = []
        part.append(one)
    yield from kinds.values()


def _sum(parameters: Sequence[torch.nn.Parameter]) -> None:
    grads = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    for one, part in zip(parameters, torch.split(flat, [one.numel() for one in parameters]), strict=True):
        one.grad = part.view_as(one).clone()
