"""The start and the end of an endpoint."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune import answer, serve
from finetune.exporters import adapter
from finetune.terminal import Terminal
from tests import runs
from tests.runs import OUTPUT, finetune

RUN = str(OUTPUT)
PROGRAM = "import sys; from finetune import cli; sys.argv = ['finetune', *sys.argv[1:]]; cli.main()"


@pytest.fixture
def started(finished: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "chat", RUN, "--serve", "--port", "0", "--max-new-tokens", "900"],
        env=runs.ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        yield process
        process.kill()


def test_from_its_start_to_ctrl_c_in_the_middle_of_an_answer(started: subprocess.Popen[str]) -> None:
    assert started.stdout is not None
    lines = [started.stdout.readline() for _ in range(5)]
    found = re.match(r"runs/one: http://127\.0\.0\.1:(\d+)/v1   models: one, base   \(Ctrl-C ends\)", lines[0])
    assert found, lines
    token = lines[1].split()[1]
    assert len(token) >= 32
    assert lines[2].startswith("for trying out")
    head = {"Authorization": f"Bearer {token}"}
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=60)) as line:
        line.request("GET", "/v1/models", headers=head)
        assert [model["id"] for model in json.loads(line.getresponse().read())["data"]] == ["one", "base"]
        asked = {"model": "base", "prompt": "hi there", "stream": True}  # it would repeat itself 900 times
        line.request("POST", "/v1/completions", json.dumps(asked), head)
        answered = line.getresponse()
        assert answered.status == 200
        assert answered.readline().startswith(b"data: ")
        started.send_signal(signal.SIGINT)
        rest = answered.read()
        assert b"server_ending" in rest
        assert rest.endswith(b"data: [DONE]\n\n")  # the stream is closed in order
    out, err = started.communicate(timeout=20)
    assert (started.returncode, out, err) == (0, "ended\n", "")
    assert token not in "".join(str(path.read_bytes()) for path in OUTPUT.rglob("*") if path.is_file())


def test_it_listens_on_this_machine_alone() -> None:
    with serve._listening(0) as opened:
        assert opened.getsockname()[0] == "127.0.0.1"


def test_a_port_that_is_taken(finished: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        said = finetune("chat", RUN, "--serve", "--port", port)
    assert said.code == 5
    assert said.err == f"environment: --port: port {port} is taken; give another one; 0 takes a free one\n"


@pytest.mark.parametrize("token", ["", "short", "a" * 15, "a" * 20 + "\n", "ä" * 20])
def test_a_weak_token_is_refused_and_not_shown(finished: Path, monkeypatch: pytest.MonkeyPatch, token: str) -> None:
    monkeypatch.setenv(serve.TOKEN, token)
    said = finetune("chat", RUN, "--serve", "--port", "0")
    assert said.code == 5
    assert said.err.startswith(f"environment: {serve.TOKEN}: needs 16 printable ASCII characters")
    assert not token or token not in said.err


def test_the_environments_token_is_taken_and_not_shown(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(serve.TOKEN, "one-that-a-script-knows")
    monkeypatch.setattr(serve.Server, "run", lambda *_, **__: None)
    said = finetune("chat", RUN, "--serve", "--port", "0")
    assert said.code == 0
    assert f"token: that of {serve.TOKEN}" in said.out
    assert "one-that-a-script-knows" not in said.out


def test_what_is_not_there(finished: Path) -> None:
    said = finetune("chat", "nowhere", "--serve", "--port", "0")
    assert said.code == 4
    assert "this is not a run folder" in said.err


def test_the_commands_for_production_are_those_that_export_writes_for(finished: Path) -> None:
    """The printed export is run as it stands; vLLM itself is not here."""
    speaker = answer.load(OUTPUT, Terminal(silent=True))
    export, vllm = serve.production(OUTPUT, speaker)
    assert finetune(*shlex.split(export)[1:]).code == 0
    words = shlex.split(vllm)
    assert words[:4] == ["vllm", "serve", "base", "--enable-lora"]
    name, _, folder = words[words.index("--lora-modules") + 1].partition("=")
    assert name == "one"
    config = json.loads((Path(folder) / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert words[words.index("--max-lora-rank") + 1] == "8"
    merge, merged = serve.production(OUTPUT, replace(speaker, converted=True))
    assert finetune(*shlex.split(merge)[1:]).code == 0
    assert (Path(shlex.split(merged)[2]) / "config.json").is_file()
    assert serve.production(Path("my model"), replace(speaker, base="")) == ["vllm serve 'my model'"]


def test_what_vllm_cannot_load_is_merged_first(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "refusals", lambda *_: ["DoRA"])
    speaker = answer.load(OUTPUT, Terminal(silent=True))
    assert serve.production(OUTPUT, speaker) == ["finetune merge runs/one --out one-merged", "vllm serve one-merged"]


@pytest.mark.parametrize(("rank", "wanted"), [(1, 8), (8, 8), (9, 16), (64, 64), (65, 128), (400, 512), (600, 600)])
def test_vllms_ranks(rank: int, wanted: int) -> None:
    import torch

    weights: dict[str, Any] = {"base_model.model.x.lora_A.weight": torch.zeros(rank, 2)}
    assert adapter.vllm_rank(weights) == wanted
