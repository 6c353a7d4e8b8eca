"""The processes of a job that the tests start: they train steps of a tiny base together, and write what they saw.

``python -m tests.peers_worker BASE OUT PORT WORLD …`` imports once and forks WORLD processes, then those of the next.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finetune import base as bases
from finetune import jobplace, loading, model, peers, sharding
from finetune.errors import ModelError
from finetune.loading import BaseForm
from finetune.loop import run
from finetune.model import Policy
from finetune.objectives import sft
from tests import tiny
from tests.objectives import rows

LENGTHS = [40, 12, 33, 25, 18, 50, 9, 28, 61, 15, 22, 37]
STEPS = [(0, 1, 2, 3, 4), (5, 6, 7, 8), (9,), (10, 11, 0)]
PROMPT = list(range(1, 9))


@dataclass(frozen=True, kw_only=True)
class Case:
    """How the steps are trained; with ``shard`` on shards of the base where there are several processes."""

    fields: dict[str, Any] = field(default_factory=dict)
    weights: str = "fp32"
    shard: bool = False
    recompute: bool = False
    micro_batch_tokens: int = 64
    objective: str = "sft"


CASES = {
    "plain": Case(),
    "dropout": Case(fields={"lora_dropout": 0.3}),
    "one pack a step": Case(micro_batch_tokens=400),  # fewer micro-batches than processes
    "kto": Case(objective="kto"),
    "shards": Case(shard=True),
    "shards, bf16": Case(shard=True, weights="bf16"),
    "shards, one pack a step": Case(shard=True, micro_batch_tokens=400),
    "shards, nf4, dropout, recomputed": Case(
        shard=True, weights="nf4", recompute=True, fields={"lora_dropout": 0.3}
    ),
    "shards, kto": Case(shard=True, weights="nf4", objective="kto"),
}  # fmt: skip


def main(base: Path, out: Path, port: int, worlds: list[int]) -> None:
    """Every case, one after the other: to start processes takes longer than their work."""
    for number, world in enumerate(worlds):
        children = [_forked(base, out / str(world), port + number, world, rank) for rank in range(world)]
        ended = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(ended):
            sys.exit(f"of {world} processes these failed: {ended}")


def _forked(base: Path, out: Path, port: int, world: int, rank: int) -> int:
    child = os.fork()
    if child:
        return child
    place = {"WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    code = 1
    try:
        _work(base, out, world)
        code = 0
    except BaseException:  # noqa: BLE001 - it stands for a whole process
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def _work(base: Path, out: Path, world: int) -> None:
    group = peers.join(jobplace.find(world))
    for case in CASES:
        steps(base, out / case, case, group)
    group.sharded = False
    try:
        train(load(base, CASES["plain"], group), CASES["plain"], group, Failing(group.rank))
    except ModelError as error:
        group.tell(error)
        (out / f"fault-{group.rank}.json").write_text(json.dumps([type(error).__name__, str(error)]))


def steps(base: Path, out: Path, name: str, group: peers.Peers) -> None:
    case = CASES[name]
    objective = sft if case.objective == "sft" else rows.make(case.objective)
    policy = load(base, case, group)
    events, gradients = train(policy, case, group, objective)
    out.mkdir(parents=True, exist_ok=True)
    held = sharding.held_bytes(policy.causal_lm) if group.sharded else 0
    told = {"events": events, "held": held, "answer": look(policy, group) if case.shard else []}
    (out / f"told-{group.rank}.json").write_text(json.dumps(told))
    named = {f"{step}|{name}": grad for step, grads in enumerate(gradients) for name, grad in grads.items()}
    save_file(named, out / f"gradients-{group.rank}.safetensors")


def load(base: Path, case: Case, group: peers.Peers) -> Policy:
    shards = case.shard and group.world > 1
    if group.world > 1:
        group.sharded = shards
    inspected, form = bases.inspect(base), BaseForm(weights=case.weights, double=True, compute="fp32", device="cpu")
    loaded = sharding.load(inspected, form, group.world) if shards else loading.load(inspected, form)
    policy = tiny.adapt(model.policy_of(inspected, loaded), **case.fields)
    if case.recompute:
        policy.recompute_layers()
    return policy


def train(policy: Policy, case: Case, group: peers.Peers, objective: Any) -> tuple[list[tuple[float, ...]], list[Any]]:
    examples = tiny.samples(LENGTHS) if case.objective == "sft" else rows.drawn(case.objective, seed=3)
    order = STEPS if case.objective == "sft" else [range(len(examples)), range(len(examples) // 2)]
    course = tiny.course(order, micro_batch_tokens=case.micro_batch_tokens, max_grad_norm=1e9)
    recorder = tiny.Recorder(policy)
    events = [(one.step, one.loss, one.grad_norm, one.tokens, one.supervised, one.samples)
              for one in run(policy, objective, examples, course, recorder, peers=group)]  # fmt: skip
    return events, recorder.gradients


def look(policy: Policy, group: peers.Peers) -> list[int]:
    """An answer of the first process's; the others pass along."""
    if group.rank:
        while group.hear() == peers.PASS:
            sharding.pass_along(policy)
        return []
    if group.sharded:
        sharding.announce(policy.causal_lm, lambda: group.say(peers.PASS), lambda: None)
    with policy.evaluating():
        (answer,) = policy.generate([PROMPT], max_new_tokens=8)
    group.over()
    return answer


class Failing:
    """The real objective; the second process meets a loss that is not a number in its third micro-batch."""

    batches, begin = staticmethod(sft.batches), staticmethod(sft.begin)

    def __init__(self, rank: int) -> None:
        self.rank, self.met = rank, 0

    def loss(self, policy: Any, batch: Any) -> Any:
        result = sft.loss(policy, batch)
        self.met += 1
        return replace(result, total=result.total * torch.nan) if self.rank == 1 and self.met > 2 else result


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), [int(world) for world in sys.argv[4:]])
