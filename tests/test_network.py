"""No verb reaches out of this machine or opens a port unless it is asked to.

They run with nothing that tells libraries to stay offline. An audit hook refuses and writes
down every address of every Python process; where the system lets us, the command also has a network of its own that
leads nowhere, in which the kernel counts for processes of any language.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer.main

from finetune import cli
from tests import runs
from tests.runs import OUTPUT, ROOT

GUARD = ROOT / "tests" / "guard"
COMMAND = [sys.executable, "-c", "from finetune.cli import main; main()"]
_TAKEN_OUT = ("HF_", "HUGGING", "TRANSFORMERS_", "WANDB_", "GRADIO_", "TRACKIO_")
"""Beginnings of variables that could keep a library from the network, or give it a key for one."""
_SECONDS = 240


@dataclass
class Trace:
    """What a command did. ``python``: what the audit hook saw, and how each verb of several ended; ``kernel``: None
    where it has no network of its own."""

    code: int
    err: str
    python: list[dict[str, Any]] = field(default_factory=list)
    kernel: dict[str, Any] | None = None

    @property
    def ended(self) -> list[dict[str, Any]]:
        """Each verb's line, exit code and standard error, where several ran."""
        return [one for one in self.python if "line" in one]

    @property
    def seen(self) -> list[str]:
        """What the hook saw, and which verb had ended by then."""
        return [one["line"] if "line" in one else f"{one['event']} {one['host']}" for one in self.python]

    @property
    def out(self) -> list[str]:
        """Every attempt to reach another machine."""
        seen = [f"{one['event']} {one['host']}" for one in self.python if "event" in one and not one["loopback"]]
        return seen + ([f"{self.kernel['lost']} packets"] if self.kernel and self.kernel["lost"] else [])

    @property
    def ports(self) -> list[str]:
        opening = ("socket.listen", "socket.bind")
        seen = [f"{one['event']} {one['host']}" for one in self.python if one.get("event") in opening]
        return seen + (self.kernel["listening"] if self.kernel else [])


TWO = "--set output=runs/two --set train.steps=2"
AT_WORK = (
    "schema",
    "plan r.yaml",
    "plan r.yaml --probe",
    f"import {ROOT / 'tests/importers/trl.yaml'} --out mine.yaml",
    "data check r.yaml",
    "data check train.jsonl --fix fixed.jsonl",
    "data show r.yaml",
    "data show r.yaml --html page.html",
    "init train.jsonl --out new.yaml --model base",
    "doctor",
    f"train r.yaml {TWO}",
    f"eval {OUTPUT}",
    f"teach r.yaml --set objective.method=distill --set objective.teacher={OUTPUT} --set output=runs/three --out said "
    "--top-k 4",
    f"predict {OUTPUT} eval.jsonl --out answers.jsonl --max-new-tokens 4",
    f"compare {OUTPUT} runs/two --html both.html",
    "sweep r.yaml --grid adapter.r=2 --set output=runs/sweep --set train.steps=1",
    f"chat {OUTPUT} --max-new-tokens 4",  # the question comes through a pipe
    f"report {OUTPUT}",
)
SHIPPED = (
    f"merge {OUTPUT} --out merged",
    f"prove {OUTPUT} merged",
    f"export {OUTPUT} --to adapter --target vllm --out exported",
    f"release {OUTPUT} --out published --what adapter --data-licence cc0-1.0",
    "verify published",
    "push published owner/name",  # without a token it says so before it asks anybody; with one it is asked to
    "convert qwen1 native --to native",
    f"merge {OUTPUT} --out {OUTPUT}/merged",
    f"summary {OUTPUT} 0",
)
TRACKED = tuple(f"train r.yaml {TWO} --set tracker={tracker}" for tracker in ("trackio", "wandb"))
SERVED = (f"chat {OUTPUT} --serve --port 0", "dashboard runs")
LINES = (*AT_WORK, *SHIPPED, *TRACKED, *SERVED)
ENDS = {"doctor": (0, 1), "push": (5,)}
"""Exit codes other than 0."""
IN_TURN = """
import contextlib, io, json, os, sys
from finetune.cli import main_in_process
for line in sys.argv[1:]:
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        code = main_in_process(line.split())
    with open(os.environ["NETWORK_RECORD"], "a") as record:
        record.write(json.dumps({"line": line, "code": code, "err": err.getvalue()}) + "\\n")
"""


def verbs() -> set[str]:
    """Every verb that the command line has, hidden ones too."""

    def below(group: Any, name: str) -> set[str]:
        found: set[str] = set()
        for word, command in group.commands.items():
            full = f"{name} {word}".strip()
            found |= below(command, full) if hasattr(command, "commands") else {full}
        return found

    return below(typer.main.get_command(cli.app), "")


def caged() -> bool:
    """Whether the system gives a command a network of its own."""
    if shutil.which("unshare") is None:
        return False
    probe = ["unshare", "-rn", sys.executable, str(GUARD / "cage.py"), os.devnull, sys.executable, "-c", ""]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


CAGED = caged()


def watched(command: Sequence[str], *, stdin: str = "", listens: bool = False) -> Trace:
    """Run a command in the working folder under both guards."""
    python, kernel = Path("python.record"), Path("kernel.record")
    for path in (python, kernel):
        path.unlink(missing_ok=True)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_TAKEN_OUT)}
    environment = kept | {
        "PYTHONPATH": f"{GUARD}{os.pathsep}{ROOT}", "NETWORK_RECORD": str(python.absolute()), "OMP_NUM_THREADS": "1",
        "HOME": str(Path("home").absolute()), **({"NETWORK_LISTENS": "1"} if listens else {}),
    }  # fmt: skip
    cage = ["unshare", "-rn", sys.executable, str(GUARD / "cage.py"), str(kernel)] if CAGED else []
    child = subprocess.Popen(
        [*cage, *command], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        if listens:
            assert child.stdout is not None
            if not any("127.0.0.1" in line for line in child.stdout):
                pytest.fail(f"it ended before it said where it listens: {child.communicate(timeout=_SECONDS)[1]}")
            time.sleep(1)
            os.killpg(child.pid, signal.SIGINT)
        _, err = child.communicate(stdin, timeout=_SECONDS)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
    seen = [json.loads(line) for line in python.read_text().splitlines()] if python.exists() else []
    return Trace(child.returncode, err, seen, json.loads(kernel.read_text()) if kernel.exists() else None)


def test_every_verb_has_its_line() -> None:
    shown = {" ".join(line.split()[: 2 if line.startswith("data") else 1]) for line in LINES}
    lacking = verbs() - shown
    assert not lacking, f"say above how to run {', '.join(sorted(lacking))}: no verb may reach the network unasked"
    assert not shown - verbs()


@pytest.mark.parametrize(
    "lines", [AT_WORK, SHIPPED, *((line,) for line in TRACKED)], ids=["at work", "shipped", "trackio", "wandb"]
)
def test_it_reaches_nobody_and_opens_no_port(finished: Path, lines: Sequence[str]) -> None:
    """One verb after another, as a notebook would call them."""
    Path("base/LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    shutil.copytree(ROOT / "tests" / "vectors" / "qwen1" / "tiny-safetensors", "qwen1")
    trace = watched([sys.executable, "-c", IN_TURN, *lines], stdin="hello\n")
    assert trace.code == 0, trace.err
    assert trace.out == [], trace.seen
    assert trace.ports == [], trace.seen
    assert (trace.kernel is not None) == CAGED
    for line, ended in zip(lines, trace.ended, strict=True):
        assert ended["line"] == line
        assert ended["code"] in ENDS.get(line.split()[0], (0,)), ended


def test_a_server_listens_to_this_machine_alone(finished: Path) -> None:
    assert runs.finetune(*TRACKED[0].split()).code == 0
    for line in SERVED:
        trace = watched([*COMMAND, *line.split()], listens=True)
        assert trace.out == []
        assert trace.ports, f"{line} was asked to listen"
        assert all("127.0.0.1" in port or port.startswith("0100007F:") for port in trace.ports)


def test_a_verb_that_reaches_out_is_caught(work: Path) -> None:
    """A recipe that names a model by its hub id asks for it: the one way in which ``plan`` connects."""
    trace = watched([*COMMAND, "plan", "r.yaml", "--set", "model=owner/name"])
    assert trace.code != 0
    assert "huggingface.co" in " ".join(trace.out)


def test_what_libraries_swallow_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    planted = {
        "socket.socket().connect(('198.51.100.1', 80))": "socket.connect 198.51.100.1",
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('198.51.100.1', 53))": "socket.sendto 198.51.100.1",
        "socket.getaddrinfo('example.org', 443)": "socket.getaddrinfo example.org",
        "socket.socket(socket.AF_INET6).connect(('2001:db8::1', 80))": "socket.connect 2001:db8::1",
    }
    for code, caught in planted.items():
        trace = watched(
            [sys.executable, "-c", f"import contextlib, socket\nwith contextlib.suppress(Exception): {code}"]
        )
        assert (trace.code, trace.out) == (0, [caught])
    for host, caught in (("0.0.0.0", "bind 0.0.0.0"), ("127.0.0.1", "listen 127.0.0.1"), ("", "bind ")):
        trace = watched(
            [sys.executable, "-c", f"import socket; a = socket.socket(); a.bind(({host!r}, 0)); a.listen()"]
        )
        assert trace.code == 1
        assert trace.ports == [f"socket.{caught}"]
    quiet = "import socket; a = socket.socket(); a.settimeout(1); a.connect_ex(('127.0.0.1', 9)); socket.socketpair()"
    assert watched([sys.executable, "-c", quiet]).out == []


@pytest.mark.skipif(not CAGED, reason="no network of its own for a command here: only Python processes are watched")
def test_programs_that_are_not_python_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for address in ("tcp/198.51.100.1/80", "udp/198.51.100.1/53"):
        trace = watched(["bash", "-c", f"echo x > /dev/{address}"])
        assert trace.out == ["1 packets"]
    unguarded = "import socket, time; a = socket.socket(); a.bind(('', 4321)); a.listen(); time.sleep(.5)"
    trace = watched([sys.executable, "-S", "-c", unguarded])  # no site, and so no hook
    assert trace.ports == ["00000000:10E1"]
