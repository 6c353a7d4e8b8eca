"""Trackers: each records the run where the recipe says, without a network, and a missing one names its extra."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune import devices
from tests import runs
from tests.runs import ENVIRONMENT, OUTPUT, process

TRAIN = "import sys; from finetune.cli import main; sys.argv = ['finetune', *sys.argv[1:]]; main()"


def test_trackio_records_the_run(work: Path) -> None:
    """Beside the runs, readable by trackio itself, with every number of every step and the flat recipe."""
    done = process(TRAIN, "train", "r.yaml", "--set", "tracker=trackio", "--set", "train.steps=3")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert Path("runs/trackio").is_dir()
    read = process(_TRACKIO, TRACKIO_DIR=str((work / "runs" / "trackio").absolute()))
    assert read.returncode == 0, read.stderr
    name, config, rows = json.loads(read.stdout.splitlines()[-1])
    assert name == "one"
    assert config["adapter.r"] == 4
    assert config["evaluate.metrics"] == "loss, exact_match"
    steps = [{key: row[key] for key in line} for row, line in zip(rows, runs.metrics(), strict=True)]
    assert steps == runs.metrics()


def test_trackio_records_two_places_of_one_process_apart(work: Path) -> None:
    for place in ("runs", "others"):
        said = runs.train(f"output={place}/one", "tracker=trackio", "train.steps=1", "evaluate.metrics=[loss]")
        assert said.code == 0, said.err
        assert list(Path(place, "trackio").glob("*.db"))


_TRACKIO = """\
import json
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("finetune")
rows = SQLiteStorage.get_logs("finetune", run)
config = SQLiteStorage.get_run_config("finetune", run)
print(json.dumps([run, config, [row for row in rows if "loss" in row]]))
"""
KEY = "0123456789abcdef" * 2 + "deadbeef"


def homeless(work: Path, **more: str) -> dict[str, str]:
    """No key, no home to find one in, and no network."""
    home = {"HOME": str(work / "home"), "WANDB_API_KEY": "", "NETRC": str(work / "home" / ".netrc"), "WANDB_MODE": ""}
    return home | dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9") | more


def test_wandb_without_a_key_stays_offline_and_wandb_reads_the_run_back(work: Path) -> None:
    """The run is recorded in the run folder all the same, and wandb's own reader finds it whole."""
    words = ("--set", "tracker=wandb", "--set", "train.steps=3")
    done = process(TRAIN, "train", "r.yaml", *words, **homeless(work))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert not (work / "wandb").exists()
    said = "tracker: wandb, offline (no key was found); to upload later: wandb sync runs/one/wandb/offline-run-*"
    assert f"{said}; or set WANDB_API_KEY" in done.stdout[: done.stdout.index("loading base")]
    (recorded,) = (OUTPUT / "wandb").glob("offline-run-*/run-*.wandb")
    asked = [sys.executable, "-m", "wandb", "leet", "inspect", "--summary", "--json", str(recorded)]
    found = json.loads(subprocess.run(asked, capture_output=True, check=True, env=ENVIRONMENT).stdout)
    assert (found["project"], found["state"], found["exit_code"], found["step"]) == ("finetune", "finished", 0, 3)
    assert found["config"]["adapter.r"] == 4
    assert found["config"]["train.learning_rate"] == 0.005
    last = runs.metrics()[-1]
    assert {key: found["summary"][key] for key in last if key != "step"} == {k: last[k] for k in last if k != "step"}


@pytest.mark.parametrize(
    ("variables", "code", "text"),
    [
        (
            {},
            0,
            "offline (no key was found); to upload later: wandb sync runs/one/wandb/offline-run-*; or set WANDB_API",
        ),
        ({"WANDB_API_KEY": KEY}, 0, "wandb, online: recipe and numbers go to api.wandb.ai while the run trains"),
        ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "https://w.example:8"}, 0, "numbers go to w.example while"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, 0, "wandb, offline (as WANDB_MODE says); to upload later"),
        ({"WANDB_MODE": "disabled"}, 0, "wandb is disabled by WANDB_MODE: it records nothing, metrics.jsonl does"),
        (
            {"WANDB_MODE": "online"},
            5,
            "WANDB_MODE is online, and there is no key; set WANDB_API_KEY, or unset WANDB_MODE",
        ),
        ({"WANDB_MODE": "shared"}, 5, "WANDB_MODE is 'shared'; make it online, offline or disabled, or unset it"),
    ],
)
def test_the_plan_says_what_wandb_will_do(
    work: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], code: int, text: str
) -> None:
    for name, value in homeless(work, **variables).items():
        monkeypatch.setenv(name, value)
    said = runs.finetune("plan", "r.yaml", "--set", "tracker=wandb")
    assert said.code == code
    assert text in (said.err if code else said.out)
    assert KEY not in said.out + said.err
    assert not OUTPUT.exists()


def test_a_key_of_wandbs_own_login_counts_for_its_host_alone(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in homeless(work).items():
        monkeypatch.setenv(name, value)
    (work / "home").mkdir()
    Path(os.environ["NETRC"]).write_text(f"machine w.example login user password {KEY}\n")
    assert devices.wandb_mode("here") == "offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://w.example")
    assert devices.wandb_mode("here") == "online"
    Path(os.environ["NETRC"]).write_text("machine")
    assert devices.wandb_mode("here") == "offline"


def test_modes_of_the_environment_are_kept_and_no_key_is_written(work: Path) -> None:
    """A planted key: in no file of a run that records offline, or not at all."""
    for mode in ("offline", "disabled"):
        words = ("--set", "tracker=wandb", "--set", "train.steps=2", "--set", f"output=runs/{mode}")
        more = homeless(work, WANDB_API_KEY=KEY, WANDB_MODE=mode)
        done = process(TRAIN, "train", "r.yaml", *words, **more)
        assert done.returncode == 0, done.stderr
        assert KEY not in done.stdout + done.stderr
    assert len(list(Path("runs/offline/wandb").glob("offline-run-*/run-*.wandb"))) == 1
    assert not Path("runs/disabled/wandb").exists()
    files = [path for path in Path("runs").rglob("*") if path.is_file()]
    assert len(files) > 30
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def test_a_run_that_goes_on_keeps_its_wandb_id_and_others_have_another(work: Path) -> None:
    words = ("train", "r.yaml", "--set", "tracker=wandb", "--set", "train.steps=4")
    assert process(TRAIN, *words, "--until", "2", **homeless(work)).returncode == 0
    assert process(TRAIN, *words, **homeless(work)).returncode == 0
    first, second = ({path.name for path in OUTPUT.glob("wandb/offline-run-*/run-*.wandb")} for _ in range(2))
    assert first == second
    assert len(first) == 1, "one id"
    assert first.pop().startswith("run-one-")
    assert len(list(OUTPUT.glob("wandb/offline-run-*"))) in (1, 2)  # a folder a start; of one second only one
    assert devices._wandb_id(Path("runs/sweep/one")) != devices._wandb_id(Path("runs/sweep/one"))


def test_a_key_that_wandb_refuses_is_one_message_before_anything_loads(work: Path) -> None:
    words = ("--set", "tracker=wandb")
    done = process(TRAIN, "train", "r.yaml", *words, **homeless(work, WANDB_API_KEY="short"))
    assert done.returncode == 5
    assert "environment: api.wandb.ai: wandb cannot begin" in done.stderr
    assert "WANDB_MODE=offline" in done.stderr
    assert "Traceback" not in done.stderr
    assert "loading base" not in done.stdout


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow"])
def test_a_missing_tracker_names_its_extra(work: Path, monkeypatch: pytest.MonkeyPatch, tracker: str) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    said = runs.train(f"tracker={tracker}")
    assert said.code == 5
    assert f"the package {tracker} is not installed" in said.err
    assert f'pip install "finetune-qwen[{tracker}]"' in said.err


def test_several_processes_are_refused(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = runs.train()
    assert said.code == 5
    assert "2 processes were launched, and nothing says that they are one job; add --world 2" in said.err
