"""The steps of a run under the settings that fit, and what gives way when a step runs out of memory after all.

A plan is a prediction. Where a card is full nevertheless, the run gives up one notch of speed for memory, writes that
into its identity with the step from which it holds, and takes the step once more from its start: nothing of it had been
applied, and its samples and noise are functions of its number. A resumed run finds the same settings at the same steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from finetune import hardware, loop
from finetune.errors import EnvironmentFault, ModelError

if TYPE_CHECKING:
    from finetune.loop import Course, StepDone
    from finetune.model import Policy
    from finetune.run import Run

KEY = "fallbacks"
"""Where a run's identity lists them, in ``resolved``."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What decides a step's memory. ``recompute``: none, layers or offload; of ``recomputed_layers`` layers."""

    recompute: str
    recomputed_layers: int
    micro_batch_tokens: int

    def __str__(self) -> str:
        layers = f"{self.recomputed_layers} layers recomputed" if self.recomputed_layers else "nothing recomputed"
        where = ", their inputs in the machine's memory" if self.recompute == "offload" else ""
        return f"{layers}{where}, at most {self.micro_batch_tokens} tokens at once"

    def apply(self, policy: Policy) -> None:
        if self.recompute != "none":
            policy.recompute_layers(self.recomputed_layers, offload=self.recompute == "offload")

    def lighter(self, layers: int, longest: int) -> Setting | None:
        """One notch less memory for a model of ``layers`` layers and samples up to ``longest`` tokens; None: no more.

        Half of what is not yet recomputed, until all is; then the layers' inputs leave the card; then half the tokens.
        """
        if self.recomputed_layers < layers:
            more = -(-(layers - self.recomputed_layers) // 2)
            return replace(self, recompute="layers", recomputed_layers=self.recomputed_layers + more)
        if self.recompute != "offload":
            return replace(self, recompute="offload")
        if self.micro_batch_tokens > longest:
            return replace(self, micro_batch_tokens=max(longest, self.micro_batch_tokens // 2))
        return None


def at(resolved: dict[str, Any], step: int, total: int) -> tuple[Setting, int]:
    """The setting of step ``step`` (from 0), and the step from which another one holds."""
    found, until = resolved, total
    for one in resolved.get(KEY, ()):
        if one["step"] <= step + 1:  # written as people count
            found = one
        else:
            until = min(until, one["step"] - 1)
    return Setting(**{key: found[key] for key in Setting.__dataclass_fields__}), until


def steps(
    run: Run, policy: Policy, course: Course, optimizer: torch.optim.Optimizer, start: int, scaler: Any
) -> Generator[StepDone]:
    """``loop.run`` of a run's course, each step under its setting, lighter ones where memory runs out.

    Raises:
        EnvironmentFault: out of memory with nothing left to give up.
        ModelError: as ``loop.run``.
    """
    done, objective = start, run.prepared.objective
    while done < len(course.steps):
        setting, until = at(run.identity.resolved, done, len(course.steps))
        setting.apply(policy)
        part = replace(course, micro_batch_tokens=setting.micro_batch_tokens)
        reason = ""
        course_of = loop.run(policy, objective, run.samples, part, optimizer, done, scaler, peers=run.peers)
        events = itertools.islice(course_of, until - done)
        try:
            for event in events:
                done = event.step
                yield event
        except (torch.OutOfMemoryError, ModelError) as error:
            run.peers.tell(error)
            if isinstance(error, ModelError):
                raise
            reason = str(error).splitlines()[0] if str(error) else "no more is known"
        del events, course_of
        if reason:  # here, where the error and with it the step's tensors are gone
            optimizer.zero_grad(set_to_none=True)
            hardware.empty_cache()
            _give_way(run, setting, done + 1, reason)


def _give_way(run: Run, setting: Setting, step: int, reason: str) -> None:
    """Write the next lighter setting, which holds from ``step`` (counted from 1) on."""
    lighter = setting.lighter(run.base.shape.layers, run.prepared.recipe.unit_tokens)
    if lighter is None:
        raise EnvironmentFault(f"out of memory: {reason}", f"step {step}", "lower train.max_length, or adapter.r")
    former = [one for one in run.identity.resolved.get(KEY, ()) if one["step"] < step]
    run.resolve(run.identity.resolved | {KEY: [*former, {"step": step, **asdict(lighter)}]})
    run.terminal.say(f"step {step} ran out of memory ({reason}): from it on {lighter}")
