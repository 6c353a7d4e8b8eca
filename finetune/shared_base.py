"""One frozen base under several adapters: a policy for each as if it were alone, and one that runs them all together.

Each adapter is attached to a view of the base: modules of its own that hold the very same weights. PEFT sees one model
with one adapter, so that parameters, start, config and files are those of a run of its own, and so is every answer
between two steps. One more view is the joint policy. Where an adapter changed a module of the base it has a routed one,
which gives each adapter's rows to that adapter's module (kernels/lora_routed.py).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finetune.errors import ModelError
from finetune.kernels.lora_routed import Routed, Routes
from finetune.model import Policy


def view(policy: Policy) -> Policy:
    """The bare base once more: every leaf module, and so every weight, is shared; what holds them is not."""
    assert not policy.adapted
    return replace(policy, model=_view(policy.model))


def _view(module: Any) -> Any:
    if not module._modules:
        return module
    made = copy.copy(module)
    # A shallow copy shares the tables that hold children and hooks; what is changed in one view must stay in it.
    for name, value in module.__dict__.items():
        if isinstance(value, dict | set):
            made.__dict__[name] = copy.copy(value)
    made._modules = {name: _view(child) for name, child in module._modules.items()}
    return made


@dataclass(frozen=True, kw_only=True)
class Joint:
    """The policy that runs the rows of all members, in their order, in one pass."""

    policy: Policy
    members: tuple[Policy, ...]
    routes: Routes

    @contextlib.contextmanager
    def rows(self, tokens: Sequence[tuple[int, int]]) -> Iterator[None]:
        """Inside, a pass over the policy holds these rows: (member, tokens) one after the other."""
        places, low = [], 0
        for who, count in tokens:
            places.append((low, low + count, who))
            low += count
        self.routes.places = tuple(places)
        try:
            yield
        finally:
            self.routes.places = ()

    def train(self) -> None:
        for policy in (self.policy, *self.members):
            policy.model.train()


def join(base: Policy, members: Sequence[Policy]) -> Joint:
    """The joint policy of adapted views of ``base``; ``base`` becomes its model and has no use of its own any more.

    Raises:
        ModelError: an adapter has changed more than single modules.
    """
    routes = Routes()
    _weave(base.causal_lm.model, [member.causal_lm.model for member in members], routes)
    return Joint(policy=base, members=tuple(members), routes=routes)


def _weave(joint: Any, theirs: Sequence[Any], routes: Routes) -> None:
    for name, child in joint._modules.items():
        found = [module._modules[name] for module in theirs]
        if all(module is child for module in found):
            continue
        if not child._modules:
            joint._modules[name] = Routed(child, found, routes)
        elif all(type(module) is type(child) for module in found):
            _weave(child, found, routes)
        else:
            raise ModelError(f"an adapter replaces {name} as a whole", "adapters", "train them one after the other")
