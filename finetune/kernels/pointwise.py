"""The parts of a layer that work number by number, as torch runs them or as ``torch.compile`` does."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch

from finetune.errors import EnvironmentFault
from finetune.kernels import rms_norm, rope, swiglu


@dataclass(frozen=True, kw_only=True)
class Pointwise:
    """One function each, with the arguments of the plain one that is its default."""

    norm: Callable[..., Any] = rms_norm.forward
    norm_backward: Callable[..., Any] = rms_norm.backward
    product: Callable[..., Any] = swiglu.forward
    product_backward: Callable[..., Any] = swiglu.backward
    turned: Callable[..., Any] = rope.turned


PLAIN = Pointwise()


@functools.cache
def compiled() -> Pointwise:
    """Compiled once for all numbers of tokens; the first steps take longer.

    Raises:
        EnvironmentFault: torch.compile does not work on this machine.
    """
    plain: dict[str, Any] = {one.name: one.default for one in fields(Pointwise)}
    made = Pointwise(**{name: torch.compile(function, dynamic=True) for name, function in plain.items()})
    try:
        made.product(torch.ones(2, 4), torch.ones(2, 4))
    except Exception as error:  # noqa: BLE001 - each back end has its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fix = "install a C++ compiler (or Triton on a card), or set train.compile to false"
        raise EnvironmentFault(f"torch.compile does not work here: {reason}", "train.compile", fix) from None
    return made
