"""Sweeps that are really trained, in processes of their own: planned, budgeted, resumed, halved, compared."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from finetune import sweep, sweepplan
from tests import runs
from tests.runs import OUTPUT, Said, finetune, train

GRID = ("--grid", "train.learning_rate=0.005,0.05")
NAMES = ("learning_rate=0.005", "learning_rate=0.05")


@pytest.fixture
def place(work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workplace from where a child process finds this package."""
    monkeypatch.setenv("PYTHONPATH", str(runs.ROOT))
    return work


def swept(*words: str) -> Said:
    return finetune("sweep", "r.yaml", *words)


def answered(*words: str) -> dict[str, Any]:
    said = swept(*words, "--json")
    assert said.code == 0, said.err
    found: dict[str, Any] = json.loads(said.out)
    return found


def test_a_dry_run_plans_all_and_writes_nothing(place: Path) -> None:
    said = swept("--grid", "adapter.r=2,4", *GRID, "--dry-run")
    assert said.code == 0, said.err
    assert "4 runs below runs/one" in said.out
    assert all(f"r={rank},{name}" in said.out for rank in (2, 4) for name in NAMES)
    assert said.out.count(" MB") + said.out.count(" GB") == 4
    assert "in all (predicted)" in said.out
    assert not Path("runs").exists()
    found = answered(*GRID, "--dry-run")
    assert found["seconds"] == pytest.approx(sum(run["seconds"] for run in found["runs"]))
    assert not Path("runs").exists()


def test_faults_of_all_are_told_before_anything_is_written(place: Path) -> None:
    said = swept("--grid", "adapter.target_modules=[nothing],[nowhere]")
    assert said.code == 2
    assert "(in target_modules=nothing)" in said.err
    assert "(in target_modules=nowhere)" in said.err
    said = swept("--grid", "adapter.r=8,many")
    assert (said.code, said.out) == (2, "")
    for budget in ("2", "soon"):
        assert swept(*GRID, "--budget", budget).code == 2
    assert not Path("runs").exists()


def test_each_run_is_an_ordinary_run_and_the_best_leads_the_comparison(place: Path) -> None:
    found = answered(*GRID)
    assert [(run["name"], run["state"]) for run in found["runs"]] == [(name, "finished") for name in NAMES]
    assert train("train.learning_rate=0.05", "output=runs/alone").code == 0
    assert runs.adapter_digest(OUTPUT / NAMES[1]) == runs.adapter_digest(Path("runs/alone"))
    losses = {name: json.loads((OUTPUT / name / "scores.json").read_text())["after"]["loss"] for name in NAMES}
    compared = found["comparison"]
    assert [run["name"] for run in compared["runs"]] == sorted(NAMES, key=losses.__getitem__)
    assert compared["recipe"].keys() == {"train.learning_rate"}
    assert compared["picked"] is True
    assert (OUTPUT / "comparison.html").read_text().startswith("<!doctype html>")
    before = {name: runs.snapshot(OUTPUT / name) for name in NAMES}
    again = answered(*GRID)
    assert {name: runs.snapshot(OUTPUT / name) for name in NAMES} == before  # finished runs are not begun again
    assert again["comparison"] == compared
    said = finetune("train", "r.yaml")
    assert said.code == 5  # nothing else is trained into a sweep's folder
    shutil.rmtree(OUTPUT)
    assert train().code == 0
    said = swept(*GRID)
    assert said.code == 5
    assert "a run of its own stands in this folder" in said.err


def test_a_run_that_fails_is_named_and_the_others_go_on(place: Path) -> None:
    folder = OUTPUT / NAMES[0]
    folder.mkdir(parents=True)
    (folder / "identity.json").write_text(json.dumps({
        "recipe": {"train.learning_rate": 1}, "data": {}, "base": {}, "resolved": {}, "environment": {"threads": 1},
    }))  # fmt: skip
    said = swept(*GRID)
    assert said.code == 1
    assert f"{folder}: failed with exit code 2" in said.err
    assert f"{NAMES[1]}: finished" in said.out
    assert (OUTPUT / NAMES[1] / "finished.json").exists()


def test_what_exceeds_the_budget_is_cut_by_name(place: Path) -> None:
    seconds = {run["name"]: run["seconds"] for run in answered(*GRID, "--dry-run")["runs"]}
    plan = answered("--grid", "train.steps=2,40000,3", "--dry-run", "--budget", "5s")
    states = {run["name"]: run["state"] for run in plan["runs"]}
    assert states == {"steps=2": "", "steps=40000": "left out: beyond the budget", "steps=3": ""}
    assert sum(seconds.values()) > 0
    said = swept("--grid", "train.steps=40000,50000", "--budget", "1s")
    assert said.code == 5
    assert "it pays for none of them" in said.err
    said = swept("--grid", "train.steps=2,50000", "--budget", "1s", "--halving")
    assert said.code == 5
    assert "--halving cannot leave runs out" in said.err
    assert not Path("runs").exists()


def test_a_paused_run_goes_on_to_the_bits_of_an_unbroken_one(work: Path) -> None:
    """Also with a schedule that knows its end: ``--extend`` could not."""
    linear = "train.schedule=linear"
    said = train(linear, "train.save_every=4", options=["--until", "3"])
    assert said.code == 0, said.err
    assert "paused after step 3 of 6" in said.out
    assert "adapter:" not in said.out
    assert not (OUTPUT / "finished.json").exists()
    assert list(json.loads((OUTPUT / "scores.json").read_text())) == ["before", "step 3"]
    assert "nothing to do until step 2" in train(linear, "train.save_every=4", options=["--until", "2"]).out
    assert train(linear, "train.save_every=4").code == 0
    assert train(linear, "train.save_every=4", "output=runs/unbroken").code == 0
    assert runs.adapter_digest() == runs.adapter_digest(Path("runs/unbroken"))
    assert runs.curve() == runs.curve(Path("runs/unbroken"))


def test_a_pause_beyond_the_end_is_the_end(work: Path) -> None:
    assert train(options=["--until", "6"]).code == 0
    assert (OUTPUT / "finished.json").exists()
    assert list(json.loads((OUTPUT / "scores.json").read_text())) == ["before", "after"]


def test_halving_lets_the_better_half_go_on(place: Path) -> None:
    """Of three rates one is absurd: it is out at half of its steps, by its held-out loss there."""
    words = ("--grid", "train.learning_rate=0.00001,0.005,0.02", "--set", "train.schedule=linear", "--halving")
    found = answered(*words)
    states = {run["name"].partition("=")[2]: run["state"] for run in found["runs"]}
    assert states == {"0.00001": "halved out at step 3", "0.005": "finished", "0.02": "finished"}
    out = OUTPUT / "learning_rate=0.00001"
    assert len(runs.metrics(out)) == 3
    table = json.loads(finetune("dashboard", str(OUTPUT), "--json").out)["runs"]
    told = {Path(run["folder"]).name: run["state"] for run in table}
    assert told[out.name] == "halved out"
    assert set(told.values()) == {"halved out", "finished"}
    at_three = {
        name: json.loads((OUTPUT / f"learning_rate={name}" / "scores.json").read_text())["step 3"]["loss"]
        for name in states
    }
    assert max(at_three, key=at_three.__getitem__) == "0.00001"
    assert train("train.learning_rate=0.02", "train.schedule=linear", "output=runs/alone").code == 0
    assert runs.adapter_digest(OUTPUT / "learning_rate=0.02") == runs.adapter_digest(Path("runs/alone"))
    before = {path.name: runs.snapshot(path) for path in OUTPUT.iterdir() if path.is_dir()}
    assert answered(*words)["comparison"] == found["comparison"]
    assert {path.name: runs.snapshot(path) for path in OUTPUT.iterdir() if path.is_dir()} == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--set", "evaluate.metrics=[exact_match]"], "keeps the runs of the lower held-out loss"),
        (["--grid", "evaluate.rows=2,3"], "this grid changes the rows"),
    ],
)
def test_halving_needs_losses_that_can_be_compared(place: Path, words: list[str], said: str) -> None:
    found = swept(*GRID, *words, "--halving", "--dry-run")
    assert found.code == 2
    assert said in found.err


def training(words: list[str]) -> subprocess.Popen[bytes]:
    """A sweep in a process of its own, whose first run has taken a step."""
    code = "from finetune.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-P", "-c", code, *words], env=runs.ENVIRONMENT, stdout=2)
    metrics, end = OUTPUT / NAMES[0] / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < end:
        time.sleep(0.02)
    return process


def test_a_killed_sweep_takes_its_run_along(place: Path) -> None:
    """SIGKILL reaches the sweep alone; the run that it started saves where it stands and leaves its folder free."""
    process = training(["sweep", "r.yaml", *GRID, "--set", "train.steps=100000", "--set", "train.save_every=100000"])
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    run = OUTPUT / NAMES[0]
    with FileLock(run / ".lock").acquire(timeout=120):
        lived = len(runs.metrics(run))
    assert 0 < lived < 100_000
    assert any(str(lived) in path.name for path in (run / "checkpoints").iterdir())


def test_a_stopped_sweep_goes_on_with_the_same_command(place: Path) -> None:
    """SIGTERM while the first run trains: it saves, the sweep leaves with 6, and nothing is trained twice."""
    words = ["sweep", "r.yaml", *GRID, "--set", "train.steps=60", "--set", "train.save_every=60"]
    process = training(words)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=120) == 6
    lived = len(runs.metrics(OUTPUT / NAMES[0]))
    assert 0 < lived < 60
    assert any(str(lived) in path.name for path in (OUTPUT / NAMES[0] / "checkpoints").iterdir())
    assert not (OUTPUT / NAMES[1]).exists()
    first = runs.curve(OUTPUT / NAMES[0])
    assert finetune(*words).code == 0
    for name in NAMES:
        assert [step for step, *_ in runs.curve(OUTPUT / name)] == list(range(1, 61))
    assert runs.curve(OUTPUT / NAMES[0])[:lived] == first


def test_a_run_whose_turn_comes_too_late_is_left_out(place: Path) -> None:
    from finetune.grid import combinations
    from finetune.terminal import Terminal

    root, grid = combinations(Path("r.yaml"), [GRID[1]], ())
    quiet = Terminal(quiet=True)
    planned = sweepplan.plan(Path("r.yaml"), root, grid, quiet, budget=3600, halve=False, fetch=False)
    trainer = sweep._Trainer(planned, quiet)
    trainer.end = time.monotonic() - 1
    assert [entry.state for entry in trainer.each()] == ["left out: beyond the budget"] * 2
    assert not Path("runs").exists()


def test_what_another_recipe_left_is_not_taken_for_this_ones(place: Path) -> None:
    """The folders' names are the same: a rung must not rank by losses of other runs."""
    words = ("--grid", "train.learning_rate=0.005,0.05", "--halving")
    assert swept(*words).code == 0
    said = swept(*words, "--set", "train.seed=99")
    assert said.code == 1
    assert said.err.count("failed with exit code 2") == 2


def test_a_quiet_sweep_prints_no_plan_of_its_runs(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    said = swept("--grid", "train.learning_rate=0.05", "--quiet")
    assert said.code == 0, said.err
    assert "gradients" not in said.out + capfd.readouterr().out
    assert "learning_rate=0.05: finished" in said.out
