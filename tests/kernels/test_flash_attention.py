from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

from finetune.kernels import flash_attention, varlen_attention

# What a card computes is in tests/test_gpu.py; here, how the trial answers whatever the interface does.
CPU = torch.device("cpu")


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, *_: Any, **how: Any) -> torch.Tensor:
    states = (one.transpose(0, 1)[None] for one in (q, k, v))
    return varlen_attention.reference(*states, tuple(starts.tolist()), how["scale"])[0].transpose(0, 1)


def rescaled(*given: Any, scale: float, **how: Any) -> torch.Tensor:
    return exact(*given, scale=1.2 * scale, **how)


def mixing(q: Any, k: Any, v: Any, starts: torch.Tensor, *rest: Any, **how: Any) -> torch.Tensor:
    return exact(q, k, v, starts[[0, 2]], *rest, **how)


def without_gradients(*given: Any, **how: Any) -> torch.Tensor:
    return exact(*given, **how).detach() + 0 * given[0]


def older(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return q


def refusing(*given: Any, **how: Any) -> torch.Tensor:
    raise RuntimeError("no kernel image is available for execution on the device")


@pytest.mark.parametrize(
    ("interface", "taken"),
    [(exact, True), (rescaled, False), (mixing, False), (without_gradients, False), (older, False), (refusing, False)],
)
def test_it_is_taken_only_where_it_agrees(
    interface: Callable[..., torch.Tensor], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("torch.nn.attention.varlen")
    module.varlen_attn = interface  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert flash_attention.agrees(CPU, torch.bfloat16, 4, 2, 16) == taken


def test_not_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    assert not flash_attention.agrees(CPU, torch.bfloat16, 4, 2, 16)


def test_not_on_a_processor_nor_in_fp32() -> None:
    assert not flash_attention.works(CPU, torch.bfloat16, 4, 2, 16)
    assert not flash_attention.works(torch.device("cuda"), torch.float32, 4, 2, 16)
