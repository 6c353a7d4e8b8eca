"""The example jobs and the Dockerfile: they parse, and what they call is the command as it is."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from finetune.cli import app
from finetune.errors import FinetuneError, Interrupted
from tests.runs import ROOT

JOBS = ROOT / "docs" / "jobs"
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def read(name: str) -> Any:
    return yaml.safe_load((JOBS / name).read_text())


def calls(text: str) -> list[list[str]]:
    """The words after `finetune` of each call in a script."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return [shlex.split(found[1]) for line in lines if (found := re.search(r"\.venv/bin/finetune (.*)$", line))]


def every_call() -> list[list[str]]:
    return [
        *calls((JOBS / "slurm.sh").read_text()),
        *calls(read("skypilot.yaml")["run"]),
        read("kubernetes.yaml")["spec"]["template"]["spec"]["containers"][0]["args"],
    ]


def test_each_job_calls_the_command_once() -> None:
    assert len(every_call()) == 3


@pytest.mark.parametrize("words", every_call(), ids=["slurm", "skypilot", "kubernetes"])
def test_what_a_job_calls_is_the_command(words: list[str]) -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    numbers = [re.sub(r"\$\w+", "4", word) for word in words[1:]]  # the scheduler's numbers
    made = group.commands[words[0]].make_context(words[0], numbers)
    assert (ROOT / str(made.params["recipe"])).is_file()
    assert made.params["world"] in (None, 4)
    assert made.params["processes"] in (1, 4)


def test_the_slurm_script_is_a_script() -> None:
    assert subprocess.run(["bash", "-n", str(JOBS / "slurm.sh")], check=False).returncode == 0
    assert f'"$code" -eq {Interrupted.exit_code}' in (JOBS / "slurm.sh").read_text()


def test_kubernetes_tells_faults_from_interruptions() -> None:
    job = read("kubernetes.yaml")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    rules = job["spec"]["podFailurePolicy"]["rules"]
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in rules if "onExitCodes" in rule}
    faults = {kind.exit_code for kind in (FinetuneError, *FinetuneError.__subclasses__())} - {Interrupted.exit_code}
    assert codes == {"FailJob": sorted(faults), "Ignore": [Interrupted.exit_code]}
    pod = job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never", "a failure policy asks for it"
    names = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == names


def test_the_image_is_made_of_what_is_here() -> None:
    for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    copied = {name for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE) for name in line.split()}
    assert copied <= {line[1:] for line in ignored if line.startswith("!")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(re.findall(r"^ARG EXTRAS=(\S+)$", DOCKERFILE, re.MULTILINE)) <= set(project["optional-dependencies"])
    assert re.search(r"^torch==", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    assert 'ENTRYPOINT ["finetune"]' in DOCKERFILE
    used = set(re.findall(r"\$\{(\w+)\}", DOCKERFILE))
    assert used == set(re.findall(r"^ARG (\w+)=", DOCKERFILE, re.MULTILINE))


def test_no_job_holds_a_secret() -> None:
    for path in (*JOBS.iterdir(), ROOT / "Dockerfile"):
        assert not re.search(r"(?i)(key|token|secret)\w*\s*[=:]\s*['\"]?[A-Za-z0-9/+]{16,}", Path(path).read_text())
