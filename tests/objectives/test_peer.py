"""Loss and gradient are TRL's on the same rows: against what it said once, and against itself where it is installed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune.model import Policy
from finetune.objectives import Pairs
from tests import tiny
from tests.objectives import rows
from tests.objectives.rows import KINDS, TRL

FIXED = TRL["fixed"]


@pytest.fixture(scope="module")
def policy(build_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """The model that TRL was given: base and adapter."""
    folder = build_tiny(tmp_path_factory.mktemp("peer") / "base")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == TRL["base"], "the tiny base has changed: make the vectors again"
    made = tiny.adapt(tiny.load(folder), wake=False)
    rows.script().wake(made.model)
    return made


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "kto"])
def test_loss_of_fixed_log_probabilities(kind: str) -> None:
    objective = rows.make(kind)
    assert isinstance(objective, Pairs)
    found, origin, sizes = (
        torch.tensor(FIXED[name], dtype=torch.float64) for name in ("found", "origin", "sizes")
    )  # fmt: skip
    losses, _ = objective.each(found, origin, sizes)
    assert losses.tolist() == pytest.approx(FIXED["losses"][kind], rel=1e-5)


@pytest.mark.parametrize("kind", TRL["model"])
def test_loss_and_gradient_of_a_batch(kind: str, policy: Policy) -> None:
    objective, expected = rows.make(kind), TRL["model"][kind]
    policy.model.train()
    (batch,) = objective.begin(policy, objective.batches(rows.of_trl(kind), 10_000))
    result = objective.loss(policy, batch)
    (result.total / result.count).backward()
    norm = tiny.flat({name: value.grad for name, value in policy.trainable().items()}).double().norm()
    policy.model.zero_grad(set_to_none=True)
    assert result.total.item() / result.count == pytest.approx(expected["loss"], rel=1e-5)
    assert float(norm) == pytest.approx(expected["gradient"], rel=1e-4)
    if kind == "kto":
        assert expected["kl"] > 0
        assert batch.zero == pytest.approx(expected["kl"], rel=1e-5)


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_the_vectors_are_what_trl_says_today() -> None:
    pytest.importorskip("trl", reason="TRL is not installed: what it said once is compared with alone")
    made = rows.script().make()
    for kind, told in TRL["model"].items():
        assert made["model"][kind]["loss"] == pytest.approx(told["loss"], rel=1e-5)
        assert made["model"][kind]["gradient"] == pytest.approx(told["gradient"], rel=1e-4)
    for kind, told in TRL["reward"].items():
        assert made["reward"][kind] == pytest.approx(told, rel=1e-4)
    for kind, losses in FIXED["losses"].items():
        assert made["fixed"]["losses"][kind] == pytest.approx(losses, rel=1e-5)
    assert json.dumps(made["rows"]) == json.dumps(TRL["rows"])
