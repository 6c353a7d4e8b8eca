"""Predicted against measured: the committed record of the plan's grid, planned again with the formulas of today."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmarks import calibration
from benchmarks.calibration import Judged
from finetune import budget, speed
from tests.conftest import ROOT

RECORD: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / "plan-cpu.json").read_text())
MEMORY, TIME = 0.10, 0.25


def _off() -> tuple[list[str], list[str]]:
    """Points beyond the bounds, in memory and in time."""
    judged = calibration.judge(RECORD)
    memory = [one.line() for one in judged if abs(one.memory - 1) > MEMORY]
    return memory, [one.line() for one in judged if abs(one.time - 1) > TIME]


def _needs_rest() -> None:
    if not calibration.resting(RECORD):
        pytest.skip(
            "the record was taken beside other work: the same step took up to 1.7 times as long from run to run"
        )


def test_the_memory_of_every_point_is_predicted() -> None:
    memory, _ = _off()
    assert not memory, "\n".join(memory)


def test_the_time_of_every_point_is_predicted() -> None:
    _needs_rest()
    _, time = _off()
    assert not time, "\n".join(time)


def test_the_grid_is_wide() -> None:
    points = {one["name"] for one in RECORD["points"]}
    assert len(points) >= 20
    for word in (
        "tiny",
        "small",
        "large",
        "135M",
        "nf4",
        "bf16",
        "fp32",
        "512",
        "4096",
        "recomputed",
        "without kernels",
    ):
        assert any(word in name for name in points), word
    some = [one for one in calibration.judge(RECORD) if "GB" in one.name]
    assert all(isinstance(one, Judged) for one in some)
    assert len(some) >= 2


def test_a_plan_for_less_memory_stays_within_it() -> None:
    """``memory_given`` is what is free beside the process itself, which is there before anything is planned."""
    given = [one for one in RECORD["points"] if one["memory_given"]]
    assert given
    for one in given:
        used = one["measured"]["training_peak"] - one["measured"]["prepared"]
        assert used <= one["memory_given"] * 1e9, one["name"]


@pytest.mark.parametrize(
    ("module", "name", "wrong", "which"),
    [
        (budget, "_PROCESS", {"cpu": 0.25e9}, 0),
        (budget, "_COMPILED", 0.6e9, 0),
        (budget, "_HOLES_KEPT", {"bf16": 0.9, "fp32": 0.75}, 0),
        (speed, "_COST", {**speed._COST, "moved": 2 * speed._COST["moved"]}, 1),
        (speed, "_COST", {**speed._COST, "products": 2 * speed._COST["products"]}, 1),
    ],
)
def test_a_wrong_constant_is_seen(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, wrong: Any, which: int
) -> None:
    if module is speed:
        _needs_rest()
    monkeypatch.setattr(module, name, wrong)
    assert _off()[which]
