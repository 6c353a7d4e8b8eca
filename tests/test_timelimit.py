"""A given time ends a run as a request to stop does: saved, in time, with the bits of an unbroken run."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from finetune.timelimit import TimeLimit
from tests import runs
from tests.runs import ENVIRONMENT, OUTPUT

TRAIN = "import sys; from finetune.cli import main; sys.argv = ['finetune', *sys.argv[1:]]; main()"
LONG = ("train.steps=5000", "train.save_every=10000", "evaluate.metrics=[loss]")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def warm() -> None:
    """Load all libraries: it could take the whole time, and one that is cut while loading is broken in this process."""
    assert runs.train("train.steps=1", "output=runs/warm").code == 0


def test_a_step_is_begun_only_where_it_and_a_save_fit() -> None:
    clock = Clock()
    limit = TimeLimit(60, clock)
    assert limit.left() == pytest.approx(59)  # a second to close
    clock.now += 40
    assert limit.allows(10)
    limit.saved(10)
    assert not limit.allows(10), "the step and the save together do not fit any more"
    assert limit.allows(1) is False, "the slow step is remembered"
    for _ in range(40):
        allowed = limit.allows(1)
    assert allowed, "but not for ever"
    limit.saved(2)
    assert limit.left() == pytest.approx(8), "the slowest save counts"


def test_a_run_stops_in_time_and_goes_on_with_the_same_bits(work: Path) -> None:
    warm()
    began = time.monotonic()
    said = runs.train(*LONG, options=["--max-time", "8s"])
    assert time.monotonic() - began < 8
    assert said.code == 6, said.err
    found = re.search(
        r"stopped before its 8s were over; step (\d+) of 5000 is saved in runs/one; the same comm", said.err
    )
    assert found, said.err
    step = int(found[1])
    kept = OUTPUT / "checkpoints" / f"step-{step:08d}"
    assert [line["step"] for line in runs.metrics()] == list(range(1, step + 1))
    assert runs.train(*LONG, options=["--until", str(step + 3)]).code == 0  # it goes on from there
    other = Path("runs/other")
    assert runs.train(*LONG, f"output={other}", options=["--until", str(step)]).code == 0
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (kept / name).read_bytes() == (other / "checkpoints" / kept.name / name).read_bytes()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of a file whose opening was cut: Python closes it at once
def test_a_time_too_short_for_loading_leaves_nothing_half_done(work: Path) -> None:
    warm()
    said = runs.train(*LONG, options=["--max-time", "0.05s"])
    assert said.code == 6
    assert said.err.count("\n") == 1
    assert "nothing is lost" in said.err
    assert not (OUTPUT / "checkpoints").exists()
    assert runs.train("train.steps=5000", *LONG[1:], options=["--until", "1"]).code == 0


def test_sigterm_to_a_running_command_saves_within_one_step(work: Path) -> None:
    words = [part for override in LONG for part in ("--set", override)]
    command = [sys.executable, "-c", TRAIN, "train", "r.yaml", *words]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        until = time.monotonic() + 120
        while not (OUTPUT / "metrics.jsonl").exists() or len(runs.metrics()) < 3:
            assert run.poll() is None, run.stderr.read() if run.stderr else ""
            assert time.monotonic() < until
            time.sleep(0.02)
        run.send_signal(signal.SIGTERM)
        seen = len(runs.metrics())
        _, err = run.communicate(timeout=60)
    assert run.returncode == 6, err
    (kept,) = (OUTPUT / "checkpoints").iterdir()
    assert seen <= int(kept.name[5:]) <= seen + 2  # one may have ended while its lines were counted
    assert f"step {int(kept.name[5:])} of 5000 is saved" in err
