"""A run that is killed, or whose disk fails, is finished by the same command, with the bits of an unbroken run.

The quick part takes a sample of the points; ``make test-kill`` takes them all (marker ``long``) and writes its figures
into the folder that FINETUNE_RESULTS names.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.faults import Mode, Op, why_unavailable
from tests.faults.breaking import (
    NEEDS_SPACE,
    RENAMES,
    WRITES,
    At,
    Damage,
    Moment,
    Request,
    asked_in,
    asked_to_stop,
    damaged,
    killed_at,
    killed_in_time,
    last_of,
    orphaned,
    refused_at,
    results_folder,
)
from tests.faults.power import SAVES, replay
from tests.faults.sweep import CONFIGS, TRAIN, Rig, Sweep, difference, keep, snapshot

pytestmark = pytest.mark.skipif(bool(why_unavailable()), reason=why_unavailable())

LONG = 3600
PLACES = [  # where a request to stop arrives: before the loop, in it, between steps, after it
    ("packing", "finetune.gather:gather", 1),
    ("packing", "finetune.model:load_base", 1),
    ("packing", "finetune.evaluate:judge", 1),
    ("packing", "finetune.loop:_update", 3),
    ("packing", "finetune.metrics:append_line", 6),
    ("packing", "finetune.checkpoint:write_folder", 2),
    ("unaligned", "finetune.evaluate:judge", 3),
    ("packing", "finetune.loop:_update", 12),
    ("packing", "finetune.evaluate:judge", 4),
    ("packing", "finetune.state:write_adapter", 1),
]
CHECKPOINT_FILES = ("adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json")


@pytest.fixture(scope="module")
def rig(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with Rig(tiny_base, tmp_path_factory.mktemp("kill")) as warm:
        yield warm


@pytest.fixture(scope="module")
def log(rig: Rig) -> tuple[Op, ...]:
    """The operations of the unbroken run; the same numbers on every lane."""
    return rig.lanes[0].whole("packing").log


@pytest.fixture(scope="module")
def hold(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Sweep], None]:
    """Judge a long sweep: print and store its figures, then fail where there is a fault."""
    folder = results_folder(tmp_path_factory.mktemp("results"))

    def judge(name: str, sweep: Sweep) -> None:
        print("\n" + keep(folder, name, sweep))
        assert not sweep.faults

    return judge


def marked(log: Sequence[Op]) -> list[tuple[Mode, int]]:
    """Points that every sample holds: each kind of file, each half of the protocol."""
    places = ["identity.json", "recipe.yaml", "scores.json", "step-00000008", "adapter", "finished.json"]
    points = [(Mode.KILL_AFTER, last_of(log, RENAMES, place)) for place in places]
    points += [(Mode.KILL_BEFORE, last_of(log, RENAMES, "samples.jsonl"))]
    points += [(Mode.TORN, last_of(log, WRITES, place)) for place in ("identity.json", "finished.json")]
    points += [(Mode.TORN, last_of(log, WRITES, f"step-{n:08d}", "manifest.json")) for n in (4, 12)]
    points += [(Mode.TORN, last_of(log, WRITES, "metrics.jsonl")), (Mode.TORN, last_of(log, WRITES, "optimizer"))]
    points += [(Mode.TORN, last_of(log, WRITES, "report.html"))]
    return [*points, (Mode.KILL_BEFORE, last_of(log, {"unlinkat"}, "step-00000004"))]


def sample(log: Sequence[Op], modes: Sequence[Mode], count: int, seed: int) -> list[tuple[Mode, int]]:
    draw = random.Random(seed)
    return [(draw.choice(modes), n) for n in draw.sample(range(1, len(log) + 1), count)]


# ---- quick


def test_killed_at_an_operation(rig: Rig, log: tuple[Op, ...]) -> None:
    points = marked(log)
    points += sample(log, (Mode.KILL_BEFORE, Mode.KILL_AFTER, Mode.TORN), 25 - len(points), seed=1)
    assert rig.sweep(killed_at, [At("packing", *point) for point in points]).faults == []


def test_killed_at_some_moment(rig: Rig) -> None:
    draw = random.Random(2)
    assert rig.sweep(killed_in_time, [Moment("packing", draw.uniform(0.2, 1)) for _ in range(5)]).faults == []


def test_the_disk_refuses(rig: Rig, log: tuple[Op, ...]) -> None:
    spacious = [op for op in log if op.name in NEEDS_SPACE]
    points = [(mode, spacious[n - 1].number) for mode, n in sample(spacious, [Mode.ENOSPC], 7, seed=3)]
    points += [(Mode.ENOSPC, last_of(log, WRITES, place)) for place in ("step-00000008", "metrics.jsonl", "finished")]
    points += [(Mode.SHORT_WRITE, last_of(log, WRITES, "step-00000012", "optimizer"))]
    points += [(Mode.EIO, last_of(log, {"fsync"}, "step-00000012", "manifest.json"))]
    points += [(Mode.EIO, last_of(log, RENAMES, "identity.json")), (Mode.EIO, last_of(log, WRITES, "metrics.jsonl"))]
    points += [(mode, last_of(log, WRITES, "report.html")) for mode in (Mode.ENOSPC, Mode.EIO)]
    points += [(Mode.EIO, last_of(log, RENAMES, "report.html") + 1), (Mode.EIO, last_of(log, RENAMES, "report.html"))]
    assert rig.sweep(refused_at, [At("packing", *point) for point in points]).faults == []


def test_asked_to_stop(rig: Rig) -> None:
    draw = random.Random(4)
    numbers = [signal.SIGTERM, signal.SIGINT] * 2
    assert rig.sweep(asked_to_stop, [Request("packing", draw.uniform(0, 1), n) for n in numbers]).faults == []
    assert rig.sweep(asked_in, [PLACES[3], PLACES[6]]).faults == []


def test_asked_twice_leaves_at_once(rig: Rig) -> None:
    lane, job = rig.lanes[0], "tests.faults.jobs:train_signalled_in"
    args = {"place": "finetune.loop:_update", "call": 2, "numbers": [int(signal.SIGTERM)] * 2}
    outcome = lane.train("packing", job, fresh=True, args=args)
    assert (outcome.exit_code, outcome.stderr) == (6, "")
    assert not (lane.run_folder / "checkpoints").exists(), "it did not wait to save"
    assert lane.again("packing", "asked twice").why == ""


def both_start(rig: Rig) -> list[str]:
    """Two processes start the same run at the same time; returns what is wrong. One that came only when the other had
    ended shows nothing: they start again."""
    lane, other = rig.lanes
    lane.whole("packing")
    args = {"recipe": str(lane.recipe_file("packing"))}
    for _ in range(5):
        shutil.rmtree(lane.run_folder, ignore_errors=True)
        with ThreadPoolExecutor(2) as pool:
            won, lost = sorted(
                pool.map(lambda trials: trials.run(TRAIN, args), (lane.trials, other.trials)),
                key=lambda outcome: outcome.exit_code or 0,
            )
        if "this run is finished" not in won.stdout + lost.stdout:
            break
    faults = [] if (won.exit_code, won.stderr) == (0, "") else [f"none finished: {won.stderr[-300:]}"]
    if lost.exit_code != 5 or "another finetune process is working in this folder" not in lost.stderr:
        faults.append(f"the other ended with {lost.exit_code}: {lost.stderr[-300:]}")
    apart = difference(lane.whole("packing").files, snapshot(lane.run_folder))
    return [*faults, *([apart] if apart else [])]


def test_one_of_two_starts_runs(rig: Rig) -> None:
    if len(rig.lanes) < 2:
        pytest.skip("needs two cores")
    assert both_start(rig) == []


def test_a_damaged_newest_checkpoint_is_passed_over(rig: Rig) -> None:
    cases = [Damage(12, ("optimizer.safetensors",), "flip", 5), Damage(8, ("manifest.json",), "remove", 6)]
    assert rig.sweep(damaged, cases).faults == []


def test_power_loss_nothing_is_relied_on_before_it_is_flushed(rig: Rig, log: tuple[Op, ...]) -> None:
    assert replay(rig.lanes[0].run_folder, log) == []
    saves = [op for op in log if op.name == "rename" and SAVES in op.path and ".tmp-" not in Path(op.path).name]
    assert [Path(save.path).name for save in saves] == ["step-00000004", "step-00000008", "step-00000012"]
    for save in saves:
        flushed = [Path(op.path).name for op in log if op.name == "fsync" and op.path.startswith(save.other + "/")]
        assert flushed == [*CHECKPOINT_FILES, "manifest.json"]
        before, after = log[save.number - 2], log[save.number]
        assert (before.name, before.path) == ("fsync", save.other)
        assert (after.name, Path(after.path).name) == ("fsync", "checkpoints")


# ---- these must be able to fail


@pytest.mark.long
@pytest.mark.parametrize(
    ("plant", "found"),
    [
        ("no_sync", "renamed before its content is flushed"),
        ("no_folder_sync", "earlier names are not flushed"),
        ("manifest_first", "written after the manifest"),
        ("metrics_unsynced", "a checkpoint appears before these are flushed: metrics.jsonl"),
    ],
)
def test_planted_disorder_is_found(rig: Rig, plant: str, found: str) -> None:
    lane = rig.lanes[0]
    lane.plant = plant
    faults = replay(lane.run_folder, lane.whole("packing").log)
    lane.plant = ""
    assert any(found in fault for fault in faults), faults


@pytest.mark.long
@pytest.mark.timeout(LONG)
@pytest.mark.parametrize("plant", ["in_place", "metrics_uncut", "dropout_by_history", "moments_lost"])
def test_planted_defects_are_found(rig: Rig, plant: str) -> None:
    lane = rig.lanes[0]
    lane.plant = plant
    log = lane.whole("packing").log
    lane.plant = ""
    points = marked(log) if plant != "in_place" else []
    points += sample(log[:-10], (Mode.KILL_BEFORE, Mode.TORN), 10, seed=7)
    sweep = rig.sweep(killed_at, [At("packing", *point) for point in points], plant)
    print(f"\nplanted {plant}: found at {len(sweep.faults)} of {len(sweep.verdicts)} points, {sweep.faults[:1]}")
    assert sweep.faults
    assert not any("it was not killed" in fault for fault in sweep.faults)


@pytest.mark.long
def test_a_planted_lock_that_workers_inherit_is_found(rig: Rig) -> None:
    assert len(rig.sweep(orphaned, [Moment("workers", 0.7), Moment("workers", 0.8)], "lock_inherited").faults) == 2


# ---- long


@pytest.mark.long
@pytest.mark.timeout(LONG)
def test_killed_at_every_operation(rig: Rig, log: tuple[Op, ...], hold: Callable[[str, Sweep], None]) -> None:
    points = [At("packing", Mode.KILL_BEFORE, op.number) for op in log]
    points += [At("packing", Mode.TORN, op.number) for op in log if op.name in WRITES]
    points += [At("packing", Mode.KILL_AFTER, op.number) for op in log if op.name in RENAMES]
    points.append(At("packing", Mode.KILL_AFTER, len(log)))
    hold("killed at every operation", rig.sweep(killed_at, points))


@pytest.mark.long
@pytest.mark.timeout(LONG)
def test_killed_at_many_moments(rig: Rig, hold: Callable[[str, Sweep], None]) -> None:
    draw = random.Random(11)
    moments = [Moment(config, draw.uniform(0.1, 1)) for config in CONFIGS for _ in range(20)]
    hold("killed at random times", rig.sweep(killed_in_time, moments))
    orphans = [Moment("workers", share) for share in (0.6, 0.7, 0.8, 0.9)]
    hold("killed with workers left alive", rig.sweep(orphaned, orphans))


@pytest.mark.long
@pytest.mark.timeout(LONG)
def test_the_disk_is_full_at_every_operation(rig: Rig, log: tuple[Op, ...], hold: Callable[[str, Sweep], None]) -> None:
    points = [At("packing", Mode.ENOSPC, op.number) for op in log if op.name in NEEDS_SPACE]
    points += [At("packing", Mode.SHORT_WRITE, op.number) for op in log if op.name in WRITES]
    hold("disk full", rig.sweep(refused_at, points))


@pytest.mark.long
@pytest.mark.timeout(LONG)
def test_every_operation_fails_once(rig: Rig, log: tuple[Op, ...], hold: Callable[[str, Sweep], None]) -> None:
    hold("input/output error", rig.sweep(refused_at, [At("packing", Mode.EIO, op.number) for op in log]))


@pytest.mark.long
@pytest.mark.timeout(LONG)
def test_many_damaged_checkpoints(rig: Rig, hold: Callable[[str, Sweep], None]) -> None:
    files = (*CHECKPOINT_FILES, "manifest.json")
    kinds = ["flip", "flip", "flip", "cut", "cut", "remove"]
    cases = [
        Damage(steps, (file,), kind, seed)
        for seed, (steps, file, kind) in enumerate((s, f, k) for s in (8, 12) for f in files for k in kinds)
    ]
    cases += [Damage(steps, (), kind, 90 + steps) for steps in (8, 12) for kind in ("flip", "remove")]
    cases += [Damage(steps, CHECKPOINT_FILES, "cut", 80 + steps) for steps in (8, 12)]
    hold("damaged newest checkpoint", rig.sweep(damaged, cases))


@pytest.mark.long
@pytest.mark.timeout(LONG)
def test_asked_to_stop_at_many_moments(rig: Rig, hold: Callable[[str, Sweep], None]) -> None:
    draw = random.Random(12)
    requests: list[Any] = []
    for config in ("packing", "workers", "unaligned"):
        for number in (signal.SIGTERM, signal.SIGINT):
            requests += [Request(config, draw.uniform(0, 1), number, config == "workers") for _ in range(8)]
    hold("asked to stop at random times", rig.sweep(asked_to_stop, requests))
    hold("asked to stop at named places", rig.sweep(asked_in, PLACES))


@pytest.mark.long
@pytest.mark.timeout(LONG)
def test_one_of_two_starts_runs_every_time(rig: Rig) -> None:
    if len(rig.lanes) < 2:
        pytest.skip("needs two cores")
    assert [fault for _ in range(25) for fault in both_start(rig)] == []
