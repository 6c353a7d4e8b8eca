"""What is said of transformers' Trainer, against transformers itself; and shares that become steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from finetune import hftrainer, schedule
from finetune.foreign import Course, Draft, Place, Settings


def draft(**values: Any) -> Draft:
    place = Place(columns=lambda _: None, reach=lambda _: None)
    settings = Settings(trainer="trl", file=Path("c.yaml"), values=values, place=place)
    made = Draft(settings=settings, version="x")
    hftrainer.course(made, hftrainer.Names(), packed=None)
    return made


def becomes(made: Draft, key: str) -> Any:
    return made.lines[key][0]


def rates(kind: str, warmup: int, total: int) -> list[float]:
    """The rate of each step, from transformers."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    found = []
    for _ in range(total):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("kind", list(hftrainer.SCHEDULES))
def test_schedules_are_theirs_behind_the_warm_up(kind: str) -> None:
    ours = hftrainer.SCHEDULES[kind]
    warmup = 0 if kind == "constant" else 3
    mine = [schedule.learning_rate(step, total=12, peak=1.0, warmup=warmup, kind=ours) for step in range(12)]
    theirs = rates(kind, 3, 12)
    assert mine[warmup:] == pytest.approx(theirs[warmup:], abs=1e-12)
    assert theirs[0] == (1.0 if kind == "constant" else 0.0)  # as the two remarks say
    if warmup:
        assert mine[: warmup - 1] == pytest.approx(theirs[1:warmup])  # the same rise, one step earlier


def test_defaults_are_transformers() -> None:
    from transformers import TrainingArguments

    fields = {
        field: TrainingArguments.__dataclass_fields__[field].default for field in TrainingArguments.__dataclass_fields__
    }
    names = hftrainer.Names()
    assert (names.batch_default, names.epochs_default, names.rate_default) == (
        fields["per_device_train_batch_size"], fields["num_train_epochs"], fields["learning_rate"],
    )  # fmt: skip
    assert (names.accumulation_default, names.decay_default, names.beta2_default) == (
        fields["gradient_accumulation_steps"], fields["weight_decay"], fields["adam_beta2"],
    )  # fmt: skip
    assert (fields["lr_scheduler_type"], fields["save_steps"], fields["seed"], fields["max_grad_norm"]) == (
        "linear", 500, 42, 1.0,
    )  # fmt: skip
    assert "warmup_ratio" not in fields


@pytest.mark.parametrize("rows", [1, 7, 24, 25, 100])
@pytest.mark.parametrize(("micro", "accumulation", "devices"), [(1, 1, 1), (2, 3, 1), (2, 2, 4)])
def test_the_number_of_steps_is_the_trainers(rows: int, micro: int, accumulation: int, devices: int) -> None:
    """By walking through two passes batch by batch, as the Trainer does."""
    steps = 0
    for _ in range(2):
        batches = math.ceil(rows / (micro * devices))
        taken = 0
        for batch in range(batches):
            taken += 1
            if taken == accumulation or batch == batches - 1:
                steps, taken = steps + 1, 0
    made = Course(
        micro=micro, accumulation=accumulation, devices=devices, steps=None, epochs=2, warmup=0,
        warmup_keys=("warmup_steps",), save=500, evaluate="no",
    )  # fmt: skip
    assert hftrainer.total_steps(made, rows) == steps
    made.passes = "filled"
    examples = micro * accumulation * devices
    ours = schedule.steps([5] * rows, 1, count=None, epochs=2, examples=examples, tokens=None)
    assert hftrainer.total_steps(made, rows) == len(ours)


@pytest.mark.parametrize(
    ("values", "rows", "warmup", "saves"),
    [
        ({"warmup_steps": 0.1}, 80, 3, 500),  # 30 steps
        ({"warmup_ratio": 0.1}, 80, 3, 500),
        ({"warmup_ratio": 0.1}, 88, 4, 500),  # 33 steps: rounded up
        ({"warmup_steps": 7, "warmup_ratio": 0.1}, 80, 7, 500),
        ({"max_steps": 50, "warmup_ratio": 0.1, "save_steps": 0.2}, None, 5, 10),
        ({"save_strategy": "epoch"}, 80, 0, 10),
        ({"save_strategy": "no"}, 80, 0, 50),
        ({"save_strategy": "epoch"}, None, 0, 50),
    ],
)
def test_shares_become_steps(values: dict[str, Any], rows: int | None, warmup: int, saves: int) -> None:
    made = draft(**values)
    hftrainer.settle(made, rows)
    assert (becomes(made, "train.warmup"), becomes(made, "train.save_every")) == (warmup, saves)
    assert not made.settings.faults


def test_a_share_of_unknown_steps_is_said_and_not_guessed() -> None:
    made = draft(warmup_ratio=0.1)
    hftrainer.settle(made, None)
    assert "train.warmup" not in made.lines
    assert any(one.key == "warmup_ratio" and "0.1 × the steps" in one.what for one in made.remarks)


def test_a_warm_up_of_the_constant_schedule_was_ignored() -> None:
    made = draft(warmup_steps=5, lr_scheduler_type="constant")
    hftrainer.settle(made, 80)
    assert becomes(made, "train.warmup") == 0
    assert any("ignored without a word" in one.what for one in made.remarks)


@pytest.mark.parametrize(
    ("key", "value", "recipe", "ours"),
    [
        ("optim", "adamw_torch", "train.optimizer", "adamw"),
        ("optim", "paged_adamw_32bit", "train.optimizer", "paged_adamw"),
        ("optim", "adafactor", "train.optimizer", "adamw"),
        ("lr_scheduler_type", "cosine_with_min_lr", "train.schedule", "cosine"),
        ("lr_scheduler_type", "polynomial", "train.schedule", "linear"),
        ("max_grad_norm", 0, "train.max_grad_norm", 1e6),
    ],
)
def test_words(key: str, value: Any, recipe: str, ours: Any) -> None:
    made = draft(**{key: value})
    assert becomes(made, recipe) == ours
    lost = [one for one in made.remarks if one.kind == "lost" and one.key == key]
    assert bool(lost) == (value in ("adafactor", "cosine_with_min_lr", "polynomial"))
