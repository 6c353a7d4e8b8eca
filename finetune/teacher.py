"""A teacher in memory, beside the policy that learns from it; and what it says of rows, written down.

Over the run's own base a teacher is one more view of that base (``shared_base``) under its own adapter: the weights are
there once. Its answers have no dropout and no gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune import manifest, model, schedule, shared_base, taught
from finetune.budget import BYTES, products
from finetune.errors import ModelError
from finetune.kernels import divergence
from finetune.kernels.divergence import Told, Top, Whole
from finetune.loading import BaseForm
from finetune.objectives import Batch, collate
from finetune.runfolder import remove
from finetune.taught import Facts, Taught
from finetune.terminal import ByteBar, Progress, Terminal

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.model import Policy
    from finetune.run import Run
    from finetune.teaching import Teacher

TOP_K = 64
"""Of the held-out rows, the likeliest tokens that are written down at each position."""
_PART_TOKENS = 32_768
"""Supervised tokens of one part of a record, or a little more."""


@dataclass(frozen=True, kw_only=True)
class Live:
    """A teacher that is asked in each step."""

    policy: Policy

    def tell(self, batch: Batch) -> Told:
        """What it makes of a batch, where ``batch.predictors`` are."""
        with self.policy.evaluating():
            hidden = self.policy.hidden(batch.ids, batch.positions, batch.bounds)[0]
        return Whole(hidden=hidden[batch.predictors], head=self.policy.head)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a teacher said once."""

    record: Taught

    def tell(self, batch: Batch) -> Told:
        return self.record.of(batch).to(batch.ids.device)


def load(found: Teacher, base: Policy | None, form: BaseForm, terminal: Terminal) -> Live | Stored:
    """A teacher, ready to be asked. ``base``: the run's own, bare, in ``form``.

    Raises:
        ModelError: as loading says.
    """
    if found.record is not None:
        return Stored(record=found.record)
    if found.base is not None:
        terminal.say(f"loading the teacher {found.name} as {found.weights}")
        bar = ByteBar(terminal, "loading the teacher").at
        policy = model.load_base(found.base, form_of(found, form), bar)
    else:
        assert base is not None
        policy = shared_base.view(base)
    if found.adapter is not None:
        policy = model.attach_saved(policy, found.adapter)
        policy.model.requires_grad_(False)
    return Live(policy=policy)


def form_of(found: Teacher, own: BaseForm) -> BaseForm:
    """How a teacher's base is held; ``own``: how the run's is."""
    if found.weights is None:
        return own
    compute = products(found.weights, own.compute)
    return replace(own, weights=found.weights, compute=compute, double=own.double or found.weights in BYTES)


def keep(run: Run, policy: Policy) -> None:
    """Write down what the teacher says of the held-out rows, in the run's folder, unless that is there: every judgement
    is compared with it, also where no teacher is at hand, as of the merged model."""
    held_out, found = run.prepared.held_out, run.prepared.teacher
    if found is None or held_out is None or "loss" not in run.prepared.recipe.evaluate.metrics:
        return
    out = run.folder.root / taught.FOLDER
    if taught.is_one(out) and not manifest.faults(out):
        return
    remove(out)
    top_k = found.record.facts.top_k if found.record else TOP_K
    facts = facts_of(run, top_k)
    bar = Progress(run.terminal, "asking the teacher of the held-out rows")
    write(out, facts, held_out.examples, lambda: policy.teacher, run.identity.resolved["micro_batch_tokens"], bar)


def facts_of(run: Run, top_k: int) -> Facts:
    """What a record of a run's teacher is of."""
    found, aim = run.prepared.teacher, run.prepared.recipe.objective
    assert found is not None
    shape = found.base.shape if found.base else run.base.shape
    record = found.record.facts if found.record else None
    return Facts(
        teacher=run.identity.teacher, name=record.name if record else found.name, vocabulary=found.vocabulary,
        temperature=aim.temperature or 1.0, top_k=top_k,
        width=record.width if record else min(shape.vocab, run.base.shape.vocab),
    )  # fmt: skip


def write(
    out: Path, facts: Facts, samples: Iterable[Example], asked: Callable[[], Live | Stored], micro_batch_tokens: int,
    progress: Callable[[int, int], None],
) -> Taught:  # fmt: skip
    """Ask a teacher of samples, each once, and write a record; a killed command goes on after the last whole part.

    ``asked``: loads the teacher, where something is left to ask.

    Raises:
        ModelError: the teacher said something that is no number.
        EnvironmentFault: the disk refuses.
    """
    keys = [taught.key_of(one) for one in samples]
    speaker: Live | Stored | None = None
    with taught.making(out, taught.made_of(facts, dict.fromkeys(keys))) as folder:
        writer = taught.Writer(folder)
        for number, group in enumerate(_groups(samples)):
            if not writer.has(number):
                speaker = asked() if speaker is None else speaker
                writer.put(number, _said(speaker, facts, group, micro_batch_tokens))
            progress(writer.samples, len(set(keys)))
        writer.close(facts)
    return taught.read(out)


def _groups(samples: Iterable[Example]) -> Iterator[list[Example]]:
    """The samples of each part, in their order."""
    group: list[Example] = []
    tokens = 0
    for one in taught.distinct(samples):
        group.append(one)
        tokens += sum(one.supervised)
        if tokens >= _PART_TOKENS:
            yield group
            group, tokens = [], 0
    if group:
        yield group


def _said(speaker: Live | Stored, facts: Facts, group: Sequence[Example], micro_batch_tokens: int) -> taught.Part:
    """What the teacher says of some samples, packed like training."""
    found: dict[int, Top] = {}
    for pack in schedule.pack([len(one.ids) for one in group], micro_batch_tokens):
        batch = collate([group[at] for at in pack])
        device = speaker.policy.device if isinstance(speaker, Live) else batch.ids.device
        top = divergence.top(speaker.tell(batch.to(device)), facts.top_k, facts.temperature, facts.width)
        if not bool(top.log_probs.isfinite().all()):
            raise ModelError(
                "the teacher's answer is not finite", batch.rows[0], "name another teacher, or another form"
            )
        for at, (low, high) in zip(pack, itertools.pairwise(itertools.accumulate(batch.spans, initial=0)), strict=True):
            found[at] = top.at(slice(low, high))
    parts = [found[at] for at in range(len(group))]
    ends = list(itertools.accumulate(len(one.rest) for one in parts))
    return taught.Part(keys=[taught.key_of(one) for one in group], ends=ends, top=divergence.joined(parts))
