"""The viewer that fits what was recorded, of really recorded runs: which is chosen, where it listens, what it tells."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune import dashboard
from tests import runs
from tests.runs import ENVIRONMENT, finetune, process

MAIN = "import sys; from finetune.cli import main; sys.argv = ['finetune', *sys.argv[1:]]; main()"


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A workplace with one run tracked by trackio and a newer one recorded by wandb, offline."""
    folder = tmp_path_factory.mktemp("tracked")
    runs.furnish(folder)
    shutil.copytree(tiny_base, folder / "base")
    before = Path.cwd()
    os.chdir(folder)
    try:
        for name, tracker in (("curves", "trackio"), ("offline", "wandb")):
            words = ("--set", f"tracker={tracker}", "--set", f"output=runs/{name}", "--set", "train.steps=3")
            done = process(MAIN, "train", "r.yaml", *words, WANDB_MODE="offline", HOME=str(folder / "home"))
            assert done.returncode == 0, done.stderr
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def place(tracked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tracked)
    return tracked


@contextlib.contextmanager
def served(*words: str) -> Iterator[tuple[str, int]]:
    """What ``finetune dashboard`` says until its address, and its port; ended by Ctrl-C, and with exit code 0."""
    command = [sys.executable, "-c", MAIN, "dashboard", *words]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if "http://" in line:
                break
        try:
            assert "http://127.0.0.1:" in said, process.communicate()[1]
            yield said, int(said.split("http://127.0.0.1:")[1].split("/")[0])
        finally:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        assert "Traceback" not in err


def listens_here_alone(port: int) -> bool:
    """Nobody answers under another address of this machine."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as page:
        assert page.status == 200
    with contextlib.closing(socket.socket()) as other:
        return other.connect_ex(("127.0.0.2", port)) != 0


def test_the_newest_record_is_chosen_and_the_others_are_named(place: Path) -> None:
    found = dashboard.records(Path("runs"))
    assert [one.viewer for one in found] == ["wandb", "trackio"]
    assert found[1].place == (place / "runs" / "trackio").absolute()
    assert [one.viewer for one in dashboard.records(Path("runs/offline"))] == ["wandb", "trackio"]
    assert [one.viewer for one in dashboard.records(Path("runs/curves"))] == ["trackio"]
    said = finetune("dashboard", "runs")
    assert said.code == 5
    assert "the viewer of wandb's runs needs a terminal" in said.err
    assert "finetune dashboard runs --text" in said.err
    assert "wandb, which has the newest record; also here: --viewer trackio" in said.out
    said = finetune("dashboard", "runs", "--viewer", "tensorboard")
    assert said.code == 5
    assert "no runs tracked by tensorboard here; --viewer wandb, or see all runs as text" in said.err


def test_trackio_is_served_to_this_machine_alone_and_no_token_is_printed(place: Path) -> None:
    with served("runs", "--viewer", "trackio") as (said, port):
        assert "token" not in said
        assert "?" not in said
        assert listens_here_alone(port)


def test_a_server_that_does_not_come_up_is_one_message(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = process(MAIN, "dashboard", "runs", "--viewer", "trackio", "--port", str(port))
    assert said.returncode == 5
    assert said.stderr.count("\n") == 1
    assert "trackio's server did not start" in said.stderr
    assert "--text" in said.stderr


def test_wandbs_own_viewer_takes_the_terminal(place: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        words = [sys.executable, "-c", MAIN, "dashboard", "runs"]
        os.execve(sys.executable, words, {**ENVIRONMENT, "TERM": "xterm-256color"})
    termios.tcsetwinsize(terminal, (40, 140))
    shown, began, left = b"", time.monotonic(), False
    while time.monotonic() - began < 60:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:
                break
        if b"grad_norm" in shown and b"learning_rate" in shown and not left:
            os.write(terminal, b"q")
            left = True
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(terminal)
    assert (left, code) == (True, 0), shown[-500:]


def test_tensorboard_is_served_to_this_machine_alone(work: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    done = process(MAIN, "train", "r.yaml", "--set", "tracker=tensorboard", "--set", "train.steps=3")
    assert done.returncode == 0, done.stderr
    with served("runs") as (_, port):
        assert listens_here_alone(port)
        address = f"http://127.0.0.1:{port}/data/plugin/scalars/"
        with urllib.request.urlopen(f"{address}tags", timeout=20) as answer:
            ((run, tags),) = ((run, tags) for run, tags in json.load(answer).items() if "loss" in tags)
        with urllib.request.urlopen(f"{address}scalars?run={run}&tag=loss", timeout=20) as answer:
            points = json.load(answer)
    assert {"loss", "grad_norm", "tokens_per_second"} <= set(tags)
    assert [step for _, step, _ in points] == [1, 2, 3]
    assert [value for *_, value in points] == pytest.approx([line["loss"] for line in runs.metrics()], rel=1e-6)


def test_tensorboard_that_is_not_installed_names_its_extra(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune import devices

    events = Path("runs/curves/trackers/finetune/events.out.tfevents.1")
    events.parent.mkdir(parents=True)
    events.touch()
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    try:
        said = finetune("dashboard", "runs", "--viewer", "tensorboard")
    finally:
        shutil.rmtree("runs/curves/trackers")
    assert said.code == 5
    assert 'pip install "finetune-qwen[tensorboard]"' in said.err
