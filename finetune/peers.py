"""The processes of one job: each has the whole model, takes its share of every step, and knows what the others found.

The first process leads: it reads and writes the run folder, judges, and says before each step what comes next. The
others follow. All of them draw the same samples in the same micro-batches with the same noise as a single process
would; only who computes which is divided, and the adapter's gradients are summed. Nothing that is sent is pickled:
tensors, bytes and JSON.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from finetune import allreduce, schedule
from finetune.errors import EnvironmentFault, Interrupted, ModelError

if TYPE_CHECKING:
    from finetune.jobplace import Place

STEP, COMPARE, OVER, PASS = 1, 2, 3, 4
"""What the first process says that comes next."""
_PATIENCE = timedelta(days=7)
"""How long the others wait while the first one judges or writes. One that dies is noticed at once, by its socket."""
_SOURCE = re.compile(r"^\[\S+:\d+\] ")
"""Where in gloo's own source an error was made."""


class PeerLost(Interrupted):
    """Another process of the job has ended: this one cannot go on alone."""


class OutOfMemoryElsewhere(torch.OutOfMemoryError):
    """Another process ran out of memory in this step: all of them take it again with less."""


class Peers:
    """One process alone: nothing is shared and nobody is asked."""

    rank, world, local_rank = 0, 1, 0
    sharded = False
    """Whether the processes hold shards of one base, so that each pass of one is a pass of all."""
    in_step = in_pass = False
    """Whether this process is within a step, or within a pass that it has announced."""
    stopping: Callable[[], bool] = staticmethod(lambda: False)
    """Whether this process was asked to stop, which all hear of in the next step."""

    def share(self, batches: Sequence[Any]) -> Iterable[tuple[int, Any]]:
        """Those of a step's micro-batches that this process computes, each with its number in the step."""
        return enumerate(batches)

    def each(self, batches: Sequence[Any], find: Callable[[Any], float]) -> list[float]:
        """A number of every batch, in their order. Raises as ``gather``."""
        return [find(batch) for batch in batches]

    def keep_up(
        self, batches: Sequence[Any], loss: Callable[[Any], torch.Tensor], parameters: Sequence[torch.nn.Parameter]
    ) -> None:
        """After the own share: take part in the passes that others with more still make, and keep nothing of it."""

    def gather(self, results: dict[int, Any], parameters: Sequence[torch.nn.Parameter]) -> dict[int, Any]:
        """Sum the parameters' gradients over all processes; every process's results by number, in their order.

        Raises:
            PeerLost: a process has ended.
            OutOfMemoryElsewhere, ModelError: what another process has told instead of results.
        """
        return results

    def tell(self, error: torch.OutOfMemoryError | ModelError) -> None:
        """This process has no results for the step; the others, which wait for them, must know."""

    def say(self, word: int) -> None:
        """The first process: what comes next."""

    def over(self) -> None:
        """The first process: the others may leave, those that are still there."""
        if self.sharded and (self.in_step or self.in_pass):
            return  # they are in the middle of a pass: they end when this process does
        with contextlib.suppress(PeerLost):
            self.say(OVER)

    def hear(self) -> int:
        """The others: what comes next."""
        return OVER

    def send(self, data: bytes | None = None) -> bytes:
        """From the first process, which gives ``data``, to all."""
        return data or b""

    def compare(self, fingerprint: Callable[[], str], what: str) -> None:
        """Raise ModelError where the processes do not hold the same."""

    def barrier(self) -> None:
        """Wait until all processes are here."""

    def asked(self) -> bool:
        """Whether another process was asked to stop, as of the last step."""
        return False

    def noticing(self) -> contextlib.AbstractContextManager[None]:
        """Where passes wait for shards of the others: one that is gone is a PeerLost."""
        return contextlib.nullcontext()


ALONE = Peers()


class Group(Peers):
    """This process among ``place.world`` that a launcher has started.

    Raises:
        EnvironmentFault: the processes do not find one another.
    """

    def __init__(self, place: Place, device: str) -> None:
        self.rank, self.world, self.local_rank = place.rank, place.world, place.local_rank
        self._asked = False
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        try:
            if not dist.is_initialized():
                dist.init_process_group(backend, rank=place.rank, world_size=place.world)
            self._control = dist.new_group(backend="gloo", timeout=_PATIENCE)
        except (RuntimeError, ValueError) as error:
            what = f"the {place.world} processes do not find one another: {_first_line(error)}"
            raise EnvironmentFault(what, "MASTER_ADDR, MASTER_PORT", "see docs/scale.md") from None
        found = (dist.get_rank(), dist.get_world_size())
        if found != (place.rank, place.world):
            what = f"this is process {found[0]} of {found[1]}, not {place.rank} of {place.world} as was asked"
            raise EnvironmentFault(what, "WORLD_SIZE", "start the job anew")

    def share(self, batches: Sequence[Any]) -> Iterable[tuple[int, Any]]:
        self.in_step = True
        return ((number, batches[number]) for number in self._dealt(batches)[self.rank])

    def each(self, batches: Sequence[Any], find: Callable[[Any], float]) -> list[float]:
        found = {number: find(batch) for number, batch in self.share(batches)}
        for _ in range(self._fewer(batches)):
            find(_lightest(batches))
        told = self._faultless(self._exchange({"results": found, "stopping": self.stopping()}))
        return list(_numbered(told).values())

    def keep_up(
        self, batches: Sequence[Any], loss: Callable[[Any], torch.Tensor], parameters: Sequence[torch.nn.Parameter]
    ) -> None:
        kept = [one.grad for one in parameters]
        for _ in range(self._fewer(batches)):
            for one in parameters:
                one.grad = None
            loss(_lightest(batches)).backward()  # type: ignore[no-untyped-call]
        for one, grad in zip(parameters, kept, strict=True):
            one.grad = grad

    def _dealt(self, batches: Sequence[Any]) -> list[list[int]]:
        return schedule.deal([one.tokens for one in batches], self.world)

    def _fewer(self, batches: Sequence[Any]) -> int:
        """How many micro-batches more another process has, where that one waits for this one in each."""
        dealt = self._dealt(batches)
        return max(map(len, dealt)) - len(dealt[self.rank]) if self.sharded else 0

    def gather(self, results: dict[int, Any], parameters: Sequence[torch.nn.Parameter]) -> dict[int, Any]:
        bare = [number for number, one in enumerate(parameters) if one.grad is None]
        told = self._faultless(self._exchange({"results": results, "bare": bare, "stopping": self.stopping()}))
        self.in_step = False
        nobody = set(bare).intersection(*(one["bare"] for one in told))
        with _together():
            allreduce.sum_gradients([one for number, one in enumerate(parameters) if number not in nobody])
        return _numbered(told)

    def _faultless(self, told: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """What the processes gave, unless one has told of a fault instead."""
        self._asked = any(one.get("stopping") for one in told)
        for rank, one in enumerate(told):
            if "fault" in one:
                self.in_step = False
                what, where, fix = one["said"]
                what = f"{what} (process {rank} of {self.world})"
                raise OutOfMemoryElsewhere(what) if one["fault"] == "memory" else ModelError(what, where, fix)
        return told

    def tell(self, error: torch.OutOfMemoryError | ModelError) -> None:
        if self.sharded:  # the others are in a pass that waits for this process: they end when it does
            if isinstance(error, torch.OutOfMemoryError):
                what, fix = f"out of memory: {_first_line(error)}", "set train.micro_batch_tokens lower"
                raise EnvironmentFault(what, f"process {self.rank}", fix) from None
        elif self.in_step:
            model = isinstance(error, ModelError)
            said = list(error.faults[0]) if isinstance(error, ModelError) else [_first_line(error), "", ""]
            self._exchange({"fault": "model" if model else "memory", "said": said, "stopping": self.stopping()})
            self.in_step = False

    def say(self, word: int) -> None:
        self._broadcast(torch.tensor([word]))

    def hear(self) -> int:
        return int(self._broadcast(torch.zeros(1, dtype=torch.int64)))

    def send(self, data: bytes | None = None) -> bytes:
        size = int(self._broadcast(torch.tensor([len(data or b"")])))
        content = bytearray(data) if data else bytearray(size)
        return bytes(self._broadcast(torch.frombuffer(content, dtype=torch.uint8)).numpy()) if size else b""

    def compare(self, fingerprint: Callable[[], str], what: str) -> None:
        found = self._exchange({"is": fingerprint()})
        others = [rank for rank, one in enumerate(found) if one["is"] != found[0]["is"]]
        if others:
            fault = f"{what} of process {others[0]} of {self.world} is not that of the first"
            raise ModelError(
                fault, "", "are machines, versions and data the same everywhere? the last checkpoint is whole"
            )

    def barrier(self) -> None:
        self._exchange({})

    def asked(self) -> bool:
        return self._asked

    def noticing(self) -> contextlib.AbstractContextManager[None]:
        return _together(_from_the_network) if self.sharded else contextlib.nullcontext()

    def _broadcast(self, value: torch.Tensor) -> torch.Tensor:
        with _together():
            dist.broadcast(value, 0, group=self._control)
        return value

    def _exchange(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        """What every process gives, by rank."""
        text = json.dumps(value).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        with _together():
            dist.all_gather(sizes, torch.tensor([len(text)]), group=self._control)
            longest = max(int(size) for size in sizes)
            padded = torch.frombuffer(bytearray(text.ljust(longest)), dtype=torch.uint8)
            found = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world)]
            dist.all_gather(found, padded, group=self._control)
        return [json.loads(bytes(one.numpy())) for one in found]


def join(place: Place | None) -> Peers:
    """This process among those of its job, on the card that is its own; alone where there is no job.

    Raises:
        EnvironmentFault: there are fewer cards than processes, or the processes do not find one another.
    """
    if place is None:
        return ALONE
    card = torch.accelerator.current_accelerator(check_available=True)
    if card is not None:
        count = torch.accelerator.device_count()
        if place.local_rank >= count:
            what = f"process {place.local_rank} of this machine has no card: there are {count}"
            raise EnvironmentFault(what, "--processes", f"start at most {count}, or set CUDA_VISIBLE_DEVICES to more")
        torch.accelerator.set_device_index(place.local_rank)
    return Group(place, card.type if card else "cpu")


def _numbered(told: list[dict[str, Any]]) -> dict[int, Any]:
    """Every process's results by number, in their order."""
    return dict(sorted((int(number), value) for one in told for number, value in one["results"].items()))


def _lightest(batches: Sequence[Any]) -> Any:
    return min(batches, key=lambda one: one.tokens)


@contextlib.contextmanager
def _together(is_loss: Callable[[RuntimeError], bool] = lambda error: True) -> Iterator[None]:
    """Something that all processes do at once; where one of them is gone it fails."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if not is_loss(error):
            raise
        why = _SOURCE.sub("", _first_line(error)).partition(". ")[0]
        what = f"another process of this job has ended ({why})"
        raise PeerLost(what, fix="the same command goes on from the last checkpoint") from None


def _from_the_network(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or bool(_SOURCE.match(str(error)))


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
