"""Trackers: each records the run where the recipe says, without a network, and a missing one names its extra."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import runs
from tests.runs import OUTPUT, process

TRAIN = "import sys; from finetune.cli import main; sys.argv = ['finetune', *sys.argv[1:]]; main()"


def test_trackio_records_the_run(work: Path) -> None:
    """Beside the runs, readable by trackio itself, with every step and the flat recipe."""
    done = process(TRAIN, "train", "r.yaml", "--set", "tracker=trackio", "--set", "train.steps=3")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert Path("runs/trackio").is_dir()
    read = process(_TRACKIO, TRACKIO_DIR=str((work / "runs" / "trackio").absolute()))
    assert read.returncode == 0, read.stderr
    name, config, losses = json.loads(read.stdout.splitlines()[-1])
    assert name == "one"
    assert config["adapter.r"] == 4
    assert config["evaluate.metrics"] == "loss, exact_match"
    assert losses == [line["loss"] for line in runs.metrics()]


_TRACKIO = """\
import json
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("finetune")
rows = SQLiteStorage.get_logs("finetune", run)
config = SQLiteStorage.get_run_config("finetune", run)
print(json.dumps([run, config, [row["loss"] for row in rows if "loss" in row]]))
"""


def test_wandb_without_a_key_stays_offline(work: Path) -> None:
    """No key, no home to find one in, and no network: the run is recorded in the run folder all the same."""
    home = {"HOME": str(work / "home"), "WANDB_API_KEY": "", "NETRC": str(work / "home" / ".netrc")}
    home |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
    done = process(TRAIN, "train", "r.yaml", "--set", "tracker=wandb", "--set", "train.steps=3", **home)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    recorded = list((OUTPUT / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(recorded) == 1
    assert recorded[0].stat().st_size > 0
    assert b"adapter.r" in recorded[0].read_bytes()
    assert not (work / "wandb").exists()


@pytest.mark.parametrize("tracker", ["tensorboard", "mlflow"])
def test_a_missing_tracker_names_its_extra(work: Path, monkeypatch: pytest.MonkeyPatch, tracker: str) -> None:
    from finetune import devices

    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    said = runs.train(f"tracker={tracker}")
    assert said.code == 5
    assert f"the package {tracker} is not installed" in said.err
    assert f'pip install "finetune-qwen[{tracker}]"' in said.err


def test_several_processes_are_refused(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = runs.train()
    assert said.code == 5
    assert "several processes were launched, one is supported so far" in said.err
