"""Views of one base: the same weights, nothing else in common."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finetune import model, shared_base
from finetune.errors import ModelError
from finetune.model import Policy
from finetune.objectives import sft
from finetune.shared_base import Routed
from tests import tiny


@pytest.fixture
def base(tiny_base: Path) -> Policy:
    return tiny.load(tiny_base, "nf4")


def loss(policy: Policy) -> float:
    with policy.evaluating():
        return sft.loss(policy, sft.collate(tiny.samples([12, 30]))).total.item()


def test_views_hold_the_same_weights(base: Policy) -> None:
    one, two = shared_base.view(base), shared_base.view(base)
    first, second = dict(one.model.named_parameters()), dict(two.model.named_parameters())
    assert all(first[name] is second[name] for name in first)
    assert first.keys() == dict(base.model.named_parameters()).keys()
    assert loss(one) == loss(two) == loss(base)


def test_what_is_done_to_one_view_stays_in_it(base: Policy) -> None:
    before = loss(base)
    one, two = shared_base.view(base), shared_base.view(base)
    adapted = tiny.adapt(one)
    adapted.recompute_layers()
    hook = one.causal_lm.model.layers[0].register_forward_hook(lambda *_: 1 / 0)
    assert loss(two) == loss(base) == before
    assert not any(getattr(module, "gradient_checkpointing", False) for module in two.model.modules())
    hook.remove()
    assert loss(adapted) != before
    with adapted.evaluating(adapter=False):
        assert sft.loss(adapted, sft.collate(tiny.samples([12, 30]))).total.item() == before
    assert not two.trainable()


def test_an_adapter_on_a_view_starts_as_on_the_base_itself(base: Policy, tiny_base: Path) -> None:
    views = [model.attach(shared_base.view(base), tiny.FIELDS, seed) for seed in (0, 1)]
    own = model.attach(tiny.load(tiny_base, "nf4"), tiny.FIELDS, 1)
    assert tiny.same(model.adapter_weights(views[1].model), model.adapter_weights(own.model))
    assert not tiny.same(model.adapter_weights(views[0].model), model.adapter_weights(own.model))
    assert model.adapter_config(views[1].model, "b") == model.adapter_config(own.model, "b")


def test_linears_are_routed_and_what_else_an_adapter_touches(base: Policy) -> None:
    members = [tiny.adapt(shared_base.view(base), target_modules=[name]) for name in ("q_proj", "up_proj")]
    joint = shared_base.join(base, members)
    routed = {name.rpartition(".")[2] for name, one in joint.policy.model.named_modules() if isinstance(one, Routed)}
    assert routed == set(tiny.FIELDS["target_modules"])
    assert not joint.policy.trainable()


def test_each_answers_in_a_joint_pass_as_it_does_alone(base: Policy) -> None:
    members = [tiny.adapt(shared_base.view(base), seed=seed) for seed in range(3)]
    batches = [sft.collate(tiny.samples([9 + seed, 20], seed)) for seed in range(3)]
    with torch.no_grad():
        alone = [
            one.hidden(batch.ids, batch.positions, batch.bounds) for one, batch in zip(members, batches, strict=True)
        ]
        joint = shared_base.join(base, members)
        ids, positions = torch.cat([one.ids for one in batches], 1), torch.cat([one.positions for one in batches], 1)
        bounds = (0, 9, 29, 39, 59, 70, 90)
        with joint.rows([(who, batch.tokens) for who, batch in enumerate(batches)]):
            together = joint.policy.hidden(ids, positions, bounds)
    for found, own in zip(together.split([29, 30, 31], dim=1), alone, strict=True):
        assert tiny.distance(found, own) < 1e-6


def test_a_module_replaced_as_a_whole_is_refused(tiny_base: Path) -> None:
    base = tiny.load(tiny_base)
    member = tiny.adapt(shared_base.view(base), target_modules=["q_proj"], modules_to_save=["mlp"])
    with pytest.raises(ModelError, match="replaces mlp as a whole"):
        shared_base.join(base, [member])
