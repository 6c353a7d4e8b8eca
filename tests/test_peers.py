"""Several processes on one machine compute the steps of one: the same samples, noise, loss and gradient."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from finetune import sharding
from finetune.errors import EnvironmentFault
from finetune.peers import ALONE
from finetune.schedule import deal
from tests import runs, tiny
from tests.peers_worker import CASES, LIVE, PAIRS, STEPS, STORED, WORK, steps

WORLDS = (2, 4)


@pytest.fixture(scope="module")
def several(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What the worker saw as one process (this one), and as 2 and as 4 over gloo on the loopback."""
    out = tmp_path_factory.mktemp("worlds")
    for case in CASES:
        steps(tiny_base, out / "1" / case, case, ALONE)
    furnish(out / WORK, tiny_base)
    start(tiny_base, out)
    return {world: out / str(world) for world in (1, *WORLDS)}


def furnish(work: Path, base: Path) -> None:
    """A workplace with what the whole runs learn from, and those of one process."""
    runs.furnish(work)
    shutil.copytree(base, work / "base")
    for name, count, step in (("pairs", 20, 1), ("judged", 6, 2)):
        pairs = [
            {"prompt": f"What is {n} and {n + step}?", "chosen": f"{2 * n + step}", "rejected": f"{2 * n} or so"}
            for n in range(count)
        ]
        runs.write_rows(work / f"{name}.jsonl", pairs)
    with contextlib.chdir(work):
        for name, overrides in {"teacher": (), "reward": PAIRS, "live": LIVE, "stored": STORED}.items():
            if name == "stored":
                sets = [part for one in LIVE for part in ("--set", one)]
                said = runs.finetune("teach", "r.yaml", "--out", "said", "--top-k", "8", *sets)
                assert said.code == 0, said.err
            said = runs.train(*overrides, f"output=runs/{name if name == 'teacher' else f'{name}-alone'}")
            assert said.code == 0, said.err
            if name == "teacher":
                runs.awake(Path("runs/teacher/adapter"))


def start(base: Path, out: Path) -> None:
    port = free_ports(len(WORLDS))
    command = [sys.executable, "-W", "ignore", "-m", "tests.peers_worker", str(base), str(out), str(port)]
    place = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with subprocess.Popen(
        [*command, *map(str, WORLDS)], env=runs.ENVIRONMENT | place, stderr=subprocess.PIPE, text=True, cwd=runs.ROOT,
        start_new_session=True,
    ) as job:  # fmt: skip
        try:
            _, said = job.communicate(timeout=250)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 0, said


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    while True:
        with contextlib.ExitStack() as held:
            first = held.enter_context(socket.socket())
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with contextlib.suppress(OSError):
                for number in range(1, count):
                    held.enter_context(socket.socket()).bind(("127.0.0.1", port + number))
                return port


def gradients(folder: Path, rank: int) -> list[dict[str, torch.Tensor]]:
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in load_file(folder / f"gradients-{rank}.safetensors").items():
        step, _, parameter = name.partition("|")
        found.setdefault(int(step), {})[parameter] = value
    return [found[step] for step in sorted(found)]


def told(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"told-{rank}.json").read_text())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_the_gradient_is_that_of_one_process(several: dict[int, Path], world: int, case: str) -> None:
    alone, events = gradients(several[1] / case, 0), told(several[1] / case, 0)["events"]
    assert len(alone) == len(events) == (2 if CASES[case].judged else len(STEPS))
    first = gradients(several[world] / case, 0)
    for rank in range(world):
        mine = gradients(several[world] / case, rank)
        for one, other in zip(mine, alone, strict=True):
            assert tiny.distance(tiny.flat(one), tiny.flat(other)) < 1e-5
        assert all(tiny.same(one, other) for one, other in zip(mine, first, strict=True)), "bit for bit"
        for one, other in zip(told(several[world] / case, rank)["events"], events, strict=True):
            assert one[3:] == other[3:], "the numbers are the whole step's"
            assert one[1:3] == pytest.approx(other[1:3], rel=1e-5)
        figures = (
            told(folder / case, number)["figures"] for folder, number in ((several[world], rank), (several[1], 0))
        )
        for one, other in zip(*figures, strict=True):
            assert one == pytest.approx(other, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("world", WORLDS)
def test_shards_change_no_bit(several: dict[int, Path], world: int) -> None:
    for whole, parts in (
        ("plain", "shards"),
        ("one pack a step", "shards, one pack a step"),
        ("reward", "shards, reward"),
        ("distill, stored", "shards, distill, stored"),
    ):
        both = zip(gradients(several[world] / whole, 0), gradients(several[world] / parts, 0), strict=True)
        assert all(tiny.same(one, other) for one, other in both)


@pytest.mark.parametrize("case", [name for name, case in CASES.items() if case.shard])
@pytest.mark.parametrize("world", WORLDS)
def test_each_process_holds_its_part_and_all_answer_as_one(
    several: dict[int, Path], tiny_base: Path, world: int, case: str
) -> None:
    whole = tiny.load(tiny_base, CASES[case].weights).causal_lm.model.layers
    size = sum(value.numel() * value.element_size() for value in whole.parameters())
    for rank in range(world):
        assert told(several[world] / case, rank)["held"] == size / world
    answer = told(several[world] / case, 0)["answer"]
    assert answer == told(several[1] / case, 0)["answer"]
    assert answer


def test_a_whole_base_does_not_pass_for_shards(tiny_base: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"layer 0 is not in shards over 2 processes: .* is whole"):
        sharding.check(tiny.load(tiny_base).causal_lm, 2)


@pytest.mark.parametrize("world", [2, 4])
def test_a_fault_of_one_process_is_everybodys(several: dict[int, Path], world: int) -> None:
    faults = [json.loads((several[world] / f"fault-{rank}.json").read_text()) for rank in range(world)]
    assert {kind for kind, _ in faults} == {"ModelError"}
    assert re.search(
        rf"rows rows.jsonl:\d+: the loss of step \d is not finite \(process 1 of {world}\); ", faults[0][1]
    )
    assert "rows.jsonl" in faults[1][1]


# ---- whole runs of two processes, whose first one leads


@pytest.fixture
def work(several: dict[int, Path]) -> Path:
    faults = [path.read_text() for path in several[2].glob("runs-*.txt")]
    assert not faults
    return several[1].parent / WORK / "runs"


def adapter(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def judged(run: Path) -> dict[str, dict[str, Any]]:
    return json.loads((run / "scores.json").read_text())


@pytest.mark.parametrize("name", ["reward", "live", "stored"])
def test_a_run_of_two_is_that_of_one_and_so_is_its_judgement(work: Path, name: str) -> None:
    two, one = work / name, work / f"{name}-alone"
    learned = adapter(one)
    assert adapter(two).keys() == learned.keys()
    kinds = ("lora_", "score") if name == "reward" else ("lora_",)
    for kind in kinds:  # each by itself: the head is small beside the matrices
        mine, theirs = ({key: value for key, value in part.items() if kind in key} for part in (adapter(two), learned))
        assert tiny.flat(theirs).norm() > 0
        assert tiny.distance(tiny.flat(mine), tiny.flat(theirs)) < 1e-5
    for line, other in zip(runs.metrics(two), runs.metrics(one), strict=True):
        assert line["samples"] == other["samples"]
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert judged(two).keys() == judged(one).keys() == {"before", "step 2", "after"}
    for when, found in judged(one).items():
        numbers = {key: value for key, value in found.items() if isinstance(value, float)}
        assert {"reward_margin" if name == "reward" else "teacher_kl", "loss"} <= numbers.keys()
        assert {key: judged(two)[when][key] for key in numbers} == pytest.approx(numbers, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("name", "parts"),
    [("reward", "in-two"), ("reward", "in-shards"), ("live", "in-two"), ("stored", "in-shards")],
)
def test_a_run_of_two_that_paused_ends_with_the_same_bits(work: Path, name: str, parts: str) -> None:
    whole, paused = work / name, work / f"{name}-{parts}"
    assert tiny.same(adapter(paused), adapter(whole))
    assert runs.curve(paused) == runs.curve(whole)
    assert judged(paused) == judged(whole)
    state = "checkpoints/step-00000004/optimizer.safetensors"
    assert tiny.same(load_file(paused / state), load_file(whole / state))


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=40), st.integers(1, 9))
def test_every_micro_batch_is_dealt_once_and_evenly(tokens: list[int], world: int) -> None:
    dealt = deal(tokens, world)
    assert sorted(number for numbers in dealt for number in numbers) == list(range(len(tokens)))
    assert all(numbers == sorted(numbers) for numbers in dealt)
    loads = [sum(tokens[number] for number in numbers) for numbers in dealt]
    assert max(loads) <= sum(tokens) / world + max(tokens)


def test_alone_nothing_is_shared() -> None:
    assert list(ALONE.share(["a", "b"])) == [(0, "a"), (1, "b")]
    assert ALONE.gather({1: 2.0}, []) == {1: 2.0}
    assert (ALONE.rank, ALONE.world, ALONE.asked()) == (0, 1, False)
