"""``finetune plan --probe``: two real steps, nothing left behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from finetune import model, speed
from finetune.objectives import sft
from tests import runs


def test_two_steps_correct_the_plan(work: Path) -> None:
    before = runs.snapshot(work)
    said = runs.finetune("plan", "r.yaml", "--probe", "--json")
    assert said.code == 0, said.err
    made = json.loads(said.out)
    found = made["probe"]
    assert 0 < found["tokens"] <= made["micro_batch_tokens"]
    assert found["measured_memory"] > 1e8  # the whole process, on a machine without a card
    assert found["measured_seconds"] > 0
    difference = found["measured_memory"] - found["predicted_memory"]
    assert found["corrected_memory"] == made["memory"] + difference
    ratio = found["measured_seconds"] / found["predicted_seconds"]
    assert found["corrected_seconds"] == pytest.approx(made["seconds"] * ratio)
    assert runs.snapshot(work) == before
    said = runs.finetune("plan", "r.yaml", "--probe")
    assert "measured" in said.out
    assert "heaviest micro-batch" in said.out


def test_the_heaviest_micro_batch_is_the_one_that_is_tried(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = sft.loss

    def loss(policy: model.Policy, batch: sft.Batch) -> sft.StepLoss:
        seen.append(batch.tokens)
        return real(policy, batch)

    monkeypatch.setattr(sft, "loss", loss)
    said = runs.finetune("plan", "r.yaml", "--probe", "--json", "--set", "train.micro_batch_tokens=128")
    made = json.loads(said.out)
    assert seen == [made["probe"]["tokens"]] * 2
    monkeypatch.undo()
    monkeypatch.chdir(work)
    assert runs.train("train.micro_batch_tokens=128").code == 0
    longest = max(line["tokens"] for line in runs.metrics())
    assert made["probe"]["tokens"] <= longest


def test_a_model_elsewhere_cannot_be_probed(work: Path) -> None:
    said = runs.finetune("plan", "r.yaml", "--probe", "--set", "model=Qwen/Qwen2.5-14B")
    assert said.code == 4
    assert said.err.startswith("model: Qwen/Qwen2.5-14B: the weights are not on this disk; ")
    said = runs.finetune("plan", "r.yaml", "--probe", "--card", "24")
    assert said.code == 2
    assert "leave --card and --processes out" in said.err


def test_a_probe_without_memory_says_so(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(sft, "loss", full)
    said = runs.finetune("plan", "r.yaml", "--probe")
    assert said.code == 5
    assert "the heaviest micro-batch: out of memory: CUDA out of memory. Tried to allocate 2 GiB." in said.err


def test_time_without_a_rate_is_unknown(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "training_seconds", lambda *_: None)
    said = runs.finetune("plan", "r.yaml", "--probe")
    assert said.code == 0, said.err
    assert "unknown predicted" in said.out
