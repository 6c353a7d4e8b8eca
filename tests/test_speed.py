"""What a course consists of, added up, and how predicted time follows it."""

from __future__ import annotations

from typing import Any

import pytest

from finetune import known_models, plan, recipe, speed
from finetune.budget import Load, Need
from finetune.decoder import DecoderShape
from finetune.hardware import Hardware
from tests.conftest import ROOT

LOAD = Load(
    lengths=[100, 300, 50, 700], supervised=[40, 100, 20, 300], evaluations=2, evaluated_tokens=1000,
    generated_rows=10, prompt_tokens=500, longest_prompt=80,
)  # fmt: skip
CPU = Hardware(
    device="cpu", name="a CPU", memory=2**36, free_memory=2**36, bf16=True, threads=2, instruction_set="-", flops=1e12,
    flops_fp32=1e11, bandwidth=2e10,
)  # fmt: skip


def _need(machine: Hardware, *overrides: str, load: Load = LOAD) -> Need:
    known = known_models.find("Qwen/Qwen2.5-14B")
    assert known is not None
    located = recipe.locate(ROOT / "recipes" / "qwen2.5-14b-qlora-24gb.yaml", overrides)
    return plan.need_of(located, DecoderShape.from_known(known), machine, load, None)


def _seconds(need: Need, layers: int = 0, micro: int = 1024) -> float:
    found = speed.training_seconds(need, layers, speed.work([(0, 1), (2, 3)], LOAD, micro))
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_course_is_added_up() -> None:
    done = speed.work([(0, 1), (2, 3)], LOAD, 350)
    assert (done.steps, done.passes, done.tokens, done.supervised) == (2, 4, 1150, 460)
    assert done.squares == 100**2 + 300**2 + 50**2 + 700**2
    assert (done.heaviest.tokens, done.heaviest.supervised, done.heaviest.longest) == (700, 300, 700)
    assert done.samples == (3,)
    together = speed.work([(0, 1), (2, 3)], LOAD, 1000)
    assert (together.passes, together.heaviest.tokens, together.samples) == (2, 750, (2, 3))


def test_a_long_course_is_known_by_a_share_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = [(0, 1), (2, 3)] * 50
    whole = speed.work(steps, LOAD, 1000)
    monkeypatch.setattr(speed, "_MOST_PACKED", 70)
    part = speed.work(steps, LOAD, 1000)
    assert part.steps == whole.steps
    assert part.passes == pytest.approx(whole.passes)
    assert part.heaviest.tokens >= whole.heaviest.tokens


def test_what_takes_longer_is_predicted_to() -> None:
    plain = _seconds(_need(CPU))
    assert _seconds(_need(CPU), layers=48) > 1.2 * plain
    assert _seconds(_need(CPU, "train.kernels=off")) > plain
    assert _seconds(_need(CPU, "quantize.weights=fp32")) > 2 * plain
    assert _seconds(_need(CPU), micro=100) > plain


def test_judging_counts() -> None:
    done = speed.work([(0, 1), (2, 3)], LOAD, 1024)
    need = _need(CPU, "evaluate.metrics=[loss]")
    with_answers = _need(CPU, "evaluate.metrics=[loss, exact_match]")
    training = speed.training_seconds(need, 0, done) or 0.0
    loss, answers = (speed.seconds(one, 0, done) or 0.0 for one in (need, with_answers))
    assert training < loss < answers


def test_without_a_rate_there_is_no_time() -> None:
    unknown: dict[str, Any] = CPU.to_dict() | {"flops": None, "device": "cuda"}
    assert speed.seconds(_need(Hardware(**unknown)), 0, speed.work([(0,)], LOAD, 1024)) is None
