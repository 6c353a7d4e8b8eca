"""AWQ's layout: numbers by hand, AutoAWQ's own, and settings that are another layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune import forms
from finetune.decoder import Packing
from finetune.errors import ModelError
from finetune.forms import awq
from tests import packing
from tests.forms.test_gptq import LIBRARIES


def plan(group: int) -> Packing:
    return Packing(kind="awq", group=group, biased_zeros=False)


def test_numbers_by_hand() -> None:
    """A word is one input of eight outputs: from the lowest bits on the outputs 0 2 4 6 1 3 5 7."""
    parts = {
        "qweight": torch.tensor([[0x76543210], [0x11111111]], dtype=torch.int32),
        "qzeros": torch.tensor([[0x10000002]], dtype=torch.int32),
        "scales": torch.ones(1, 8, dtype=torch.float16),
    }
    found = awq.read(parts.__getitem__, plan(2)).dense(torch.float32)
    assert found[:, 0].tolist() == [0 - 2, 4, 1, 5, 2, 6, 3, 7 - 1]
    assert found[:, 1].tolist() == [1 - 2, 1, 1, 1, 1, 1, 1, 1 - 1]


def test_it_is_what_autoawq_makes_of_its_own_parts() -> None:
    """In fp16, to the bit."""
    theirs = {name.removeprefix("awq."): value for name, value in load_file(LIBRARIES).items() if "awq." in name}
    dense = theirs.pop("dense")
    assert torch.equal(awq.read(theirs.__getitem__, plan(16)).dense(torch.float16), dense)


@pytest.mark.parametrize("group", [-1, 16, 32])
def test_what_was_packed_comes_out(group: int) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(group))
    found = packing.round_to_nearest(weight, group, symmetric=False, order=None)
    parts, wanted = packing.awq(found), awq.parts(24, 64, plan(max(group, 0)))
    assert {name: tuple(value.shape) for name, value in parts.items()} == {
        name: shape for name, (_, shape) in wanted.items()
    }
    held = awq.read(parts.__getitem__, plan(max(group, 0)))
    assert torch.equal(held.dense(torch.float32).double(), found.dense())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 3}, "bits is 3"),
        ({"version": "gemv"}, "version is 'gemv'"),
        ({"zero_point": False}, "zero_point is False"),
        ({"group_size": 7}, "group_size is 7"),
    ],
    ids=str,
)
def test_another_layout_is_refused_with_what_it_is(changes: dict[str, Any], said: str) -> None:
    good = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "GEMM"}
    assert forms.packing_of({"quantization_config": good}, "config.json") == plan(128)
    with pytest.raises(ModelError) as caught:
        forms.packing_of({"quantization_config": good | changes}, "config.json")
    assert said in caught.value.faults[0].what


def test_a_width_that_groups_do_not_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="groups of 48"):
        awq.parts(24, 64, plan(48))
