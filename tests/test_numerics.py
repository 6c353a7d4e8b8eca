"""The doctor's numerics: all checks hold here, and each planted fault turns its own check red."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import base as bases
from finetune import checkpoint, merge, numerics, schedule
from finetune.base import Base
from finetune.dataset import Example
from finetune.kernels import lora_linear, varlen_attention
from finetune.loading import BaseForm
from finetune.numerics import Check
from tests.runs import finetune

FP32 = BaseForm(weights="fp32", double=True, compute="fp32", device="cpu")
NF4 = BaseForm(weights="nf4", double=True, compute="fp32", device="cpu")
Patch = pytest.MonkeyPatch


@pytest.fixture
def base(tiny_base: Path) -> Base:
    return bases.inspect(tiny_base)


def test_everything_holds_here_and_nothing_is_left(tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    monkeypatch.chdir(tmp_path)
    said = finetune("doctor", "--numerics", "--json", "--quiet")
    found = json.loads(said.out)
    assert (said.code, found["holds"], said.err) == (0, True, "")
    checks = found["numerics"]
    assert {one["name"] for one in checks} == {"accumulation", "packing", "kernels", "resume", "merge"}
    assert {"fp32", "nf4/fp32"} <= {one["form"] for one in checks}
    for one in checks:
        assert 0 <= one["measured"] <= one["bound"]
        assert one["bound"] > 0 or one["name"] == "resume"
    assert not any((tmp_path / "scratch").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]


def red(checks: list[Check]) -> set[str]:
    return {one.name for one in checks if not one.holds}


def _scaled_merge(patch: Patch) -> None:
    real = merge._scaling
    patch.setattr(merge, "_scaling", lambda *given: 1.1 * real(*given))


def _scaled_kernels(patch: Patch) -> None:
    real = lora_linear.forward

    def forward(x: torch.Tensor, sites: Any, ab: Any) -> Any:
        outputs, inner = real(x, sites, ab)
        return [output * 1.001 for output in outputs], inner

    patch.setattr(lora_linear, "forward", forward)


def _samples_that_see_each_other(patch: Patch) -> None:
    real = varlen_attention.lay_out
    patch.setattr(
        varlen_attention, "lay_out", lambda bounds, *more: real((bounds[0], bounds[-1]), *more) if bounds else None
    )


def _a_row_lost_in_packing(patch: Patch) -> None:
    real = schedule.pack
    patch.setattr(schedule, "pack", lambda lengths, limit: real(lengths, limit)[:7])


def _moments_lost(patch: Patch) -> None:
    patch.setattr(checkpoint, "restore_optimizer", lambda *given: None)


def _a_bit_lost_on_the_way(patch: Patch) -> None:
    real = checkpoint.read

    def read(path: Path) -> checkpoint.Checkpoint:
        found = real(path)
        next(iter(found.weights.values())).view(-1)[0].mul_(1 + 2**-20)
        return found

    patch.setattr(checkpoint, "read", read)


PLANTED: list[tuple[str, Callable[[Patch], None]]] = [
    ("merge", _scaled_merge),
    ("kernels", _scaled_kernels),
    ("packing", _samples_that_see_each_other),
    ("accumulation", _a_row_lost_in_packing),
    ("resume", _moments_lost),
    ("resume", _a_bit_lost_on_the_way),
]


@pytest.mark.parametrize("form", [FP32, NF4], ids=["fp32", "nf4"])
@pytest.mark.parametrize(("name", "plant"), PLANTED, ids=[plant.__name__.strip("_") for _, plant in PLANTED])
def test_a_planted_fault_turns_its_check_red(
    base: Base, tmp_path: Path, monkeypatch: Patch, form: BaseForm, name: str, plant: Callable[[Patch], None]
) -> None:
    plant(monkeypatch)
    made = {
        "merge": lambda: [numerics.merged(base, form, tmp_path)],
        "resume": lambda: [numerics.resumed(base, form, tmp_path)],
    }.get(name, lambda: numerics.ways(base, form))()
    assert name in red(made)


def test_in_bf16_the_bound_is_the_references_own_distance(base: Base, monkeypatch: Patch) -> None:
    form = BaseForm(weights="nf4", double=True, compute="bf16", device="cpu")
    assert not red(numerics.ways(base, form))
    _samples_that_see_each_other(monkeypatch)
    assert "packing" in red(numerics.ways(base, form))


def test_a_step_that_fails_is_a_red_check_with_its_reason(base: Base, tmp_path: Path, monkeypatch: Patch) -> None:
    def damaged(folder: Path, say: Any) -> Iterator[Any]:
        from finetune.errors import ModelError

        raise ModelError("no checkpoint verifies", str(folder), "look")

    monkeypatch.setattr(checkpoint, "newest", damaged)
    found = numerics.resumed(base, FP32, tmp_path)
    assert not found.holds
    assert "no checkpoint verifies" in str(found)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["measured"] is None


def test_a_red_check_is_exit_code_1(monkeypatch: Patch) -> None:
    bad = Check(name="merge", form="fp32", what="…", measured=0.5, bound=1e-3)
    monkeypatch.setattr(numerics, "prove", lambda terminal: [bad])
    said = finetune("doctor", "--numerics")
    assert said.code == 1
    assert "fault  merge" in said.out
    assert not Check(name="merge", form="fp32", what="…", measured=float("nan"), bound=1e-3).holds


def test_samples_are_supervised_in_part() -> None:
    rows: list[Example] = numerics.samples((2, 9))
    assert [len(row.ids) for row in rows] == [2, 9]
    assert all(row.supervised[-1] and not row.supervised[0] for row in rows)
