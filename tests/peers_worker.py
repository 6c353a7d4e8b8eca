"""One process of a job that the tests start: trains steps of a tiny base with its peers, and writes what it saw.

``python -m tests.peers_worker BASE OUT``, with torch's variables of the place in the environment.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finetune import jobplace, peers
from finetune.errors import ModelError
from finetune.loop import run
from finetune.objectives import sft
from tests import tiny

LENGTHS = [40, 12, 33, 25, 18, 50, 9, 28, 61, 15, 22, 37]
STEPS = [(0, 1, 2, 3, 4), (5, 6, 7, 8), (9,), (10, 11, 0)]
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"lora_dropout": 0.3},
    "one pack a step": {},  # fewer micro-batches than processes
}


def main(base: Path, out: Path) -> None:
    """Every case, one after the other: to start processes takes longer than their work."""
    group = peers.join(jobplace.find(int(os.environ["WORLD_SIZE"])))
    for case in CASES:
        steps(base, out / case, case, group)
    try:
        train(base, "plain", group, Failing(group.rank))
    except ModelError as error:
        group.tell(error)
        (out / f"fault-{group.rank}.json").write_text(json.dumps([type(error).__name__, str(error)]))


def steps(base: Path, out: Path, case: str, group: peers.Peers) -> None:
    events, gradients = train(base, case, group, sft)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"events-{group.rank}.json").write_text(json.dumps(events))
    named = {f"{step}|{name}": grad for step, grads in enumerate(gradients) for name, grad in grads.items()}
    save_file(named, out / f"gradients-{group.rank}.safetensors")


def train(base: Path, case: str, group: peers.Peers, objective: Any) -> tuple[list[tuple[float, ...]], list[Any]]:
    policy = tiny.adapt(tiny.load(base), **CASES[case])
    course = tiny.course(STEPS, micro_batch_tokens=400 if case == "one pack a step" else 64, max_grad_norm=1e9)
    recorder = tiny.Recorder(policy)
    events = [(one.step, one.loss, one.grad_norm, one.tokens, one.supervised, one.samples)
              for one in run(policy, objective, tiny.samples(LENGTHS), course, recorder, peers=group)]  # fmt: skip
    return events, recorder.gradients


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
    main(Path(sys.argv[1]), Path(sys.argv[2]))
