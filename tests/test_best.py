"""The best evaluated step: which it is, that its very adapter is kept, and that a run ends that finds no better."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from finetune import best, evals, runpage, runstory, runview
from finetune.checkpoint import folder_name
from finetune.recipe.sections import Evaluate
from finetune.run import Run
from finetune.runfolder import RunFolder
from tests import runs
from tests.faults import Mode, why_unavailable
from tests.faults.breaking import RENAMES, WRITES, At, Request, asked_in, asked_to_stop, killed_at, last_of
from tests.faults.sweep import Rig
from tests.runs import OUTPUT, finetune, train

# A rate that is too high: the held-out loss goes up and down, and its lowest is on the way.
ROUGH = ("train.learning_rate=0.02", "train.steps=24", "evaluate.every=3", "evaluate.metrics=[loss]")
BEST = (*ROUGH, "evaluate.keep=best")
STOPS = ("train.steps=12", "evaluate.every=3", "evaluate.early_stopping_patience=2",
         "evaluate.early_stopping_threshold=100.0")  # fmt: skip
"""Nothing improves by so much: the run ends at its third evaluation, after step 9."""


def scores(folder: Path = OUTPUT) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    return found


def ended(folder: Path = OUTPUT) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "finished.json").read_text())
    return found


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def judged(folder: Path, values: list[float], metric: str = "loss", **wanted: Any) -> Run:
    """A run whose evaluations at steps 2, 4, … had these scores."""
    made = {f"step {2 * at}": {metric: value} for at, value in enumerate(values, 1)}
    (folder / "scores.json").write_text(json.dumps({"before": {metric: 1000.0}, **made}))
    section = Evaluate(metrics=[metric], every=2, best_by=metric, **wanted)  # type: ignore[list-item]
    recipe = SimpleNamespace(evaluate=section)
    return cast(Run, SimpleNamespace(prepared=SimpleNamespace(recipe=recipe), folder=RunFolder(folder)))


@pytest.mark.parametrize(
    ("metric", "values", "threshold", "found"),
    [
        ("loss", [3, 2, 2.5, 1], 0, (8, 8, 0)),
        ("loss", [3, 2, 2.5, 2], 0, (4, 4, 2)),  # of equals the first
        ("exact_match", [0.1, 0.5, 0.4, 0.5], 0, (4, 4, 2)),
        ("exact_match", [0.5, 0.4, 0.3], 0, (2, 2, 2)),
        ("loss", [3, 2.9, 2.8, 2.7, 2.6], 0.25, (10, 8, 1)),  # small steps add up against the last mark
        ("loss", [3, 2.75], 0.25, (4, 2, 1)),  # more than the threshold, not as much
        ("loss", [5], 0, (2, 2, 0)),
    ],
)
def test_the_best_step_and_the_wait(
    tmp_path: Path, metric: str, values: list[float], threshold: float, found: tuple[int, int, int]
) -> None:
    run = judged(tmp_path, values, metric, early_stopping_threshold=float(threshold))
    now = best.standing(run, 2 * len(values))
    assert now.best == (found[0], values[found[0] // 2 - 1])
    assert (now.since, now.waited) == found[1:]


def test_later_and_other_judgements_do_not_count(tmp_path: Path) -> None:
    """A resumed run may find the scores of steps that it has not lived again; a pause makes one of its own."""
    run = judged(tmp_path, [3, 2, 1])
    (tmp_path / "scores.json").write_text(
        json.dumps(scores(tmp_path) | {"step 3": {"loss": 0.0}, "last": {"loss": 0.0}})
    )
    assert best.standing(run, 4).best == (4, 2.0)
    assert best.standing(run, 1) == best.Standing()


def test_each_score_has_one_direction() -> None:
    assert evals.gain("loss", 1.0, 3.0) == 2.0
    assert evals.gain("exact_match", 1.0, 0.5) == 0.5
    assert evals.gain("anything", 0.0, 0.5) == -0.5


def test_the_kept_adapter_is_the_best_steps_own(work: Path) -> None:
    assert train(*ROUGH, "train.save_every=3", "train.keep_last=99", "output=runs/all").code == 0
    said = train(*BEST, "train.save_every=5")
    assert said.code == 0, said.err
    losses = {at: scores()[f"step {at}"]["loss"] for at in range(3, 24, 3)} | {24: scores()["last"]["loss"]}
    step = min(losses, key=losses.__getitem__)
    assert step not in (3, 24), "this recipe is to have its best step on the way"
    assert weights(OUTPUT / "adapter") == weights(Path("runs/all/checkpoints") / folder_name(step))
    assert weights(OUTPUT / "adapter") != weights(Path("runs/all/adapter"))
    assert scores()["after"] == scores()[f"step {step}"]
    assert scores()["last"] == scores(Path("runs/all"))["after"]
    rows = [json.loads(line) for line in (OUTPUT / "losses.jsonl").read_text().splitlines()]
    assert all(row["after"] == row[f"step {step}"] for row in rows)
    assert ended()["kept"] == {"step": step, "by": "loss", "value": losses[step], "last": losses[24]}
    line = f"kept: step {step} (loss {losses[step]:.4f}); last: step 24 (loss {losses[24]:.4f})"
    assert line in said.out
    assert line[1:] in (OUTPUT / "report.html").read_text()
    assert runview.view(OUTPUT).state == line
    assert runview.view(OUTPUT).held_out[-1] == (24, losses[24])
    assert runstory.read(RunFolder(OUTPUT)).at_steps("loss")[-1] == (24, losses[24])
    said = finetune("eval", str(OUTPUT))
    assert said.code == 0
    assert f"{losses[step]:.4f}" in said.out, "and it is what later verbs load"
    before = runs.snapshot(OUTPUT)
    assert "this run is finished (24 steps)" in train(*BEST, "train.save_every=5").out
    assert {**runs.snapshot(OUTPUT), "evaluation.json": 0} == {**before, "evaluation.json": 0}


def test_the_last_step_may_be_the_best(work: Path) -> None:
    gentle = ("train.learning_rate=0.0005", "evaluate.every=2", "evaluate.metrics=[loss]", "evaluate.keep=best")
    said = train(*gentle)
    assert said.code == 0, said.err
    assert ended()["kept"]["step"] == 6
    assert "(loss " in said.out
    assert ", the last" in said.out
    assert train(*gentle[:-1], "output=runs/last").code == 0
    assert runs.adapter_digest() == runs.adapter_digest(Path("runs/last"))
    assert scores()["after"] == scores()["last"] == scores(Path("runs/last"))["after"]


def test_a_run_without_improvement_ends_early(work: Path) -> None:
    said = train(*STOPS)
    assert said.code == 0, said.err
    why = "stopped early after step 9 of 12: loss has not improved by more than 100 for 2 evaluations, since step 3"
    assert why in said.out
    assert [line["step"] for line in runs.metrics()] == list(range(1, 10))
    assert (ended()["steps"], ended()["of"]) == (9, 12)
    assert weights(OUTPUT / "adapter") == weights(OUTPUT / "checkpoints" / folder_name(9))
    assert list(scores()) == ["before", "step 3", "step 6", "step 9", "after"]
    assert scores()["after"] == scores()["step 9"]
    page = (OUTPUT / "report.html").read_text()
    assert why[1:] in page
    assert "was interrupted" not in page
    assert runstory.read(RunFolder(OUTPUT)).at_steps("loss")[-1][0] == 9
    said = finetune("dashboard", str(OUTPUT), "--json")
    assert (json.loads(said.out)["runs"][0]["state"], json.loads(said.out)["runs"][0]["step"]) == ("finished", 9)
    before = runs.snapshot(OUTPUT)
    assert "this run is finished (9 steps)" in train(*STOPS).out
    assert runs.snapshot(OUTPUT) == before


def test_the_plan_says_that_steps_are_at_most(work: Path) -> None:
    said = finetune("plan", "r.yaml", *(part for one in STOPS for part in ("--set", one)))
    assert "may end early: steps and time are at most" in said.out
    assert "may end early" not in finetune("plan", "r.yaml").out


def test_waiting_longer_goes_on_to_the_bits_of_an_unbroken_run(work: Path) -> None:
    assert train(*STOPS, "evaluate.keep=best").code == 0
    longer = (*STOPS[:2], "evaluate.keep=best", STOPS[3])
    said = train(*longer)
    assert said.code == 2
    assert "evaluate.early_stopping_patience: was 2, is 'null' now; add --extend to lengthen this run" in said.err
    assert train(*longer, options=["--extend"]).code == 0
    assert train(*longer, "output=runs/unbroken").code == 0
    assert runs.adapter_digest() == runs.adapter_digest(Path("runs/unbroken"))
    assert runs.curve() == runs.curve(Path("runs/unbroken"))
    assert scores() == scores(Path("runs/unbroken"))
    assert ended() == ended(Path("runs/unbroken"))
    said = train(*STOPS, "evaluate.keep=best", options=["--extend"])
    assert said.code == 2
    assert "it can be raised, or null, not lowered" in said.err


def test_a_lengthened_run_keeps_what_the_longer_one_would(work: Path) -> None:
    """The end of the shorter one is no evaluation of the longer one."""
    short, long = ([one for one in BEST if "steps" not in one] + [f"train.steps={n}"] for n in (20, 24))
    assert train(*short).code == 0
    assert train(*long, options=["--extend"]).code == 0
    assert train(*long, "output=runs/unbroken").code == 0
    assert runs.adapter_digest() == runs.adapter_digest(Path("runs/unbroken"))
    assert scores() == scores(Path("runs/unbroken"))
    assert ended() == ended(Path("runs/unbroken"))


def test_a_pause_is_no_evaluation_and_changes_nothing(work: Path) -> None:
    words = (*STOPS, "evaluate.keep=best")
    assert train(*words, options=["--until", "4"]).code == 0
    assert "step 4" in scores()
    assert train(*words, options=["--until", "9"]).code == 0  # where it ends anyway
    assert train(*words, "output=runs/unbroken").code == 0
    assert runs.adapter_digest() == runs.adapter_digest(Path("runs/unbroken"))
    assert ended() == ended(Path("runs/unbroken"))


def test_a_run_goes_on_from_before_its_last_judgement(work: Path) -> None:
    """Its newest checkpoint is gone: an evaluation that it knows lies ahead, and the adapter of that one is kept."""
    assert train(*BEST, "train.save_every=4", "train.keep_last=9", "output=runs/unbroken").code == 0
    assert train(*BEST, "train.save_every=4", "train.keep_last=9").code == 0
    for step in (20, 24):
        shutil.rmtree(OUTPUT / "checkpoints" / folder_name(step))
    (OUTPUT / "finished.json").unlink()
    assert train(*BEST, "train.save_every=4", "train.keep_last=9").code == 0
    assert ended() == ended(Path("runs/unbroken"))
    assert scores() == scores(Path("runs/unbroken"))


def test_what_was_chosen_by_or_kept_and_is_lost_is_one_message(work: Path) -> None:
    assert train(*BEST, options=["--until", "22"]).code == 0
    (kept,) = OUTPUT.glob("checkpoints/best-*/adapter_model.safetensors")
    whole, data = (OUTPUT / "scores.json").read_bytes(), bytearray(kept.read_bytes())
    (OUTPUT / "scores.json").write_text("{}")
    said = train(*BEST)
    assert said.code == 4
    assert "has lost some" in said.err
    (OUTPUT / "scores.json").write_bytes(whole)
    data[-1] ^= 1
    kept.write_bytes(data)
    said = train(*BEST)
    assert said.code == 4
    assert "the best so far, is damaged or lost; remove runs/one/checkpoints" in said.err
    shutil.rmtree(OUTPUT / "checkpoints")  # as it says
    assert train(*BEST).code == 0
    assert train(*BEST, "output=runs/unbroken").code == 0
    assert runs.adapter_digest() == runs.adapter_digest(Path("runs/unbroken"))


def test_several_adapters_are_refused(work: Path) -> None:
    with Path("r.yaml").open("a") as file:
        file.write("adapters:\n  - name: one\n  - name: two\n")
    for setting in ("evaluate.keep=best", "evaluate.early_stopping_patience=2"):
        said = finetune("plan", "r.yaml", "--set", "evaluate.every=2", "--set", setting)
        assert said.code == 2
        assert "several adapters are trained to their ends" in said.err
        assert "--set adapters=NAME" in said.err
        one = ("--set", "adapters=one", "--set", "evaluate.every=2", "--set", setting)
        assert finetune("plan", "r.yaml", *one).code == 0


def test_a_hostile_end_makes_a_poorer_story(finished: Path) -> None:
    for done in (
        {"steps": 6, "kept": {"step": "<b>", "by": ["<b>"], "value": "x"}, "stopped": {"by": {}, "threshold": "<b>"}},
        {"steps": 3, "of": 6, "stopped": 5, "kept": []}, {"steps": "6", "kept": {}}, [1],
    ):  # fmt: skip
        (OUTPUT / "finished.json").write_text(json.dumps(done))
        assert "<b>" not in runpage.page(runstory.read(RunFolder(OUTPUT)))
        assert runview.view(OUTPUT).state


def test_halving_takes_a_run_that_stopped_for_finished(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(runs.ROOT))
    words = ["train.steps=24", *STOPS[1:], "evaluate.metrics=[loss]"]  # after step 9, the rung is at 12
    sets = [part for one in words for part in ("--set", one)]
    said = finetune("sweep", "r.yaml", *sets, "--grid", "train.learning_rate=0.005,0.01", "--halving", "--json")
    assert said.code == 0, said.err
    assert {run["state"] for run in json.loads(said.out)["runs"]} == {"finished"}
    assert (
        finetune("sweep", "r.yaml", *sets, "--grid", "train.learning_rate=0.005,0.01", "--dry-run").out.count(
            "finished"
        )
        == 2
    )


# ---- broken at any place, and given again


@pytest.fixture(scope="module")
def rig(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    if why := why_unavailable():
        pytest.skip(why)
    with Rig(tiny_base, tmp_path_factory.mktemp("choosing")) as warm:
        yield warm


def test_killed_anywhere_it_keeps_the_same_step_and_stops_at_the_same(rig: Rig) -> None:
    log = rig.lanes[0].whole("choosing").log
    done = json.loads((rig.lanes[0].run_folder / "finished.json").read_text())
    assert (done["steps"], done["of"]) == (9, 12)
    assert done["kept"]["step"] in (3, 6, 9)
    bests = [op.number for op in log if "checkpoints/best-" in op.path and op.name in RENAMES]
    assert len(bests) > 2, "one is replaced by a better one"
    points = [(mode, number) for mode in (Mode.KILL_BEFORE, Mode.KILL_AFTER) for number in bests]
    points += [(Mode.TORN, last_of(log, WRITES, "best-", name)) for name in ("adapter_model", "manifest.json")]
    points += [(mode, last_of(log, RENAMES, "scores.json")) for mode in (Mode.KILL_BEFORE, Mode.KILL_AFTER)]
    points += [(Mode.KILL_AFTER, last_of(log, RENAMES, "samples.jsonl"))]
    points += [(Mode.KILL_BEFORE, last_of(log, RENAMES, name)) for name in ("step-00000009", "finished.json")]
    draw = random.Random(5)
    points += [
        (draw.choice([Mode.KILL_BEFORE, Mode.KILL_AFTER, Mode.TORN]), n) for n in draw.sample(range(1, len(log)), 9)
    ]
    assert rig.sweep(killed_at, [At("choosing", *point) for point in points]).faults == []


def test_asked_to_stop_it_goes_on_to_the_same_end(rig: Rig) -> None:
    places = [("choosing", "finetune.evaluate:judge", 4), ("choosing", "finetune.best:_keep", 1),
              ("choosing", "finetune.state:write_adapter", 1)]  # fmt: skip
    assert rig.sweep(asked_in, places).faults == []
    assert rig.sweep(asked_to_stop, [Request("choosing", 0.6, 15)]).faults == []
