"""One frozen base under several adapters: a policy for each as if it were alone, and one that runs them all together.

Each adapter is attached to a view of the base: modules of its own that hold the very same weights. PEFT sees one model
with one adapter, so that parameters, start, config and files are those of a run of its own, and so is every answer
between two steps. One more view is the joint policy. Where an adapter changed a module of the base it has a routed one,
which gives each adapter's rows to that adapter (kernels/lora_routed.py).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from finetune.errors import ModelError
from finetune.kernels import decoder_layer, lora_linear
from finetune.kernels.lora_linear import Site
from finetune.kernels.lora_routed import RoutedSite, Share
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


class Routes:
    """Whose rows are whose in the pass that runs now: (low, high, member) in order, together all of them.

    ``noise``: the state of torch's generator as each member's own run would have it, by member; those with dropout.
    """

    def __init__(self) -> None:
        self.places: tuple[tuple[int, int, int], ...] = ()
        self.noise: dict[int, torch.Tensor] = {}
        self.passes = 0

    @contextlib.contextmanager
    def noise_of(self, who: int) -> Iterator[None]:
        """Inside, what is drawn is drawn as in the member's own run."""
        if who not in self.noise:
            yield
            return
        before = torch.get_rng_state()
        torch.set_rng_state(self.noise[who])
        try:
            yield
            self.noise[who] = torch.get_rng_state()
        finally:
            torch.set_rng_state(before)


class Routed(torch.nn.Module):
    """One place of the base as several adapters have it. It owns no parameters: they are the adapters' own.

    Where an adapter is not covered by the fused step (DoRA, token rows), each range goes through its own module.
    """

    def __init__(self, base: torch.nn.Module, theirs: Sequence[torch.nn.Module], routes: Routes) -> None:
        super().__init__()
        self.shared = (base, tuple(theirs), routes)  # in a tuple: torch would take modules for its own
        self._made: tuple[int, RoutedSite | None] = (0, None)

    def routed_site(self) -> RoutedSite | None:
        """The linear with its adapters, as ``lora_linear`` takes it; None where one of them is not covered.

        Made once a pass: a layer that is computed again must find the same dropout.
        """
        routes = self.shared[2]
        if self._made[0] != routes.passes:
            self._made = (routes.passes, self._site())
        return self._made[1]

    def _site(self) -> RoutedSite | None:
        base, theirs, routes = self.shared
        shares = []
        for low, high, who in routes.places:
            with routes.noise_of(who):
                own = lora_linear.site(theirs[who])
            if not isinstance(own, Site):
                return None
            if own.a is not None and own.b is not None:
                drop = own.dropped if own.dropout else None
                shares.append(Share(low=low, high=high, scaling=own.scaling, a=own.a, b=own.b, drop=drop))
        return RoutedSite(base=base, shares=tuple(shares))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [1, tokens, in], or ids [1, tokens]."""
        base, theirs, routes = self.shared
        site = self.routed_site() if isinstance(base, torch.nn.Linear) else None
        if site is None:
            return torch.cat([theirs[who](x[:, low:high]) for low, high, who in routes.places], dim=1)
        return lora_linear.apply(x, (site,))[0]


@dataclass(frozen=True, kw_only=True)
class Joint:
    """The policy that runs the rows of all members, in their order, in one pass."""

    policy: Policy
    members: tuple[Policy, ...]
    routes: Routes

    @contextlib.contextmanager
    def rows(self, tokens: Sequence[tuple[int, int]], seeds: Sequence[int] = ()) -> Iterator[None]:
        """Inside, a pass over the policy holds these rows: (member, tokens) one after the other.

        ``seeds``: of the noise of each, where there is dropout.
        """
        places, low = [], 0
        for who, count in tokens:
            places.append((low, low + count, who))
            low += count
        self.routes.places = tuple(places)
        self.routes.passes += 1
        self.routes.noise = {
            who: torch.Generator().manual_seed(seed).get_state()
            for (who, _), seed in zip(tokens, seeds, strict=False)
            if has_dropout(self.members[who])
        }
        try:
            yield
        finally:
            self.routes.places = ()
            self.routes.noise = {}

    def train(self) -> None:
        for policy in (self.policy, *self.members):
            policy.model.train()


def has_dropout(policy: Policy) -> bool:
    """Whether the policy's adapter draws noise in training."""
    return any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in policy.model.modules())


def join(base: Policy, members: Sequence[Policy]) -> Joint:
    """The joint policy of adapted views of ``base``; ``base`` becomes its model and has no use of its own any more.

    Raises:
        ModelError: an adapter has changed more than single modules.
    """
    routes = Routes()
    for mine, theirs in zip(base.causal_lm.model.layers, members[0].causal_lm.model.layers, strict=True):
        decoder_layer.compute_as(theirs, mine)
    _weave(base.causal_lm.model, [member.causal_lm.model for member in members], routes)
    return Joint(policy=replace(base, kernels=members[0].kernels), members=tuple(members), routes=routes)


def _weave(joint: Any, theirs: Sequence[Any], routes: Routes) -> None:
    for name, child in joint._modules.items():
        found = [module._modules[name] for module in theirs]
        if not child._modules:
            # A linear that no adapter touches as well: those with one input go through together.
            if isinstance(child, torch.nn.Linear) or any(module is not child for module in found):
                joint._modules[name] = Routed(child, found, routes)
        elif all(module._modules.keys() == child._modules.keys() for module in found):
            _weave(child, found, routes)
        else:
            raise ModelError(f"an adapter replaces {name} as a whole", "adapters", "train them one after the other")
