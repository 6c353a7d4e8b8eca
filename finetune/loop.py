"""The training loop: steps in, numbers out. No YAML, no files, no callbacks.

``run`` is a generator. After each optimizer step it yields what happened and waits; the caller logs, saves, evaluates
or stops, and the loop knows nothing of it. Everything that a step needs is derived from its number (which samples,
which rate, which dropout noise), so that starting at step s gives the bits that an unbroken run would have had.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from finetune import hardware, objectives, schedule
from finetune.errors import EnvironmentFault, ModelError
from finetune.interrupts import out_of_reach
from finetune.optimizer import RATIO
from finetune.peers import ALONE, Peers

if TYPE_CHECKING:
    from finetune.dataset import Example
    from finetune.model import Policy
    from finetune.objectives import Batch, Objective, Tallies

_BEGINNING = 8190  # stands for a micro-batch's number in the noise of what an objective does before the first one


@dataclass(frozen=True, kw_only=True)
class Course:
    """The numbers that fix a run's course. ``micro_batch_tokens`` bounds the tokens of one forward pass.

    ``memory``: bytes that the process may hold before it gives free ones back between steps (0: it always does).
    """

    steps: tuple[tuple[int, ...], ...]
    peak_rate: float
    warmup: int
    kind: str
    max_grad_norm: float
    micro_batch_tokens: int
    seed: int
    workers: int = 0
    memory: int = 0

    def noise_seed(self, step: int, micro_batch: int) -> int:
        """Dropout noise belongs to these numbers, not to what ran before: resume needs no RNG state."""
        return ((self.seed * 1_000_003 + step) * 8191 + micro_batch) % 2**63

    def rate(self, step: int) -> float:
        total, peak = len(self.steps), self.peak_rate
        return schedule.learning_rate(step, total=total, peak=peak, warmup=self.warmup, kind=self.kind)


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """One finished optimizer step. ``step`` counts from 1; ``loss`` is the objective's mean over the whole step."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    supervised: int
    samples: int
    seconds: float
    waited: float
    """Of ``seconds``, those in which the device had nothing to do: the step's samples were fetched and collated."""
    loss_scale: float | None
    figures: dict[str, float] = field(default_factory=dict)
    """What else the objective tells of the step, by name."""


class _StepBatches(torch.utils.data.Dataset[Any]):
    """Step number → that step's micro-batches, already collated."""

    def __init__(self, examples: Sequence[Example], course: Course, objective: Objective) -> None:
        self.examples, self.course, self.objective = examples, course, objective

    def __len__(self) -> int:
        return len(self.course.steps)

    def __getitem__(self, step: int) -> list[Batch]:
        chosen = [self.examples[index] for index in self.course.steps[step]]
        return self.objective.batches(chosen, self.course.micro_batch_tokens)


def step_batches(
    examples: Sequence[Example], course: Course, objective: Objective, start: int
) -> Generator[list[Batch]]:
    """Each step's micro-batches, from step ``start`` on; those of the next step are fetched while one is computed."""
    data = _StepBatches(examples, course, objective)
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, sampler=range(start, len(data)), num_workers=course.workers
    )
    with out_of_reach():  # its workers are started here
        return _one_ahead(iter(loader))


def _one_ahead(feed: Iterator[list[Batch]]) -> Generator[list[Batch]]:
    with ThreadPoolExecutor(max_workers=1) as fetcher:
        coming = fetcher.submit(next, feed, None)
        while (batches := coming.result()) is not None:
            coming = fetcher.submit(next, feed, None)
            yield batches


def run(
    policy: Policy,
    objective: Objective,
    examples: Sequence[Example],
    course: Course,
    optimizer: torch.optim.Optimizer,
    start: int = 0,
    scaler: torch.amp.GradScaler | None = None,
    on_micro_batch: Callable[[int, int], None] = lambda done, of: None,
    peers: Peers = ALONE,
) -> Generator[StepDone]:
    """Train from step ``start`` to the end of the course, yielding after every optimizer step.

    ``peers``: who computes the step's other micro-batches.

    Raises:
        ModelError: a loss, gradient or weight that is not finite, with the rows of the batch.
        Interrupted: one of the peers is gone.
    """
    policy.model.train()
    with contextlib.closing(step_batches(examples, course, objective, start)) as fetched:
        for step in range(start, len(course.steps)):
            began = time.perf_counter()
            batches = next(fetched)
            waited = time.perf_counter() - began
            torch.manual_seed(course.noise_seed(step, _BEGINNING))
            batches = objective.begin(policy, batches, peers.each)
            for update in range(objectives.updates(objective)):
                if update:
                    _moved(policy, course, optimizer, scaler, step, batches)
                with _not_again(step) if update else contextlib.nullcontext():
                    told = _gradients(policy, objective, batches, course, step, scaler, on_micro_batch, peers, update)
            loss = sum(total for total, _ in told.values()) / sum(batch.count for batch in batches)
            done = end_step(policy, course, optimizer, scaler, step, batches, loss, began, waited)
            yield replace(done, figures=objectives.averaged([tallies for _, tallies in told.values()]))


def _gradients(
    policy: Policy, objective: Objective, batches: Sequence[Batch], course: Course, step: int,
    scaler: torch.amp.GradScaler | None, on_micro_batch: Callable[[int, int], None], peers: Peers, update: int,
) -> dict[int, tuple[float, Tallies]]:  # fmt: skip
    """The gradient of a step's mean loss, left in the parameters; each micro-batch's summed loss and its figures."""
    count, parameters = sum(batch.count for batch in batches), list(policy.trainable().values())
    told: dict[int, tuple[float, Tallies]] = {}
    for number, batch in peers.share(batches):
        torch.manual_seed(course.noise_seed(step, number + update * len(batches)))
        result = objective.loss(policy, batch.to(policy.device))
        stop_if_not_finite(result.total, "loss", step, batch.rows)
        scaled = result.total / count
        (scaler.scale(scaled) if scaler else scaled).backward()  # type: ignore[no-untyped-call]
        told[number] = result.total.item(), result.tallies
        on_micro_batch(number + 1, len(batches))
    peers.keep_up(batches, lambda batch: objective.loss(policy, batch.to(policy.device)).total, parameters)
    return peers.gather(told, parameters)


def end_step(
    policy: Policy, course: Course, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None,
    step: int, batches: Sequence[Batch], loss: float, began: float, waited: float,
) -> StepDone:  # fmt: skip
    """Take the optimizer's step from the gradients that the step's batches left, and say what happened."""
    norm = _moved(policy, course, optimizer, scaler, step, batches)
    hardware.trim(course.memory)
    return StepDone(
        step=step + 1,
        loss=loss,
        learning_rate=course.rate(step),
        grad_norm=norm,
        tokens=sum(batch.tokens for batch in batches),
        supervised=sum(batch.supervised for batch in batches),
        samples=sum(len(batch.rows) for batch in batches),
        seconds=time.perf_counter() - began,
        waited=waited,
        loss_scale=scaler.get_scale() if scaler else None,
    )


def _moved(
    policy: Policy, course: Course, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, step: int,
    batches: Sequence[Batch],
) -> float:  # fmt: skip
    """Update the weights; the gradient's norm. From here on the step cannot be taken again."""
    with _not_again(step):
        norm = _update(optimizer, list(policy.trainable().values()), course.rate(step), course.max_grad_norm, scaler)
    if norm is None or not math.isfinite(norm):
        stop_if_not_finite(torch.tensor(math.nan), "gradient", step, [row for batch in batches for row in batch.rows])
    return float(norm or 0.0)


@contextlib.contextmanager
def _not_again(step: int) -> Iterator[None]:
    """Some weights may have been moved: where memory runs out inside, the step cannot be repeated with less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = f"out of memory in the optimizer: {str(error).splitlines()[0]}"
        raise EnvironmentFault(what, f"step {step + 1}", "choose an 8-bit or paged train.optimizer") from None


def _update(
    optimizer: torch.optim.Optimizer,
    parameters: list[torch.nn.Parameter],
    rate: float,
    max_norm: float,
    scaler: torch.amp.GradScaler | None,
) -> float | None:
    """Clip, step, clear. Returns the gradient's 2-norm before clipping.

    With a loss scaler, a norm that overflowed skips the update and halves the scale (that is how fp16 finds its
    scale); only a scale that has reached 1 makes it a fault.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATIO, 1.0)
    if scaler:
        scaler.unscale_(optimizer)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))
    finite = math.isfinite(norm)
    if scaler:
        scaler.step(optimizer)
        scaler.update()
        if not finite and scaler.get_scale() >= 1.0:
            norm, finite = 0.0, True
    elif finite:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm if finite else None


def stop_if_not_finite(value: torch.Tensor, name: str, step: int, rows: Sequence[str]) -> None:
    """Raise ModelError with the rows where a value is NaN or infinite."""
    if bool(torch.isfinite(value).all()):
        return
    listed = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
    raise ModelError(
        f"the {name} of step {step + 1} is not finite",
        f"rows {listed}",
        "lower train.learning_rate, or look at these rows; the adapter of the step before is unharmed",
    )
