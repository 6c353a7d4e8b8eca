"""What a step takes from its number alone: rate, samples, noise; so that a run can start anywhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import checkpoint, loop, model
from finetune.checkpoint import Checkpoint
from finetune.loop import Course, StepDone
from finetune.model import Policy
from finetune.objectives import sft
from tests import tiny

LENGTHS = [5, 17, 9, 3, 12, 8]
TOTAL, WARMUP, PEAK = 20, 4, 0.01


def closed_form(kind: str, step: int, warmup: int) -> float:
    """The rate of step ``step``, from 1 to TOTAL, written anew."""
    if step <= warmup:
        return PEAK * step / warmup
    left = (TOTAL - step + 1) / (TOTAL - warmup)
    return (
        PEAK
        * {
            "constant": 1.0,
            "linear": left,
            "cosine": math.sin(math.pi / 2 * left) ** 2,
            "wsd": min(1.0, 5 * left),
        }[kind]
    )


@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize("kind", ["constant", "linear", "cosine", "wsd"])
def test_logged_rate_is_the_one_applied_and_the_closed_form(tiny_base: Path, kind: str, warmup: int) -> None:
    policy = tiny.adapt(tiny.load(tiny_base), target_modules=["q_proj"])
    optimizer = tiny.adamw(policy, 0.0)
    plan = tiny.course([(3,)] * TOTAL, peak_rate=PEAK, warmup=warmup, kind=kind)
    for event in loop.run(policy, sft, tiny.samples(LENGTHS), plan, optimizer):
        assert event.learning_rate == pytest.approx(closed_form(kind, event.step, warmup), rel=1e-12)
        assert [group["lr"] for group in optimizer.param_groups] == [event.learning_rate]


def test_rate_and_decay_act_as_adamw_says(tiny_base: Path) -> None:
    policy = tiny.adapt(tiny.load(tiny_base), target_modules=["q_proj"])
    before = tiny.weights(policy)
    examples, plan = tiny.samples(LENGTHS), tiny.course([(1,)], peak_rate=0.01, max_grad_norm=math.inf)
    (gradient,) = tiny.gradients(policy, examples, plan)
    list(loop.run(policy, sft, examples, plan, tiny.adamw(policy, 0.1)))
    for name, value in tiny.weights(policy).items():
        # Algorithm 2 at its first step: the bias-corrected moments are the gradient and its square.
        step = gradient[name] / (gradient[name].abs() + 1e-8)
        torch.testing.assert_close(value, before[name] * (1 - 0.01 * 0.1) - 0.01 * step, rtol=1e-5, atol=1e-7)


def dropping(folder: Path, form: str = "nf4", compute: str = "fp32") -> Policy:
    return tiny.adapt(tiny.load(folder, form, compute), lora_dropout=0.3)


def noise(policy: Policy, plan: Course, start: int = 0) -> list[float]:
    """The loss of each micro-batch of a course that changes no weight."""
    watched = tiny.Watched()
    for _ in loop.run(policy, watched, tiny.samples(LENGTHS), plan, tiny.Recorder(policy), start):
        pass
    return watched.totals


def test_dropout_belongs_to_seed_step_and_micro_batch(tiny_base: Path) -> None:
    policy = dropping(tiny_base)
    plan = tiny.course([(1, 1), (1, 1)], micro_batch_tokens=LENGTHS[1])
    losses = noise(policy, plan)
    assert len(set(losses)) == 4  # the same sample four times
    torch.manual_seed(99)
    assert noise(policy, plan) == losses
    assert noise(policy, plan, start=1) == losses[2:]
    other = tiny.course([(1, 1), (1, 1)], micro_batch_tokens=LENGTHS[1], seed=1)
    assert not set(noise(policy, other)) & set(losses)
    still = noise(tiny.adapt(tiny.load(tiny_base, "nf4")), plan)
    assert len(set(still)) == 1


def test_largest_seed_of_a_recipe_is_served(tiny_base: Path) -> None:
    policy = dropping(tiny_base)
    assert len(noise(policy, tiny.course([(1,), (1,)], seed=2**32 - 1))) == 2


def test_training_mode_is_set_even_after_an_evaluation(tiny_base: Path) -> None:
    policy = dropping(tiny_base)
    plan = tiny.course([(1,), (1,)])
    losses = noise(policy, plan)
    policy.model.eval()
    assert noise(policy, plan) == losses


def full_run(policy: Policy, plan: Course, **settings: Any) -> tuple[list[StepDone], list[tuple[str, ...]]]:
    watched = tiny.Watched()
    optimizer = tiny.adamw(policy, 0.01)
    events = list(loop.run(policy, watched, tiny.samples(LENGTHS), plan, optimizer, **settings))
    return events, watched.rows


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(tiny_base: Path, workers: int) -> None:
    steps = [(0, 1, 2), (3, 4, 5), (5, 0), (2,)]
    results = []
    for count in (0, workers):
        policy = dropping(tiny_base)
        events, rows = full_run(policy, tiny.course(steps, micro_batch_tokens=20, workers=count))
        results.append(([(event.loss, event.grad_norm) for event in events], rows, tiny.weights(policy)))
    assert results[0][:2] == results[1][:2]
    assert tiny.same(results[0][2], results[1][2])


def scaler(compute: str) -> torch.amp.GradScaler | None:
    return torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=2) if compute == "fp16" else None


def stopped_and_resumed(folder: Path, store: Path, plan: Course, stop: int, compute: str) -> Iterator[Any]:
    """Train to ``stop``, save, forget everything, load, train on. Yields the events, then the policy."""
    policy, watched, loss_scaler = dropping(folder, compute=compute), tiny.Watched(), scaler(compute)
    optimizer = tiny.adamw(policy, 0.01)
    events = loop.run(policy, watched, tiny.samples(LENGTHS), plan, optimizer, scaler=loss_scaler)
    yield from tiny.take(events, stop)
    state = Checkpoint(
        step=stop,
        weights=model.adapter_weights(policy.model),
        config=model.adapter_config(policy.model, "tiny"),
        moments=checkpoint.optimizer_tensors(optimizer, policy.trainable()),
        scaler=loss_scaler.state_dict() if loss_scaler else None,
    )
    checkpoint.save(store, state, 2)
    events.close()
    next_policy, next_scaler = dropping(folder, compute=compute), scaler(compute)
    optimizer = tiny.adamw(next_policy, 0.01)
    saved = checkpoint.newest(store, print)
    assert saved is not None
    model.load_adapter(next_policy.model, saved.weights, store)
    checkpoint.restore_optimizer(optimizer, next_policy.trainable(), saved.moments)
    if next_scaler:
        next_scaler.load_state_dict(saved.scaler)
    torch.manual_seed(12345)  # a new process has other noise behind it
    yield from loop.run(next_policy, watched, tiny.samples(LENGTHS), plan, optimizer, saved.step, next_scaler)
    yield next_policy, watched.rows


@pytest.mark.parametrize(("stop", "compute"), [(1, "bf16"), (3, "bf16"), (5, "bf16"), (2, "fp32"), (3, "fp16")])
def test_stop_and_resume_gives_the_bits_of_an_unbroken_run(
    tiny_base: Path, tmp_path: Path, stop: int, compute: str
) -> None:
    steps = [(0, 1, 2), (3, 4, 5), (5, 0, 3), (2, 4, 1), (1, 5), (0, 2)]
    plan = tiny.course(steps, micro_batch_tokens=20, warmup=2, kind="cosine")
    whole = dropping(tiny_base, compute=compute)
    unbroken, rows = full_run(whole, plan, scaler=scaler(compute))
    *events, (policy, seen) = stopped_and_resumed(tiny_base, tmp_path, plan, stop, compute)
    assert seen == rows  # every sample of every step once, in order, on either side of the break
    assert [vars(event) | {"seconds": 0, "waited": 0} for event in events] == [
        vars(event) | {"seconds": 0, "waited": 0} for event in unbroken
    ]
    assert tiny.same(tiny.weights(policy), tiny.weights(whole))


class _Slow(list[Any]):
    """Samples from a slow disk."""

    def __getitem__(self, index: Any) -> Any:
        time.sleep(0.03)
        return super().__getitem__(index)


def test_the_device_does_not_wait_for_samples(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, plan = tiny.adapt(tiny.load(tiny_base)), tiny.course([(0, 1)] * 6)
    real = sft.loss

    def slow(*arguments: Any) -> Any:
        time.sleep(0.15)
        return real(*arguments)

    monkeypatch.setattr(sft, "loss", slow)
    events = list(loop.run(policy, sft, _Slow(tiny.samples(LENGTHS)), plan, tiny.Recorder(policy)))
    assert events[0].waited > 0.05  # there is nothing before the first step
    assert sorted(event.waited for event in events[1:])[2] < 0.02
