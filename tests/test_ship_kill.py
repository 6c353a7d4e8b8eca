"""A merge or a release that is killed, or whose disk fills up: nothing that loads, and the same command completes it
with the bytes of an unbroken one, without making its whole shards again.

The quick part takes a sample of the points; ``make test-kill`` takes them all (marker ``long``).
"""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults import Fault, Mode, Op, Outcome, why_unavailable
from tests.faults.breaking import NEEDS_SPACE, RENAMES, WRITES, last_of, results_folder
from tests.faults.sweep import Lane, Rig, Sweep, Verdict, difference, keep, snapshot

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())

RELEASE = ["--what", "both", "--data-licence", "CC0-1.0", "--allow-unknown-licence"]
COMMANDS = {"merge": ["merge"], "release": ["release", *RELEASE]}
LOADS = ("config.json", "adapter_config.json")


class Shipping:
    """One finished run and the folder that its model is shipped to; ``what`` is a name of ``COMMANDS``."""

    def __init__(self, lane: Lane, what: str) -> None:
        self.lane, self.what, self.ship = lane, what, lane.folder / what
        self.log = self.give(fault=Fault(Mode.COUNT, 0, self.ship)).log
        self.whole = snapshot(self.out)

    @property
    def out(self) -> Path:
        return self.ship / "out"

    def give(self, **how: object) -> Outcome:
        """Give the command on an empty place."""
        shutil.rmtree(self.ship, ignore_errors=True)
        self.ship.mkdir()
        return self.again(**how)

    def again(self, **how: object) -> Outcome:
        name, *options = COMMANDS[self.what]
        arguments = [name, str(self.lane.run_folder), "--out", str(self.out), *options]
        return self.lane.trials.run("tests.faults.jobs:command", {"arguments": arguments}, **how)  # type: ignore[arg-type]

    def broken_at(self, mode: Mode, n: int) -> Verdict:
        outcome = self.give(fault=Fault(mode, n, self.ship))
        op = outcome.log[n - 1] if len(outcome.log) >= n else Op(0, "not reached", "", "")
        point = f"{self.what} {mode.name} at {n} ({op.name} {Path(op.path).name})"
        why = self._after(mode, op, outcome)
        shards = {path.name: path.stat().st_ino for path in self.ship.glob("*/model-*.safetensors")}
        outcome = self.again()
        unaided = (outcome.exit_code, outcome.stderr) == (0, "")
        if not unaided:
            why = why or f"the same command ended with {outcome.exit_code or outcome.signal}: {outcome.stderr[-300:]}"
            return Verdict(point, unaided, False, why)
        apart = difference(self.whole, snapshot(self.out))
        left = {path.name for path in self.ship.iterdir()} - {"out"}
        made = [name for name, node in shards.items() if (self.out / name).stat().st_ino != node]
        why = why or apart or (f"left {left}" if left else "") or (f"made again: {made}" if made else "")
        return Verdict(point, unaided, not apart, why)

    def _after(self, mode: Mode, op: Op, outcome: Outcome) -> str:
        """What is wrong right after the break."""
        if self.out.exists():
            return difference(self.whole, snapshot(self.out))
        if mode in (Mode.KILL_BEFORE, Mode.KILL_AFTER, Mode.TORN):
            return "" if outcome.signal == signal.SIGKILL else "it was not killed"
        lines = outcome.stderr.splitlines()
        if outcome.exit_code != 5 or len(lines) != 1 or not lines[0].startswith("environment: "):
            return f"it ended with {outcome.exit_code}: {outcome.stderr[-300:]}"
        return ""


@pytest.fixture(scope="module")
def rig(tiny_base_sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with Rig(tiny_base_sharded, tmp_path_factory.mktemp("ship")) as warm:
        yield warm


@pytest.fixture(scope="module")
def shipping(rig: Rig) -> dict[str, list[Shipping]]:
    """For each command one shipping a lane, each with the finished run of its lane."""

    def ready(lane: Lane) -> list[Shipping]:
        lane.whole("packing")
        return [Shipping(lane, what) for what in COMMANDS]

    with ThreadPoolExecutor(len(rig.lanes)) as pool:
        lanes = list(pool.map(ready, rig.lanes))
    return {what: [lane[number] for lane in lanes] for number, what in enumerate(COMMANDS)}


def sweep(shippings: Sequence[Shipping], points: Sequence[tuple[Mode, int]]) -> Sweep:
    """Every point, on all lanes at once."""
    import time

    began = time.monotonic()

    def share(number: int) -> list[Verdict]:
        return [shippings[number].broken_at(*point) for point in points[number :: len(shippings)]]

    with ThreadPoolExecutor(len(shippings)) as pool:
        verdicts = [verdict for found in pool.map(share, range(len(shippings))) for verdict in found]
    return Sweep(verdicts, time.monotonic() - began)


@pytest.mark.parametrize("what", COMMANDS)
def test_broken_at_an_operation(shipping: dict[str, list[Shipping]], what: str) -> None:
    log, draw = shipping[what][0].log, random.Random(1)
    points = [
        (Mode.KILL_AFTER, last_of(log, RENAMES, "model-00002")),
        (Mode.TORN, last_of(log, WRITES, "model-00003")),
        (Mode.KILL_BEFORE, last_of(log, RENAMES, "/out")),
        (Mode.KILL_AFTER, last_of(log, RENAMES, "/out")),
        (Mode.TORN, last_of(log, WRITES, "manifest.json")),
        (Mode.ENOSPC, last_of(log, WRITES, "model-00002")),
        (Mode.ENOSPC, last_of(log, WRITES, "config.json")),
        (Mode.SHORT_WRITE, last_of(log, WRITES, "model-00003")),
    ]
    points += [(draw.choice((Mode.KILL_BEFORE, Mode.TORN)), draw.randint(1, len(log))) for _ in range(4)]
    assert sweep(shipping[what], points).faults == []


@pytest.mark.long
@pytest.mark.parametrize("what", COMMANDS)
def test_broken_at_every_operation(
    shipping: dict[str, list[Shipping]], what: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = shipping[what][0].log
    folder = results_folder(tmp_path_factory.mktemp("results"))
    every = {
        "killed": [(mode, op.number) for op in log for mode in (Mode.KILL_BEFORE, Mode.TORN)],
        "full disk": [(Mode.ENOSPC, op.number) for op in log if op.name in NEEDS_SPACE],
    }
    for name, points in every.items():
        done = sweep(shipping[what], points)
        print("\n" + keep(folder, f"{what}: {name}", done))
        assert done.faults == []
