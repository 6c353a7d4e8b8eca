"""Several processes on one machine compute the steps of one: the same samples, noise, loss and gradient."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from finetune.peers import ALONE, deal
from tests import runs, tiny
from tests.peers_worker import CASES, STEPS, steps


@pytest.fixture(scope="module")
def several(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """What the worker saw as one process (this one), and as 2 and as 4 over gloo on the loopback."""
    folders = {world: tmp_path_factory.mktemp(f"world-{world}") for world in (1, 2, 4)}
    for case in CASES:
        steps(tiny_base, folders[1] / case, case, ALONE)
    for world in (2, 4):
        start(tiny_base, folders[world], world)
    return folders


def start(base: Path, out: Path, world: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    place |= {"GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "tests.peers_worker", str(base), str(out)]
    started = [
        subprocess.Popen(
            command, env=runs.ENVIRONMENT | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE, text=True, cwd=runs.ROOT,
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        said = [one.communicate(timeout=250)[1] for one in started]
    finally:
        for one in started:
            one.kill()
    assert [one.returncode for one in started] == [0] * world, "\n".join(said)


def gradients(folder: Path, rank: int) -> list[dict[str, torch.Tensor]]:
    found: list[dict[str, torch.Tensor]] = [{} for _ in STEPS]
    for name, value in load_file(folder / f"gradients-{rank}.safetensors").items():
        step, _, parameter = name.partition("|")
        found[int(step)][parameter] = value
    return found


def events(folder: Path, rank: int) -> list[list[float]]:
    return json.loads((folder / f"events-{rank}.json").read_text())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, 4])
def test_the_gradient_is_that_of_one_process(several: dict[int, Path], world: int, case: str) -> None:
    alone, told = gradients(several[1] / case, 0), events(several[1] / case, 0)
    assert len(told) == len(STEPS)
    for rank in range(world):
        mine = gradients(several[world] / case, rank)
        for one, other in zip(mine, alone, strict=True):
            assert tiny.distance(tiny.flat(one), tiny.flat(other)) < 1e-5
        first = gradients(several[world] / case, 0)
        assert all(tiny.same(one, other) for one, other in zip(mine, first, strict=True)), "bit for bit"
        for one, other in zip(events(several[world] / case, rank), told, strict=True):
            assert one[3:] == other[3:], "the numbers are the whole step's"
            assert one[1:3] == pytest.approx(other[1:3], rel=1e-5)


@pytest.mark.parametrize("world", [2, 4])
def test_a_fault_of_one_process_is_everybodys(several: dict[int, Path], world: int) -> None:
    faults = [json.loads((several[world] / f"fault-{rank}.json").read_text()) for rank in range(world)]
    assert {kind for kind, _ in faults} == {"ModelError"}
    assert re.search(
        rf"rows rows.jsonl:\d+: the loss of step \d is not finite \(process 1 of {world}\); ", faults[0][1]
    )
    assert "rows.jsonl" in faults[1][1]


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
