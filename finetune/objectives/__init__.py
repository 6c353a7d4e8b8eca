"""What a run minimises, one file each; the file's name is the word in ``objective.method``.

An objective returns sums and counts; the loop divides once by the count of the whole step, so that any split of a step
into micro-batches gives the same gradient.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from finetune import schedule
from finetune.kernels import log_probabilities

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.model import Policy

Tallies = dict[str, tuple[float, float]]
"""Name of a figure → (its sum, what that is divided by)."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed samples. ids, positions: [1, tokens]; bounds: samples' starts and the end.

    ``predictors`` are the positions whose hidden state predicts a supervised token, ``targets`` those tokens,
    ``scales`` their weights in the loss: [n]. Without scales every weight is 1. ``spans``: how many of the n are each
    sample's. ``rows``: the places of the rows; a pair is one row and two samples, the chosen first.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    bounds: tuple[int, ...]
    predictors: torch.Tensor
    targets: torch.Tensor
    scales: torch.Tensor | None
    spans: tuple[int, ...]
    rows: tuple[str, ...]
    by_row: bool = False
    """Whether the summed loss is divided by the number of rows, not by the tokens' weights."""
    wanted: torch.Tensor | None = None
    """Of each row, whether its answer is wanted: [rows]."""
    beside: Batch | None = None
    """Samples that are looked at and not trained on: KTO's answers under prompts that they do not belong to."""
    zero: float = 0.0
    """KTO's zero point, one number for the whole step."""

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]

    @property
    def supervised(self) -> int:
        return len(self.targets)

    @property
    def count(self) -> float:
        """What the summed loss is divided by: the rows, or the sum of the weights, which is the number of tokens where
        all are 1."""
        if self.by_row:
            return len(self.rows)
        return len(self.targets) if self.scales is None else float(self.scales.sum(dtype=torch.float64))

    def sizes(self) -> torch.Tensor:
        """Each sample's supervised tokens, by their weights: [samples], fp64."""
        weights = torch.ones(self.supervised, device=self.ids.device) if self.scales is None else self.scales
        return torch.stack([part.sum() for part in torch.split(weights.double(), list(self.spans))])

    def to(self, device: torch.device) -> Batch:
        return replace(
            self, ids=self.ids.to(device), positions=self.positions.to(device), predictors=self.predictors.to(device),
            targets=self.targets.to(device), scales=None if self.scales is None else self.scales.to(device),
            wanted=None if self.wanted is None else self.wanted.to(device),
            beside=None if self.beside is None else self.beside.to(device),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StepLoss:
    """Weighted loss, summed; ``count`` is what the step's sum is divided by. The sum carries the graph.

    ``tallies``: other figures of these rows.
    """

    total: torch.Tensor
    count: float
    tallies: Tallies = field(default_factory=dict)


Each = Callable[[Sequence[Batch], Callable[[Batch], float]], list[float]]
"""Batches, and what finds a number of one of them → those numbers, in the batches' order."""


def one_by_one(batches: Sequence[Batch], find: Callable[[Batch], float]) -> list[float]:
    return [find(batch) for batch in batches]


class Objective(Protocol):
    """What the loop asks of a file of this folder."""

    def batches(self, examples: Sequence[Example], limit: int) -> list[Batch]:
        """A step's samples in micro-batches of at most ``limit`` tokens, or of a single row."""

    def begin(self, policy: Policy, batches: list[Batch], each: Each = one_by_one) -> list[Batch]:
        """What a step must know as a whole before its first gradient, in its batches. Without a graph.

        ``each``: how a number of every batch is found, where several processes share that.
        """

    def loss(self, policy: Policy, batch: Batch) -> StepLoss: ...


class Ranking(Objective, Protocol):
    """What judging held-out rows asks of an objective of judged answers."""

    paired: bool
    """Whether a row is a pair; else it is wanted or not."""
    scored: bool
    """Whether a text is read as a reward by a score head, which has no reference; else as its log-probability."""

    def texts(self, examples: Sequence[Example]) -> list[Example]:
        """Two samples for each row, whose log-probabilities ``judge`` takes."""

    def read(self, policy: Policy, batch: Batch) -> torch.Tensor:
        """What is made of each text: [texts], fp64, with a graph."""

    def judge(
        self, examples: Sequence[Example], found: torch.Tensor, origin: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(each row's loss [rows], its rewards) from its texts' log-probabilities [rows, 2], the model's and the
        reference's; None where the reference is needed and not known."""


def get(method: str, settings: Mapping[str, Any]) -> Objective:
    """The objective of that name. ``settings``: its keys in the recipe; KTO's also ``longest``, and GRPO's ``sample``
    in place of those that say how answers are sampled and judged."""
    module: Any = importlib.import_module(f"{__name__}.{method}")
    made: Objective = module.make(**settings)
    return made


def collate(examples: Sequence[Example]) -> Batch:
    """Lay samples one after the other; positions restart, and no sample's first token is ever a target."""
    samples = [half for example in examples for half in example.halves()]
    bounds, predictors, targets, scales = [0], [], [], []
    for sample in samples:
        weights = torch.tensor(sample.weights)
        answer = weights.nonzero().squeeze(1)
        predictors.append(answer - 1 + bounds[-1])
        targets.append(torch.tensor(sample.ids)[answer])
        scales.append(weights[answer])
        bounds.append(bounds[-1] + len(sample.ids))
    weighted = torch.cat(scales)
    return Batch(
        ids=torch.tensor([token for sample in samples for token in sample.ids])[None],
        positions=torch.cat([torch.arange(len(sample.ids)) for sample in samples])[None],
        bounds=tuple(bounds),
        predictors=torch.cat(predictors),
        targets=torch.cat(targets),
        scales=None if bool((weighted == 1).all()) else weighted,
        spans=tuple(map(len, targets)),
        rows=tuple(example.where for example in examples),
    )


def packs(examples: Sequence[Example], limit: int) -> list[list[int]]:
    """Which of a step's samples go through together."""
    return schedule.pack([len(example.ids) for example in examples], limit)


def log_probs(policy: Policy, batch: Batch) -> torch.Tensor:
    """Each sample's log-probability given what stands before its supervised tokens: [samples], fp64, with a graph."""
    hidden = policy.hidden(batch.ids, batch.positions, batch.bounds)[0]
    of = log_probabilities.by_sample if policy.kernels else log_probabilities.plain
    return of(hidden[batch.predictors], policy.head, batch.targets, batch.spans, batch.scales)


def reference_log_probs(policy: Policy, batch: Batch) -> torch.Tensor:
    """The same by the model as the run found it: the base, or the adapter that it began from. Without a graph."""
    with policy.evaluating(adapter=False):
        return log_probs(policy, batch)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What the objectives of pairs share: the loss is a mean over pairs, made of either text's log-probability."""

    paired = True
    scored = False
    referred = False
    """Whether the loss looks at a reference policy."""

    def batches(self, examples: Sequence[Example], limit: int) -> list[Batch]:
        """A pair is one sample of the store, so that nothing can part it."""
        return [
            replace(collate([examples[i] for i in pack]), by_row=True) for pack in packs(examples, limit)
        ]  # fmt: skip

    def begin(self, policy: Policy, batches: list[Batch], each: Each = one_by_one) -> list[Batch]:
        return batches

    def loss(self, policy: Policy, batch: Batch) -> StepLoss:
        origin = reference_log_probs(policy, batch).view(-1, 2) if self.referred else None
        found = self.read(policy, batch).view(-1, 2)
        losses, rewards = self.each(found, origin, batch.sizes().view(-1, 2))
        return StepLoss(total=losses.sum(), count=batch.count, tallies=_told(found, rewards, scored=self.scored))

    def read(self, policy: Policy, batch: Batch) -> torch.Tensor:
        return log_probs(policy, batch)

    def each(
        self, found: torch.Tensor, origin: torch.Tensor | None, sizes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(loss [pairs], rewards [pairs, 2]) from log-probabilities and numbers of tokens [pairs, 2], chosen first."""
        raise NotImplementedError

    def texts(self, examples: Sequence[Example]) -> list[Example]:
        return [half for example in examples for half in example.halves()]

    def judge(
        self, examples: Sequence[Example], found: torch.Tensor, origin: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.referred and origin is None:
            return None
        sizes = [sum(text.weights) for text in self.texts(examples)]
        return self.each(found, origin, torch.tensor(sizes, dtype=torch.float64).view(-1, 2))


def _told(found: torch.Tensor, rewards: torch.Tensor, *, scored: bool) -> Tallies:
    """The figures of some pairs: rewards, how often the chosen has more, and log-probabilities where these are read."""
    pairs = len(found)
    right = better(rewards[:, 0], rewards[:, 1]).sum()
    sums = torch.stack([*rewards.sum(dim=0), right, *found.detach().sum(dim=0)]).tolist()
    names = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected")
    return {name: (value, pairs) for name, value in zip(names[: 3 if scored else 5], sums, strict=False)}


def better(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """1 where ``one`` is more, 0 where it is less, a half where they are equal: chance, which is where a run begins."""
    return (one > other).double() + 0.5 * (one == other).double()


def updates(objective: Objective) -> int:
    """How many updates a step makes from the same batches: one, but where an objective says otherwise."""
    return int(getattr(objective, "updates", 1))


def averaged(tallies: Sequence[Tallies]) -> dict[str, float]:
    """The figures of a whole step from those of its micro-batches."""
    sums: dict[str, list[float]] = {}
    for tally in tallies:
        for name, (value, of) in tally.items():
            entry = sums.setdefault(name, [0.0, 0.0])
            entry[0], entry[1] = entry[0] + value, entry[1] + of
    found = {name: value / of for name, (value, of) in sums.items() if of}
    if {"rewards/chosen", "rewards/rejected"} <= set(found):
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
    return found
