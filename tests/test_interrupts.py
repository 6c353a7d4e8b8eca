"""Requests to stop: deferred, cut at once, made again when Python swallows one, and kept from helpers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from finetune import devices
from finetune.errors import Interrupted
from finetune.interrupts import out_of_reach, stop_requests
from tests import runs


@pytest.fixture(autouse=True)
def _not_under_nohup() -> Iterator[None]:
    """Also where the tests themselves run under it."""
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, former)


class Interrupts:
    """Asks to stop while it is being finalized: Python drops the exception that the handler raises there."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_cuts_the_work_on_the_spot(number: int) -> None:
    former = signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped on request; nothing is lost"), stop_requests():
        signal.raise_signal(number)
    assert signal.getsignal(number) is former


def deferred(done: list[str]) -> None:
    with stop_requests() as stop, stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        done.append("finished")


def told_twice_that_the_parent_is_gone(done: list[str]) -> None:
    with stop_requests() as stop, stop.deferred():
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        done.append("finished")


def swallowed_before(done: list[str]) -> None:
    with stop_requests() as stop:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        with stop.deferred():
            done.append("begun")


def cut_within_deferred(done: list[str]) -> None:
    with stop_requests() as stop, stop.deferred():
        try:
            with stop.at_once():
                signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            done.append("saved")


def asked_before_the_part(done: list[str]) -> None:
    with stop_requests() as stop, stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        with stop.at_once():
            done.append("begun")


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (deferred, ["finished"]),
        (told_twice_that_the_parent_is_gone, ["finished"]),
        (swallowed_before, []),
        (cut_within_deferred, ["saved"]),
        (asked_before_the_part, []),
    ],
)
def test_deferred_work_is_cut_only_where_it_allows(work: Callable[[list[str]], None], expected: list[str]) -> None:
    done: list[str] = []
    with pytest.raises(Interrupted):
        work(done)
    assert done == expected


def test_a_run_that_is_cut_off_behind_its_end_is_finished(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request came while the tracker closed: the weights are whole, and nothing says that the run stands still."""
    finish = devices.Session.finish

    def cut(session: devices.Session) -> None:
        monkeypatch.setattr(devices.Session, "finish", finish)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(devices.Session, "finish", cut)
    assert runs.train().code == 6
    assert (runs.OUTPUT / "finished.json").exists()
    assert not (runs.OUTPUT / "stopped.json").exists()
    said = runs.train()
    assert (said.code, "this run is finished (6 steps)" in said.out) == (0, True)


def test_nohup_is_heeded() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, former)


def swallow_and_sleep() -> None:
    with stop_requests():
        Interrupts()
        time.sleep(10)


def test_a_swallowed_request_is_made_again(capfd: pytest.CaptureFixture[str]) -> None:
    hook = sys.unraisablehook
    began = time.monotonic()
    with pytest.raises(Interrupted):
        swallow_and_sleep()
    assert time.monotonic() - began < 5
    assert capfd.readouterr().err == ""
    assert sys.unraisablehook is hook


IN_FRONT = """
import signal, sys
from finetune import cli, pipeline, recipe
sys.argv[0] = "finetune"
"""
SWALLOWED = """
def plan(*given, **more):
    try:
        signal.raise_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        raise ModuleNotFoundError("no such part") from None
pipeline.plan = plan
"""
FORGOTTEN = """
real = pipeline.train
def train(*given, **more):
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        return real(*given, **more)
pipeline.train = train
"""


@pytest.mark.parametrize(
    ("planted", "words"),
    [
        ("recipe.schema = lambda: exec('signal.raise_signal(signal.SIGTERM)')", ("schema",)),  # dataclasses do that
        (SWALLOWED, ("plan", "r.yaml")),
        (FORGOTTEN, ("train", "r.yaml")),
    ],
    ids=["cut in a text that is executed", "made another error of", "swallowed"],
)
def test_a_request_while_libraries_load_is_answered(work: Path, planted: str, words: Sequence[str]) -> None:
    """Whatever a library makes of it; run with -m, where CPython may end by SIGINT in place of the code it is given."""
    Path("front.py").write_text(f"{IN_FRONT}{planted}\ncli.main()\n")
    command = [sys.executable, "-m", "front", *words]
    done = subprocess.run(command, env=runs.ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 6, done.stderr
    assert done.stderr.startswith("interrupted: ")
    assert "Traceback" not in done.stderr
    assert not (runs.OUTPUT / "finished.json").exists()


def test_helpers_are_out_of_reach() -> None:
    reading, writing = os.pipe()
    with stop_requests(), out_of_reach():
        pid = os.fork()
        if pid == 0:
            signal.raise_signal(signal.SIGTERM)
            os.write(writing, b"alive")
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert os.read(reading, 10) == b"alive"
    os.close(reading)
    os.close(writing)
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
