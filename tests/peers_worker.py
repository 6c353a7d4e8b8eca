"""The processes of a job that the tests start: they train steps of a tiny base together, and write what they saw.

``python -m tests.peers_worker BASE OUT PORT WORLD …`` imports once and forks WORLD processes, then those of the next.
"""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finetune import base as bases
from finetune import jobplace, loading, model, objectives, peers, pipeline, sharding, shared_base, teacher
from finetune.dataset import Example
from finetune.errors import ModelError
from finetune.loading import BaseForm
from finetune.loop import run
from finetune.model import Policy
from finetune.objectives import Objective, sft
from finetune.taught import Facts
from finetune.teacher import Live, Stored
from finetune.terminal import Terminal
from tests import tiny
from tests.objectives import rows

LENGTHS = [40, 12, 33, 25, 18, 50, 9, 28, 61, 15, 22, 37]
STEPS = [(0, 1, 2, 3, 4), (5, 6, 7, 8), (9,), (10, 11, 0)]
PROMPT = list(range(1, 9))


@dataclass(frozen=True, kw_only=True)
class Case:
    """How the steps are trained; with ``shard`` on shards of the base where there are several processes.

    ``teacher``: of a distilled case; live over the same base, or stored.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    weights: str = "fp32"
    shard: bool = False
    recompute: bool = False
    micro_batch_tokens: int = 64
    objective: str = "sft"
    teacher: str | None = None

    @property
    def judged(self) -> bool:
        """Whether its rows are judged answers, drawn by ``rows``."""
        return self.objective not in ("sft", "distill")


REWARD = {"margin": 0.4, "centre_rewards_coefficient": 0.1}
DISTILL = {"divergence": "jsd", "beta": 0.3, "temperature": 1.5, "alpha": 0.25}
CASES = {
    "plain": Case(),
    "dropout": Case(fields={"lora_dropout": 0.3}),
    "one pack a step": Case(micro_batch_tokens=400),  # fewer micro-batches than processes
    "kto": Case(objective="kto"),
    "reward": Case(objective="reward"),
    "distill, live": Case(objective="distill", teacher="live", fields={"lora_dropout": 0.3}),
    "distill, stored": Case(objective="distill", teacher="stored"),
    "shards": Case(shard=True),
    "shards, bf16": Case(shard=True, weights="bf16"),
    "shards, one pack a step": Case(shard=True, micro_batch_tokens=400),
    "shards, nf4, dropout, recomputed": Case(
        shard=True, weights="nf4", recompute=True, fields={"lora_dropout": 0.3}
    ),
    "shards, kto": Case(shard=True, weights="nf4", objective="kto"),
    "shards, reward": Case(shard=True, objective="reward"),
    "shards, distill, stored": Case(shard=True, objective="distill", teacher="stored"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A run of two processes: its recipe's overrides, and where its parts end."""

    overrides: tuple[str, ...]
    parts: tuple[int | None, ...] = (None,)
    shard: Any = "none"


WORK = "work"
"""The workplace of whole runs, beside what the worlds write."""
SHORT = (
    "train.max_length=64", "train.micro_batch_tokens=128", "train.examples_per_step=12", "train.steps=4",
    "adapter.lora_dropout=0.1", "evaluate.metrics=[loss]", "evaluate.every=2",
)  # fmt: skip
PAIRS = (*SHORT, "objective.method=reward", "data.train_path=pairs.jsonl", "data.eval_path=judged.jsonl")
TAUGHT = (*SHORT, "objective.method=distill")
LIVE, STORED = ((*TAUGHT, f"objective.teacher={place}") for place in ("runs/teacher", "said"))
IN_TWO = (2, None)
FSDP = "train.shard=fsdp"
RUNS = {
    "reward": Whole(overrides=PAIRS),
    "reward-in-two": Whole(overrides=PAIRS, parts=IN_TWO),
    "reward-in-shards": Whole(overrides=(*PAIRS, FSDP), parts=IN_TWO, shard="fsdp"),
    "live": Whole(overrides=LIVE),
    "live-in-two": Whole(overrides=LIVE, parts=IN_TWO),
    "stored": Whole(overrides=STORED),
    "stored-in-shards": Whole(overrides=(*STORED, FSDP), parts=IN_TWO, shard="fsdp"),
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
    fail(base, out, group)
    if world == 2:
        try:
            whole_runs(out.parent / WORK)
        except Exception as error:  # noqa: BLE001 - what the steps found is told nevertheless
            (out / f"runs-{group.rank}.txt").write_text(repr(error))


def fail(base: Path, out: Path, group: peers.Peers) -> None:
    """One process meets a fault, and the others hear of it."""
    try:
        train(load(base, CASES["plain"], group), CASES["plain"], group, Failing(group.rank))
    except ModelError as error:
        group.tell(error)
        (out / f"fault-{group.rank}.json").write_text(json.dumps([type(error).__name__, str(error)]))


def whole_runs(work: Path) -> None:
    """Every run of ``RUNS`` from its beginning to its end, some in two parts, as the processes of a launcher do."""
    os.chdir(work)
    for name, wanted in RUNS.items():
        sets = (*wanted.overrides, f"output=runs/{name}")
        for until in wanted.parts:
            screen = Terminal(out=io.StringIO(), quiet=True, silent=True)
            pipeline.train(Path("r.yaml"), sets, screen, until=until, place=jobplace.find(2, shard=wanted.shard))


def steps(base: Path, out: Path, name: str, group: peers.Peers) -> None:
    case = CASES[name]
    out.mkdir(parents=True, exist_ok=True)
    policy = load(base, case, group)
    if case.teacher == "stored":
        policy = replace(policy, teacher=stored(base, out / f"teacher-{group.rank}"))
    events, figures, gradients = train(policy, case, group, objective_of(case))
    held = sharding.held_bytes(policy.causal_lm) if group.sharded else 0
    told = {
        "events": events, "figures": figures, "held": held, "answer": look(policy, group) if case.shard else []
    }  # fmt: skip
    (out / f"told-{group.rank}.json").write_text(json.dumps(told))
    named = {f"{step}|{name}": grad for step, grads in enumerate(gradients) for name, grad in grads.items()}
    save_file(named, out / f"gradients-{group.rank}.safetensors")


def load(base: Path, case: Case, group: peers.Peers) -> Policy:
    shards = case.shard and group.world > 1
    if group.world > 1:
        group.sharded = shards
    inspected, form = bases.inspect(base), BaseForm(weights=case.weights, double=True, compute="fp32", device="cpu")
    if case.objective == "reward":
        inspected = bases.as_scorer(inspected)
    loaded = sharding.load(inspected, form, group.world) if shards else loading.load(inspected, form)
    bare = model.policy_of(inspected, loaded)
    speaker = speaking(bare) if case.teacher == "live" else None
    policy = replace(tiny.adapt(bare, **case.fields), teacher=speaker)
    if policy.scored:  # the head begins as zeros, through which no gradient reaches the adapter
        head = policy.causal_lm.score.modules_to_save["default"].weight
        torch.nn.init.normal_(head, std=0.2, generator=torch.Generator().manual_seed(5))
    if case.recompute:
        policy.recompute_layers()
    return policy


def speaking(bare: Policy) -> Live:
    """A teacher: another adapter over the same base."""
    policy = tiny.adapt(shared_base.view(bare), seed=5, r=8, lora_alpha=16)
    policy.model.requires_grad_(False)
    return Live(policy=policy)


def stored(base: Path, out: Path) -> Stored:
    """What that teacher said of the rows."""
    facts = Facts(teacher={"a": "1"}, name="t", vocabulary="v", temperature=1.5, top_k=16, width=262)
    speaker = speaking(tiny.load(base))
    return Stored(record=teacher.write(out, facts, tiny.samples(LENGTHS), lambda: speaker, 40, lambda *_: None))


def objective_of(case: Case) -> Objective:
    settings = {"reward": REWARD, "distill": DISTILL}
    if case.objective in settings:
        return objectives.get(case.objective, settings[case.objective])
    return rows.make(case.objective) if case.judged else sft  # type: ignore[return-value]


def samples(case: Case) -> list[Example]:
    kind = "dpo sigmoid" if case.objective == "reward" else case.objective  # pairs
    return rows.drawn(kind, seed=3) if case.judged else tiny.samples(LENGTHS)


def train(
    policy: Policy, case: Case, group: peers.Peers, objective: Any
) -> tuple[list[tuple[float, ...]], list[dict[str, float]], list[Any]]:
    """Each step's numbers, figures and gradients."""
    examples = samples(case)
    order = [range(len(examples)), range(len(examples) // 2)] if case.judged else STEPS
    course = tiny.course(order, micro_batch_tokens=case.micro_batch_tokens, max_grad_norm=1e9)
    recorder = tiny.Recorder(policy)
    done = list(run(policy, objective, examples, course, recorder, peers=group))
    events = [(one.step, one.loss, one.grad_norm, one.tokens, one.supervised, one.samples) for one in done]
    return events, [one.figures for one in done], recorder.gradients


def look(policy: Policy, group: peers.Peers) -> list[Any]:
    """An answer of the first process's, or the rewards of one text; the others pass along."""
    if group.rank:
        while group.hear() == peers.PASS:
            sharding.pass_along(policy)
        return []
    if group.sharded:
        sharding.announce(policy.causal_lm, lambda: group.say(peers.PASS), lambda: None)
    with policy.evaluating():
        answer = rated(policy) if policy.scored else policy.generate([PROMPT], max_new_tokens=8)[0]
    group.over()
    return answer


def rated(policy: Policy) -> list[float]:
    ids, places = torch.tensor([PROMPT]), torch.arange(len(PROMPT))[None]
    found: list[float] = policy.rate(policy.hidden(ids, places, (0, len(PROMPT)))[0]).tolist()
    return found


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
