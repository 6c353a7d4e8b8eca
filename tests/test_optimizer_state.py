"""What an optimizer keeps: on the disk and back to the bit, its bytes in the budget, and what a plan says of it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import base as bases
from finetune import checkpoint, loop, model, plan, recipe, targets
from finetune import optimizer as optimizers
from finetune.checkpoint import Checkpoint
from finetune.model import Policy
from finetune.optimizer import Tensors
from tests import runs, tiny
from tests.test_optimizer import CHOICES, KINDS, WHOLE, adapted, pushed


def moments_on(store: Path, policy: Policy, optimizer: torch.optim.Optimizer, step: int) -> None:
    weights, config = model.adapter_weights(policy.model), model.adapter_config(policy.model, "tiny")
    moments = checkpoint.optimizer_tensors(optimizer, policy.trainable())
    checkpoint.save(store, Checkpoint(step=step, weights=weights, config=config, moments=moments), 1)


@pytest.mark.parametrize(("kind", "ratio"), CHOICES)
@pytest.mark.parametrize("extra", [{}, *WHOLE.values()], ids=["lora", *WHOLE])
def test_state_goes_to_the_disk_and_back(
    tiny_base: Path, tmp_path: Path, kind: str, ratio: float | None, extra: dict[str, Any]
) -> None:
    policy = adapted(tiny_base, "bf16", **extra)
    optimizer = optimizers.make(policy.model, kind, lora_plus_ratio=ratio)
    pushed(policy, optimizer, 3)
    moments_on(tmp_path, policy, optimizer, 3)
    fresh = adapted(tiny_base, "bf16", seed=1, **extra)
    again = optimizers.make(fresh.model, kind, lora_plus_ratio=ratio)
    saved = checkpoint.read(tmp_path / checkpoint.folder_name(3))
    model.load_adapter(fresh.model, saved.weights, tmp_path)
    checkpoint.restore_optimizer(again, fresh.trainable(), saved.moments)
    assert len(optimizer.state) == len(again.state) == len(policy.trainable())
    assert tiny.same(saved.moments, checkpoint.optimizer_tensors(again, fresh.trainable()))
    kinds = [
        {(key, type(value)) for state in one.state.values() for key, value in state.items()}
        for one in (optimizer, again)
    ]
    assert kinds[0] == kinds[1]
    tables = {state["qmap1"].data_ptr() for state in again.state.values() if "qmap1" in state}
    assert len(tables) == kind.endswith("8bit")  # its own buffers are filled, so that a card's can be paged out
    for which, at in ((policy, optimizer), (fresh, again)):
        pushed(which, at, 2)
    assert tiny.same(tiny.weights(policy), tiny.weights(fresh))


def test_state_of_another_adapter_is_refused(tiny_base: Path) -> None:
    policy = adapted(tiny_base)
    optimizer = optimizers.make(policy.model, "lora_fa")
    pushed(policy, optimizer, 1)
    moments = checkpoint.optimizer_tensors(optimizer, policy.trainable())
    moments["model.stranger.lora|exp_avg_B"] = torch.zeros(1)
    with pytest.raises(checkpoint.ModelError, match=r"the optimizer state has model\.stranger\.lora"):
        checkpoint.restore_optimizer(optimizer, policy.trainable(), moments)


@pytest.mark.parametrize(("kind", "ratio"), CHOICES)
def test_a_run_cut_off_ends_with_the_bits_of_an_unbroken_one(
    work: Path, monkeypatch: pytest.MonkeyPatch, kind: str, ratio: float | None
) -> None:
    common = ["adapter.r=40", "evaluate.metrics=[loss]", "train.steps=4"]
    settings = [f"train.optimizer={kind}", f"train.lora_plus_ratio={ratio or 'null'}", *common]
    assert runs.train(*settings, "output=runs/whole").code == 0
    real, calls = loop._update, iter(range(9))

    def cut(*arguments: Any) -> Any:
        if next(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_update", cut)
        assert runs.train(*settings).code == 6
    other = "adamw_8bit" if kind == "adamw" else "adamw"
    refused = runs.train(f"train.optimizer={other}", *common)
    assert refused.code == 2
    assert f"train.optimizer: was '{kind}', is '{other}' now" in refused.err
    said = runs.train(*settings)
    assert (said.code, "going on after step 3" in said.out) == (0, True)
    assert runs.adapter_digest() == runs.adapter_digest(Path("runs/whole"))
    assert runs.curve() == runs.curve(Path("runs/whole"))


ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns and whole": {"rank_pattern": {"q_proj": 64}, "modules_to_save": ["lm_head"]},
    "DoRA": {"use_dora": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ADAPTERS)
def test_the_budget_is_what_the_state_takes(work: Path, tmp_path: Path, kind: str, case: str) -> None:
    fields = {"r": 40, "lora_alpha": 80} | ADAPTERS[case]
    if case == "DoRA" and kind in ("lora_fa", "riemannian"):
        return
    sets = [f"adapter.{key}={str(value).replace(chr(39), '')}" for key, value in fields.items()]
    settings = [f"train.optimizer={kind}", "quantize.weights=bf16", "quantize.compute=bf16"]
    located = recipe.locate(Path("r.yaml"), [*settings, *(text.replace("True", "true") for text in sets)])
    tensors = targets.select(located, bases.inspect(Path("base")).shape).tensors
    policy = tiny.adapt(tiny.load(Path("base"), "bf16", "bf16"), **fields)
    optimizer = optimizers.make(policy.model, kind)
    pushed(policy, optimizer, 1)
    moved = [one for one in tensors if optimizers.is_trained(kind, one.role)]
    assert sum(one.parameters for one in moved) == sum(value.numel() for value in policy.trainable().values())
    held = {
        value.data_ptr(): value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key != "step" and not key.startswith("qmap")
    }
    assert optimizers.state_bytes(kind, tensors) == sum(held.values())
    saved = sum(value.nbytes for value in checkpoint.optimizer_tensors(optimizer, policy.trainable()).values())
    assert 0 <= saved - optimizers.saved_bytes(kind, tensors) <= 8 * len(policy.trainable())  # the step counters
    assert plan.output_bytes(located.recipe, tensors) > 3 * (saved + 4 * sum(one.parameters for one in tensors))


def test_states_of_a_14b_adapter() -> None:
    """Bytes per trained parameter as docs/training.md states them."""
    tensors = [Tensors("A", 16 * 5120, 7), Tensors("B", 16 * 5120, 7)]
    each = {kind: optimizers.state_bytes(kind, tensors) / sum(one.parameters for one in tensors) for kind in KINDS}
    assert each == {
        "adamw": 8, "paged_adamw": 8, "riemannian": 8, "lora_fa": 4, "adamw_8bit": 2.03125, "paged_adamw_8bit": 2.03125
    }  # fmt: skip


def test_a_plan_says_what_the_choice_means(work: Path) -> None:
    def notes(*sets: str) -> str:
        said = runs.finetune("plan", "r.yaml", *(part for one in sets for part in ("--set", one)))
        assert said.code == 0, said.err
        return said.out

    assert "there is nothing to page" in notes("train.optimizer=paged_adamw")
    assert "keep 32-bit states" in notes("train.optimizer=adamw_8bit")
    assert "keep 32-bit states" not in notes("train.optimizer=adamw_8bit", "adapter.r=128")
    assert "the A matrices (" in notes("train.optimizer=lora_fa")
    assert "adamw:" not in notes()


def test_a_lora_fa_run_is_merged(work: Path) -> None:
    assert runs.train("train.optimizer=lora_fa", "train.steps=2", "evaluate.metrics=[loss]").code == 0
    assert runs.merge_run().code == 0
