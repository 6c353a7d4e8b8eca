"""A step that runs out of memory: one notch at a time, written down, and the same bits when the run goes on.

The shortage is planted (a real torch.OutOfMemoryError inside a real step, on a CPU); no card has been seen to run out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import checkpoint, fallback
from finetune.checkpoint import folder_name
from finetune.fallback import Setting
from finetune.objectives import sft
from tests import runs
from tests.runs import OUTPUT, train

FULL = 140
"""More tokens than this do not fit: of the four samples of a step all have more, three have less."""
Plant = Callable[..., list[int]]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """``plant(tokens, since)``: from the given micro-batch on, one with more tokens runs out of memory half-way."""
    real = sft.loss

    def planted(tokens: int, since: int = 0) -> list[int]:
        seen: list[int] = []

        def loss(policy: Any, batch: Any) -> Any:
            if policy.model.training:
                seen.append(batch.tokens)
                if len(seen) > since and batch.tokens > tokens:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore words")
            return real(policy, batch)

        monkeypatch.setattr(sft, "loss", loss)
        return seen

    return planted


def _fallbacks(folder: Path = OUTPUT) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "identity.json").read_text())["resolved"].get("fallbacks", [])
    return found


def test_notches_go_from_cheap_to_dear_and_end() -> None:
    setting: Setting | None = Setting(recompute="none", recomputed_layers=0, micro_batch_tokens=1000)
    said = []
    while setting is not None:
        said.append((setting.recompute, setting.recomputed_layers, setting.micro_batch_tokens))
        setting = setting.lighter(layers=5, longest=300)
    assert said == [
        ("none", 0, 1000), ("layers", 3, 1000), ("layers", 4, 1000), ("layers", 5, 1000), ("offload", 5, 1000),
        ("offload", 5, 500), ("offload", 5, 300),
    ]  # fmt: skip


def test_a_step_without_memory_is_taken_again_with_less(work: Path, plant: Plant) -> None:
    assert train("output=runs/free").code == 0
    plant(FULL, since=5)
    said = train()
    assert said.code == 0, said.err
    assert "ran out of memory (CUDA out of memory. Tried to allocate 2 GiB.): from it on" in said.out
    found = _fallbacks()
    assert found[-1]["recompute"] == "offload"
    assert found[-1]["micro_batch_tokens"] == 128  # half of 256, and no less than the longest sample
    assert len({one["step"] for one in found}) == 1  # all notches at one step, the last one holds
    (step,) = {one["step"] for one in found}
    assert 1 < step <= 6
    # Nothing of the failed tries was applied: the curve is that of a run with memory, to rounding.
    for one, free in zip(runs.curve(), runs.curve(Path("runs/free")), strict=True):
        assert one[0] == free[0]
        assert one[1:3] == pytest.approx(free[1:3], rel=1e-4)
        assert one[4:] == free[4:]
    assert runs.curve()[: step - 1] == runs.curve(Path("runs/free"))[: step - 1]


def test_going_on_keeps_what_the_run_fell_back_to(work: Path, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(FULL, since=5)
    assert train("train.keep_last=9").code == 0
    digest, curve, found = runs.adapter_digest(), runs.curve(), _fallbacks()
    monkeypatch.undo()
    monkeypatch.chdir(work)
    # As after a kill: at the checkpoint before it fell back, and at one after; nothing runs out of memory any more.
    for step in (2, 4):
        other = Path(f"runs/killed-{step}")
        saved = _checkpoint_of(step)
        shutil.copytree(OUTPUT, other)
        shutil.rmtree(other / "checkpoints")
        shutil.copytree(saved, other / "checkpoints" / folder_name(step))
        for gone in ("finished.json", "scores.json", "samples.jsonl"):
            (other / gone).unlink()
        shutil.rmtree(other / "adapter")
        said = train("train.keep_last=9", f"output={other}")
        assert said.code == 0, said.err
        assert f"going on after step {step}" in said.out
        assert (runs.adapter_digest(other), runs.curve(other), _fallbacks(other)) == (digest, curve, found)


def test_nothing_of_the_failed_try_is_left(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a step's gradient is there when its second micro-batch runs out of memory."""
    two = "train.micro_batch_tokens=128"
    assert train(two, "output=runs/free").code == 0
    real, calls = sft.loss, iter(range(1, 1000))

    def loss(policy: Any, batch: Any) -> Any:
        if policy.model.training and next(calls) == 6:  # the second of the third step
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(policy, batch)

    monkeypatch.setattr(sft, "loss", loss)
    said = train(two)
    assert said.code == 0, said.err
    assert "step 3 ran out of memory (CUDA out of memory.): from it on 1 layers recomputed" in said.out
    assert [(one["step"], one["recomputed_layers"]) for one in _fallbacks()] == [(3, 1)]
    assert runs.curve() == runs.curve(Path("runs/free"))  # what is recomputed has the same bits
    assert runs.adapter_digest() == runs.adapter_digest(Path("runs/free"))


def _checkpoint_of(step: int) -> Path:
    return OUTPUT / "checkpoints" / folder_name(step)


def test_a_run_that_goes_on_may_fall_back_earlier(work: Path, plant: Plant) -> None:
    plant(FULL, since=5)
    assert train("train.keep_last=9").code == 0
    assert min(one["step"] for one in _fallbacks()) > 1
    shutil.rmtree(OUTPUT / "checkpoints")
    (OUTPUT / "finished.json").unlink()
    plant(FULL)
    assert train("train.keep_last=9").code == 0
    assert {one["step"] for one in _fallbacks()} == {1}


def test_with_nothing_left_it_says_so_and_keeps_what_is_saved(work: Path, plant: Plant) -> None:
    plant(0, since=5)
    said = train("train.save_every=1")
    assert said.code == 5
    assert "out of memory: CUDA out of memory. Tried to allocate 2 GiB." in said.err
    assert "lower train.max_length" in said.err
    last = checkpoint.newest(OUTPUT / "checkpoints", print)
    assert last is not None
    assert last.step == len(runs.metrics()) >= 1


def test_an_optimizer_without_memory_is_not_asked_twice(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some of its tensors may have been moved: taking the step again would move them twice."""

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.optim.AdamW, "step", full)
    said = train()
    assert said.code == 5
    assert "step 1: out of memory in the optimizer" in said.err
    assert not _fallbacks()


def test_each_step_finds_its_setting() -> None:
    plain = {"recompute": "none", "recomputed_layers": 0, "micro_batch_tokens": 64}
    less, least = ({"step": step, **plain, "micro_batch_tokens": tokens} for step, tokens in ((3, 32), (5, 16)))
    resolved = plain | {"compute": "fp32", "fallbacks": [less, least]}
    found = [fallback.at(resolved, step, 8) for step in range(8)]
    assert [setting.micro_batch_tokens for setting, _ in found] == [64, 64, 32, 32, 16, 16, 16, 16]
    assert [until for _, until in found] == [2, 2, 4, 4, 8, 8, 8, 8]
