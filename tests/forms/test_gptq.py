"""GPTQ's layout: numbers by hand, GPTQModel's own, and settings that are another layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune import forms
from finetune.decoder import Packing
from finetune.errors import ModelError
from finetune.forms import gptq
from tests import packing

LIBRARIES = Path(__file__).parent / "packed" / "libraries.safetensors"
"""Packed and dequantised by gptqmodel 7.7.0 and autoawq 0.2.9 (packed/make.py)."""


def plan(group: int, *, biased: bool = False) -> Packing:
    return Packing(kind="gptq", group=group, biased_zeros=biased)


def test_numbers_by_hand() -> None:
    """Eight outputs of eight inputs in one group: word o of qweight is output o, its lowest bits the first input."""
    words = [0x76543210, 0x0FEDCBA9, 0, 0x11111111, 0x22222222, 0x33333333, 0x44444444, 0x55555555]
    parts = {
        "qweight": torch.tensor([words], dtype=torch.int32),
        "qzeros": torch.tensor([[0x07070701]], dtype=torch.int32),
        "scales": torch.tensor([[0.5, 1.0, 2.0, 0.25, 1.0, 1.0, 1.0, 1.0]], dtype=torch.float16),
        "g_idx": torch.zeros(8, dtype=torch.int32),
    }
    found = gptq.read(parts.__getitem__, plan(8)).dense(torch.float32)
    assert found[0].tolist() == [(code - 1) * 0.5 for code in range(8)]
    assert found[1].tolist() == [9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 0.0]  # zero 0
    assert found[2].tolist() == [-14.0] * 8  # zero 7
    assert found[3].tolist() == [0.25] * 8  # zero 0
    # In the first format every zero is stored less one.
    first = gptq.read(parts.__getitem__, plan(8, biased=True)).dense(torch.float32)
    assert first[0].tolist() == [(code - 2) * 0.5 for code in range(8)]
    assert first[3].tolist() == [0.0] * 8


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("case", ["sym", "asym", "act"])
def test_it_is_what_gptqmodel_makes_of_its_own_parts(case: str, version: str) -> None:
    """In fp16, to the bit; among them zeros of 0, which the first format stores with a borrow."""
    theirs = {
        name.removeprefix(f"gptq.{case}."): value
        for name, value in load_file(LIBRARIES).items()
        if name.startswith(f"gptq.{case}.")
    }
    dense = theirs.pop("dense")
    if version == "gptq":
        theirs["qzeros"] = theirs["qzeros_v1"]
    held = gptq.read(theirs.__getitem__, plan(16, biased=version == "gptq"))
    assert (held.groups is None) == (case != "act")
    assert bool((held.zeros == 0).any()) == (case != "sym")
    assert torch.equal(held.dense(torch.float16), dense)


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [-1, 16, 48])
def test_what_was_packed_comes_out(group: int, symmetric: bool, shuffled: bool, version: str) -> None:
    """48 does not go into 64: the last group is shorter."""
    chance = torch.Generator().manual_seed(group)
    order = torch.randperm(64, generator=chance) if shuffled else None
    weight = torch.randn(24, 64, generator=chance)
    found = packing.round_to_nearest(weight, group, symmetric=symmetric, order=order)
    parts = packing.gptq(found, version=version)
    wanted = gptq.parts(24, 64, plan(max(group, 0)))
    assert {name: tuple(value.shape) for name, value in parts.items()} == {
        name: shape for name, (_, shape) in wanted.items()
    }
    held = gptq.read(parts.__getitem__, plan(max(group, 0), biased=version == "gptq"))
    assert torch.equal(held.dense(torch.float32).double(), found.dense())
    torch.testing.assert_close(found.dense(), weight.double(), atol=0.6, rtol=0)  # and it is that weight, rounded


_GOOD = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bits": 3}, "bits is 3"),
        ({"bits": 8}, "bits is 8"),
        ({"bits": None}, "bits is None"),
        ({"group_size": 0}, "group_size is 0"),
        ({"group_size": "128"}, "group_size is '128'"),
        ({"group_size": True}, "group_size is True"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({"checkpoint_format": ["gptq"]}, "checkpoint_format is"),
        ({"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
        ({"dynamic": {"-:.*down.*": {}}}, "dynamic"),
        ({"lm_head": True}, "head is packed"),
        ({"quant_method": "hqq"}, "gptq and awq are read"),
        ({"quant_method": ["gptq"]}, "gptq and awq are read"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_another_layout_is_refused_with_what_it_is(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match="quanti") as caught:
        forms.packing_of({"model_type": "qwen2", "quantization_config": _GOOD | changes}, "config.json")
    assert said in caught.value.faults[0].what


def test_settings_that_are_read() -> None:
    def of(**changes: Any) -> Packing | None:
        return forms.packing_of({"model_type": "qwen2", "quantization_config": _GOOD | changes}, "config.json")

    assert of() == plan(128, biased=True)
    assert of(checkpoint_format="gptq_v2", group_size=-1) == plan(0)
    assert forms.packing_of({"model_type": "qwen2"}, "config.json") is None
