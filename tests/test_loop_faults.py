"""What is not finite stops the run by name; only fp16's search for its scale may pass."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import loop
from finetune.errors import ModelError
from finetune.model import Policy
from finetune.objectives import sft
from tests import tiny

LENGTHS = [5, 17, 9, 3, 12, 8]


def poison(policy: Policy, token: int, value: float = float("nan")) -> None:
    with torch.no_grad():
        policy.causal_lm.get_input_embeddings().weight[token] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_names_its_rows(tiny_base: Path, value: float) -> None:
    policy, examples = tiny.adapt(tiny.load(tiny_base)), tiny.samples(LENGTHS)
    token = next(token for token in examples[4].ids if all(token not in examples[i].ids for i in (0, 1, 2, 3, 5)))
    poison(policy, token, value)
    events = loop.run(
        policy, sft, examples, tiny.course([(0, 1), (2, 4, 3)], micro_batch_tokens=1),
        tiny.adamw(policy, 0.0),
    )  # fmt: skip
    assert next(events).step == 1
    before = tiny.weights(policy)
    with pytest.raises(ModelError, match=r"^rows rows\.jsonl:5: the loss of step 2 is not finite; lower train"):
        next(events)
    assert tiny.same(tiny.weights(policy), before)


def test_many_rows_are_named_by_the_first_eight(tiny_base: Path) -> None:
    policy, examples = tiny.adapt(tiny.load(tiny_base)), tiny.samples([4] * 11)
    poison(policy, examples[10].ids[0])
    events = loop.run(policy, sft, examples, tiny.course([range(11)]), tiny.adamw(policy, 0.0))
    with pytest.raises(ModelError, match=r"rows\.jsonl:7, rows\.jsonl:8 and 3 more: the loss of step 1"):
        next(events)


def test_rate_that_breaks_the_adapter_stops_the_next_step(tiny_base: Path) -> None:
    policy = tiny.adapt(tiny.load(tiny_base))
    plan = tiny.course([(0, 1), (2, 3), (4, 5)], peak_rate=1e30)
    events = loop.run(policy, sft, tiny.samples(LENGTHS), plan, tiny.adamw(policy, 0.0))
    assert next(events).step == 1
    with pytest.raises(ModelError, match=r"rows\.jsonl:3, rows\.jsonl:4: the (loss|gradient) of step 2 is not finite"):
        next(events)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradient_that_is_not_finite_changes_nothing(tiny_base: Path, value: float) -> None:
    policy = tiny.adapt(tiny.load(tiny_base))
    before = tiny.weights(policy)
    next(iter(policy.trainable().values())).register_hook(lambda slope: slope * value)
    events = loop.run(policy, sft, tiny.samples(LENGTHS), tiny.course([(0, 1)]), tiny.adamw(policy, 0.0))
    with pytest.raises(ModelError, match=r"rows\.jsonl:1, rows\.jsonl:2: the gradient of step 1 is not finite"):
        next(events)
    assert tiny.same(tiny.weights(policy), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("form", "compute", "double"),
    [("nf4", "bf16", True), ("nf4", "bf16", False), ("fp4", "fp32", True), ("int8", "bf16", False),
     ("bf16", "bf16", False), ("fp32", "fp32", False)],
)  # fmt: skip
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_base_weight_that_is_not_finite_is_refused(
    tiny_base: Path, tmp_path: Path, tensor: str, form: str, compute: str, double: bool, value: float
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    stored = load_file(folder / "model.safetensors")
    stored[tensor][3, 5] = value
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=f"tensor {tensor} holds NaN or infinity"):
        tiny.load(folder, form, compute, double=double)


def half_precision(folder: Path, scale: float) -> tuple[Policy, torch.optim.Optimizer, torch.amp.GradScaler]:
    policy = tiny.adapt(tiny.load(folder, "fp16", "fp16"))
    return policy, tiny.adamw(policy, 0.0), torch.amp.GradScaler("cpu", init_scale=scale)


def test_fp16_trains_and_its_gradient_is_unscaled(tiny_base: Path) -> None:
    policy, optimizer, scaler = half_precision(tiny_base, 2.0**14)
    plan = tiny.course([range(6)] * 12, peak_rate=1e-2)
    events = list(loop.run(policy, sft, tiny.samples(LENGTHS), plan, optimizer, scaler=scaler))
    assert events[-1].loss < events[0].loss - 0.5
    assert {event.loss_scale for event in events} == {2.0**14}
    plain = tiny.adapt(tiny.load(tiny_base))
    (event,) = loop.run(plain, sft, tiny.samples(LENGTHS), tiny.course([range(6)]), tiny.Recorder(plain))
    assert events[0].grad_norm == pytest.approx(event.grad_norm, rel=0.01)


def test_overflow_in_fp16_skips_the_step_and_halves_the_scale(tiny_base: Path) -> None:
    policy, optimizer, scaler = half_precision(tiny_base, 2.0**40)
    before = tiny.weights(policy)
    plan = tiny.course([(0, 1)] * 60)
    events = loop.run(policy, sft, tiny.samples(LENGTHS), plan, optimizer, scaler=scaler)
    first = next(events)
    assert (first.step, first.loss_scale, first.grad_norm) == (1, 2.0**39, 0.0)
    assert tiny.same(tiny.weights(policy), before)
    scales = [event.loss_scale for event in events]
    assert scales[-1] == min(scales) >= 1.0  # it found its level and stayed there
    assert scales.count(scales[-1]) > 5
    assert not tiny.same(tiny.weights(policy), before)


def test_overflow_at_scale_one_is_a_fault(tiny_base: Path) -> None:
    policy, optimizer, scaler = half_precision(tiny_base, 2.0)
    next(iter(policy.trainable().values())).register_hook(lambda slope: slope * float("inf"))
    before = tiny.weights(policy)
    events = loop.run(policy, sft, tiny.samples(LENGTHS), tiny.course([(0, 1)] * 3), optimizer, scaler=scaler)
    assert next(events).loss_scale == 1.0
    with pytest.raises(ModelError, match="the gradient of step 2 is not finite"):
        next(events)
    assert tiny.same(tiny.weights(policy), before)
