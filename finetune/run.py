"""A run in its folder: what it is, whether this recipe may begin or go on there, and how it judges itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from finetune import evaluate, forms, gather, hardware, identity, model, plan, recipe, scores, sharding, taught
from finetune.errors import RecipeError
from finetune.identity import Identity
from finetune.interrupts import StopRequest
from finetune.loading import BaseForm
from finetune.loop import Course
from finetune.model import Policy
from finetune.peers import ALONE, PASS, Peers
from finetune.prepare import Prepared
from finetune.recipe.objective_keys import FORMATS
from finetune.runfolder import RunFolder
from finetune.taught import Taught
from finetune.terminal import ByteBar, Progress, Terminal, size

Known = list[tuple[evaluate.HeldOut, evaluate.How, evaluate.Judged]]


class Run:
    """A run in its folder. ``stored`` is the identity of one that has begun; without it the base is digested.

    ``digests``: of the base's files, where they are known. ``peers``: the other processes that work on it.
    """

    def __init__(
        self, prepared: Prepared, terminal: Terminal, stored: Identity | None = None,
        digests: dict[str, str] | None = None, peers: Peers = ALONE,
    ) -> None:  # fmt: skip
        assert prepared.base is not None
        assert prepared.samples is not None
        self.prepared, self.base, self.samples, self.terminal = prepared, prepared.base, prepared.samples, terminal
        self.folder = RunFolder(Path(prepared.plan.output))
        self.peers = peers
        if peers.world > 1:
            peers.sharded = prepared.recipe.train.shard == "fsdp"
        self.identity = stored or self._identity(digests)

    def _identity(self, digests: dict[str, str] | None) -> Identity:
        chosen = self.prepared.plan
        bar = ByteBar.over(self.terminal, "verifying the base", self.base.files())
        base, start = digests or self.base.digests(bar.more), self.prepared.start
        if start is not None:
            start.refuse_other_base(base)
        return Identity(
            recipe=dict(recipe.flatten(self.prepared.recipe)),
            data=gather.digests(self.prepared.recipe),
            base=base,
            resolved={
                "compute": chosen.compute,
                "recompute": chosen.recompute,
                "recomputed_layers": chosen.recomputed_layers,
                "micro_batch_tokens": chosen.micro_batch_tokens,
            },
            environment={**self._environment(), **identity.processes(self.peers.world)},
            together=list(self.prepared.together),
            start=dict(start.digests) if start else {},
            teacher=self.prepared.teacher.digests(base, self.terminal) if self.prepared.teacher else {},
        )

    def _environment(self) -> dict[str, Any]:
        packages = forms.packages(self.prepared.recipe.quantize.weights)
        return hardware.environment(self.prepared.hardware, *packages)

    def settle(self, extend: bool) -> None:
        """Begin in an empty folder, or take up the run that is there. Call with the folder locked."""
        self.folder.clear_leftovers()
        stored = identity.read(self.folder.identity)
        if stored is None:
            self.folder.refuse_foreign()
            self.identity.write(self.folder.identity)
            return
        for remark in identity.compare(stored, self.identity, self.folder.root, extend=extend):
            self.terminal.say(remark)
        self._check_length(stored)
        # What `auto` became belongs to the run: free memory may differ today, the bits must not.
        changed = Identity(
            recipe=self.identity.recipe,
            data=stored.data,
            base=stored.base,
            resolved=stored.resolved,
            environment=stored.environment,
            together=stored.together,
            start=stored.start,
            teacher=stored.teacher,
        )
        if changed != stored:
            changed.write(self.folder.identity)
        self.identity = changed
        torch.set_num_threads(int(stored.environment["threads"]))

    def resolve(self, resolved: dict[str, Any]) -> None:
        """What ``auto`` became has changed: durable from here on."""
        self.identity = replace(self.identity, resolved=resolved)
        if not self.peers.rank:
            self.identity.write(self.folder.identity)

    def _check_length(self, stored: Identity) -> None:
        """A longer run must begin with the very steps of the shorter one."""
        lengths, parts = self.samples.lengths.tolist(), self.samples.part_list()
        train = self.prepared.recipe.train
        before = train.model_copy(
            update={"steps": _number(stored.recipe["train.steps"]), "epochs": _number(stored.recipe["train.epochs"])}
        )
        old = plan.course_steps(self.prepared.recipe.model_copy(update={"train": before}), lengths, parts)
        new = plan.course_steps(self.prepared.recipe, lengths, parts)
        patience = self.prepared.recipe.evaluate.early_stopping_patience
        former = _number(stored.recipe["evaluate.early_stopping_patience"])
        if patience is not None and (former is None or patience < former):
            what = f"the run has a patience of {'no end' if former is None else former}: it may stand beyond this one"
            raise RecipeError(what, "evaluate.early_stopping_patience", "it can be raised, or null, not lowered")
        if new[: len(old)] != old:
            what = f"the run has {len(old)} steps, which are not the first of these {len(new)}"
            raise RecipeError(what, "train.steps", "a run can be lengthened, not shortened or cut differently")

    def course(self) -> Course:
        train = self.prepared.recipe.train
        steps = plan.course_steps(self.prepared.recipe, self.samples.lengths.tolist(), self.samples.part_list())
        return Course(
            steps=tuple(steps), peak_rate=train.learning_rate, warmup=train.warmup, kind=train.schedule,
            max_grad_norm=train.max_grad_norm, micro_batch_tokens=self.identity.resolved["micro_batch_tokens"],
            seed=train.seed, workers=train.workers,
            memory=self.prepared.plan.budget.training if self.prepared.plan.device == "cpu" else 0,
        )  # fmt: skip

    def form(self) -> BaseForm:
        chosen = self.prepared.plan
        return BaseForm(
            weights=chosen.weights,
            double=chosen.double,
            compute=self.identity.resolved["compute"],
            device=chosen.device,
        )

    def load(self, progress: Callable[[int, int], None] | None = None) -> Policy:
        """The base, or this process's shards of it. Raises as ``model.load_base`` and ``sharding.load``."""
        if not self.peers.sharded:
            return model.load_base(self.base, self.form(), progress)
        shards = sharding.load(self.base, self.form(), self.peers.world, progress)
        policy = model.policy_of(self.base, shards)
        held = size(sharding.held_bytes(shards))
        self.terminal.say(f"each of {self.peers.world} processes holds {held}, its part of the decoder layers")
        return policy

    def announce(self, policy: Policy, stop: StopRequest) -> None:
        """Let the others pass along wherever the first process looks at a base in shards outside a step."""

        def begins() -> None:
            if not self.peers.in_step:
                if stop.requested:  # here: within a pass the others would wait for ever
                    raise KeyboardInterrupt
                self.peers.say(PASS)
                self.peers.in_pass = True

        def ends() -> None:
            self.peers.in_pass = False

        sharding.announce(policy.causal_lm, begins, ends)

    def how(self) -> evaluate.How:
        wanted = self.prepared.recipe.evaluate
        return evaluate.How(
            metrics=wanted.metrics, max_new_tokens=wanted.max_new_tokens, batch_rows=wanted.batch_rows,
            micro_batch_tokens=self.identity.resolved["micro_batch_tokens"], asked=wanted.asked(),
            objective=self.prepared.objective if self.prepared.recipe.objective.rows in FORMATS else None,
            taught=taught.digest(self.folder.root / taught.FOLDER),
        )  # fmt: skip

    def judges_at(self, step: int, total: int) -> bool:
        every = self.prepared.recipe.evaluate.every
        return every > 0 and step % every == 0 and step < total

    def judge(self, policy: Policy, name: str, *, adapter: bool = True, known: Known | None = None) -> None:
        """Evaluate and store the scores under ``name``, unless they are there already.

        ``known``: judgements of the same model, which are looked up there and added to it.
        """
        held_out = self.prepared.held_out
        if held_out is None or name in scores.read(self.folder):
            return
        for rows, how, judged in known or ():
            if (rows, how) == (held_out, self.how()):
                scores.record(self.folder, name, judged, held_out)
                return
        bars: dict[str, Progress] = {}
        whose = " ".join(filter(None, (self.prepared.located.name, name)))

        def show(what: str, done: int, of: int) -> None:
            bars.setdefault(what, Progress(self.terminal, f"judging {whose}: {what}"))(done, of)

        origin = self.origin() if adapter or self.identity.teacher else None
        with self.peers.noticing():
            judged = evaluate.judge(policy, held_out, self.how(), adapter=adapter, progress=show, origin=origin)
        scores.record(self.folder, name, judged, held_out)
        if known is not None:
            known.append((held_out, self.how(), judged))

    def right(self, policy: Policy) -> int:
        """How many held-out questions a policy answers right."""
        held_out, how = self.prepared.held_out, replace(self.how(), metrics=("exact_match",))
        assert held_out is not None
        bar = Progress(self.terminal, "judging again: answers")
        found = evaluate.judge(policy, held_out, how, progress=lambda what, done, of: bar(done, of))
        return round(float(found.scores["exact_match"]) * len(held_out.questions))

    def origin(self) -> list[float] | Taught | None:
        """What the held-out rows are compared with: the reference's log-probabilities of their texts, from the
        judgement before the first step, or what the teacher said of them; None where that is not known."""
        held_out, objective = self.prepared.held_out, self.how().objective
        if held_out is not None and self.identity.teacher and taught.is_one(self.folder.root / taught.FOLDER):
            said = taught.read(self.folder.root / taught.FOLDER)
            if not said.missing(held_out.examples):
                return said
            self.terminal.say("the teacher said nothing of some of these rows: teacher_kl is left out")
        if held_out is None or objective is None:
            return None
        return scores.log_probs(self.folder, held_out, repr(objective))


def _number(value: Any) -> Any:
    return None if value == "null" else value
