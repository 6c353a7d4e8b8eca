"""Runs: going on, being finished, being refused, being interrupted, and always with the same bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import devices, evaluate, loop
from finetune.checkpoint import folder_name
from finetune.runfolder import RunFolder
from tests import runs
from tests.runs import OUTPUT, train


def test_a_run_leaves_what_the_next_verbs_need(finished: Path) -> None:
    names = {path.name for path in OUTPUT.iterdir()} - {".lock"}
    assert names == {
        "recipe.yaml", "plan.json", "identity.json", "metrics.jsonl", "scores.json", "samples.jsonl", "losses.jsonl",
        "checkpoints", "adapter", "finished.json", "data.json", "report.html",
    }  # fmt: skip
    assert [line["step"] for line in runs.metrics()] == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in (OUTPUT / "checkpoints").iterdir()) == [folder_name(4), folder_name(6)]
    scores = json.loads((OUTPUT / "scores.json").read_text())
    assert set(scores) == {"before", "after"}
    assert scores["after"]["loss"] < scores["before"]["loss"]
    assert len((OUTPUT / "samples.jsonl").read_text().splitlines()) == 4


def test_a_finished_run_is_left_alone(finished: Path) -> None:
    before = runs.snapshot(OUTPUT)
    said = train()
    assert (said.code, said.err) == (0, "")
    assert "this run is finished (6 steps)" in said.out
    assert runs.snapshot(OUTPUT) == before


def test_the_same_recipe_gives_the_same_bits(finished: Path, trained: Path) -> None:
    shutil.rmtree(OUTPUT)
    assert train().code == 0
    assert runs.adapter_digest() == runs.adapter_digest(trained / OUTPUT)
    assert runs.curve() == runs.curve(trained / OUTPUT)
    assert (OUTPUT / "scores.json").read_bytes() == (trained / OUTPUT / "scores.json").read_bytes()
    assert train("output=runs/other", "train.seed=4").code == 0
    assert runs.adapter_digest(Path("runs/other")) != runs.adapter_digest()


def test_extending_equals_the_longer_run(finished: Path) -> None:
    said = train("train.steps=9")
    assert said.code == 2
    assert "train.steps: was 6, is 9 now; add --extend to lengthen this run" in said.err
    assert train("train.steps=9", options=["--extend"]).code == 0
    assert train("train.steps=9", "output=runs/long").code == 0
    assert runs.adapter_digest() == runs.adapter_digest(Path("runs/long"))
    assert runs.curve() == runs.curve(Path("runs/long"))
    scores = [json.loads((folder / "scores.json").read_text()) for folder in (OUTPUT, Path("runs/long"))]
    assert scores[0] == scores[1]
    said = train("train.steps=4", options=["--extend"])
    assert said.code == 2
    assert "lengthened, not shortened" in said.err


def test_extending_cannot_change_the_steps_already_made(work: Path) -> None:
    steps = ("train.steps=null", "train.examples_per_step=8")
    assert train(*steps, "train.epochs=1").code == 0  # 20 rows: the third step is short
    said = train(*steps, "train.epochs=2", options=["--extend"])
    assert said.code == 2
    assert "not the first of these" in said.err


def _append(path: str) -> None:
    with Path(path).open("a") as file:
        file.write(json.dumps(runs.chat("more", "words")) + "\n")


def _flip(path: str) -> None:
    """Another last weight."""
    data = bytearray(Path(path).read_bytes())
    data[-1] ^= 1
    Path(path).write_bytes(data)


@pytest.mark.parametrize(
    ("change", "overrides", "code", "named"),
    [
        (None, ["train.learning_rate=0.004"], 2, "train.learning_rate: was 0.005, is 0.004 now"),
        (None, ["adapter.r=5"], 2, "adapter.r: was 4, is 5 now"),
        (None, ["evaluate.max_new_tokens=5"], 2, "evaluate.max_new_tokens"),
        (lambda: _append("train.jsonl"), [], 3, "train.jsonl: this file is not the one that the run began with"),
        (lambda: _append("eval.jsonl"), [], 3, "eval.jsonl: this file is not the one that the run began with"),
        (lambda: _flip("base/model.safetensors"), [], 4, "model.safetensors: this file is not the one"),
    ],
)
def test_another_recipe_data_or_base_is_refused(
    finished: Path, change: Callable[[], None] | None, overrides: list[str], code: int, named: str
) -> None:
    (OUTPUT / "finished.json").unlink()
    if change:
        change()
    before = runs.snapshot(OUTPUT)
    said = train(*overrides)
    assert said.code == code
    assert named in said.err
    assert len(said.err.splitlines()) == 1
    assert runs.snapshot(OUTPUT) == before


def test_all_differing_keys_are_named(finished: Path) -> None:
    said = train("train.learning_rate=0.004", "adapter.lora_alpha=9")
    assert said.code == 2
    assert [line.split(": ")[2] for line in said.err.splitlines()] == ["adapter.lora_alpha", "train.learning_rate"]


def test_a_folder_with_other_files_is_not_touched(work: Path) -> None:
    OUTPUT.mkdir(parents=True)
    (OUTPUT / "thesis.doc").write_text("years of work")
    said = train()
    assert said.code == 5
    assert "thesis.doc" in said.err
    assert [path.name for path in OUTPUT.iterdir()] == ["thesis.doc"]


def test_an_output_below_a_file_is_refused(work: Path) -> None:
    Path("runs").write_text("")
    said = train()
    assert said.code == 2
    assert "output: runs is a file" in said.err


def test_a_missing_tracker_and_too_many_workers_are_told_before_anything(work: Path) -> None:
    for setting in ("tracker=mlflow", "train.workers=1000"):
        for verb in ("plan", "train"):
            said = runs.finetune(verb, "r.yaml", "--set", setting)
            assert (said.code, said.err.count("\n")) == (5, 1), said.err
            assert setting.partition("=")[0] in said.err
    assert not OUTPUT.exists()


def test_the_tracker_may_change_within_a_run(work: Path) -> None:
    assert train("train.steps=2").code == 0
    assert train("train.steps=4", "tracker=trackio", options=["--extend"]).code == 0


def test_lost_scores_are_made_again_and_a_lost_curve_is_said(work: Path) -> None:
    whole = train("train.steps=4", "output=runs/whole")
    assert whole.code == 0
    assert train("train.steps=2").code == 0
    (OUTPUT / "scores.json").write_text("{")
    (OUTPUT / "samples.jsonl").unlink()
    (OUTPUT / "metrics.jsonl").unlink()
    said = train("train.steps=4", options=["--extend"])
    assert said.code == 0, said.err
    assert "metrics.jsonl has lost 2 of 2 steps" in said.out
    assert (OUTPUT / "scores.json").read_text() == Path("runs/whole/scores.json").read_text()
    assert (OUTPUT / "samples.jsonl").read_text() == Path("runs/whole/samples.jsonl").read_text()


def test_a_shorter_run_is_not_told_to_extend(work: Path) -> None:
    assert train("train.steps=4").code == 0
    said = train("train.steps=2")
    assert said.code == 2
    assert "--extend" not in said.err


def test_a_run_without_its_identity_is_recognised(work: Path) -> None:
    assert train("train.steps=2").code == 0
    (OUTPUT / "identity.json").unlink()
    said = train("train.steps=2")
    assert said.code == 5
    assert "a run without its identity.json" in said.err


def test_a_held_folder_is_refused(work: Path) -> None:
    """The lock belongs to an open file, so that a second start is refused in the same process as in another."""
    with RunFolder(OUTPUT).lock():
        said = train()
    assert said.code == 5
    assert "another finetune process is working in this folder" in said.err
    assert {path.name for path in OUTPUT.iterdir()} <= {".lock"}
    assert train().code == 0


def signal_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """SIGTERM to this process at the start of the call-th call of ``owner.name``."""
    real, calls = getattr(owner, name), iter(range(1, 10_000))

    def signalling(*arguments: Any, **more: Any) -> Any:
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **more)

    monkeypatch.setattr(owner, name, signalling)


@pytest.mark.parametrize(
    ("owner", "name", "call", "saved"),
    [
        (evaluate.loss, "by_token", 1, None),  # judging "before"
        (evaluate.generation, "greedy", 1, None),
        (loop.torch.nn.utils, "clip_grad_norm_", 1, 1),  # in the first step
        (loop.torch.nn.utils, "clip_grad_norm_", 3, 3),  # in the third, between two checkpoints
        (devices.Session, "log", 4, 4),
        (loop.torch.nn.utils, "clip_grad_norm_", 6, 6),  # in the last
        (evaluate.loss, "by_token", 2, 6),  # judging "after"
    ],
)
def test_sigterm_leaves_a_run_that_goes_on(
    work: Path, trained: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, saved: int | None
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        signal_at(patch, owner, name, call)
        said = train()
    assert said.code == 6
    assert len(said.err.splitlines()) == 1
    assert "the same command goes on from here" in said.err
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not (OUTPUT / "finished.json").exists()
    kept = sorted(path.name for path in (OUTPUT / "checkpoints").glob("step-*"))
    assert (kept[-1] if kept else None) == (folder_name(saved) if saved else None)
    assert train().code == 0
    assert runs.adapter_digest() == runs.adapter_digest(trained / OUTPUT)
    assert runs.curve() == runs.curve(trained / OUTPUT)
    assert (OUTPUT / "scores.json").read_bytes() == (trained / OUTPUT / "scores.json").read_bytes()


def test_steps_of_a_lost_stretch_are_counted_once(finished: Path, trained: Path) -> None:
    """As after a kill: steps were logged that no checkpoint holds, the last line is cut off, nothing is finished."""
    (OUTPUT / "finished.json").unlink()
    shutil.rmtree(OUTPUT / "adapter")
    shutil.rmtree(OUTPUT / "checkpoints" / folder_name(6))
    with (OUTPUT / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    said = train()
    assert said.code == 0
    assert "going on after step 4" in said.out
    assert runs.curve() == runs.curve(trained / OUTPUT)
    assert runs.adapter_digest() == runs.adapter_digest(trained / OUTPUT)


def test_a_damaged_checkpoint_is_named_and_passed_over(finished: Path, trained: Path) -> None:
    (OUTPUT / "finished.json").unlink()
    shutil.rmtree(OUTPUT / "adapter")
    _flip(str(OUTPUT / "checkpoints" / folder_name(6) / "optimizer.safetensors"))
    said = train()
    assert said.code == 0
    assert f"{folder_name(6)} is passed over" in said.out
    assert runs.adapter_digest() == runs.adapter_digest(trained / OUTPUT)


def test_a_damaged_adapter_of_a_finished_run_is_made_again(finished: Path, trained: Path) -> None:
    _flip(str(OUTPUT / "adapter" / "adapter_model.safetensors"))
    assert train().code == 0
    assert runs.adapter_digest() == runs.adapter_digest(trained / OUTPUT)


def _edit_identity(**environment: Any) -> None:
    stored = json.loads((OUTPUT / "identity.json").read_text())
    stored["environment"] |= environment
    (OUTPUT / "identity.json").write_text(json.dumps(stored))


def test_another_machine_is_said_and_goes_on(finished: Path) -> None:
    (OUTPUT / "finished.json").unlink()
    _edit_identity(torch="1.0.0", instruction_set="abacus")
    said = train()
    assert said.code == 0
    assert f"torch was 1.0.0 and is {torch.__version__} now" in said.out
    assert "instruction_set was abacus" in said.out
    assert "its bits will differ" in said.out


def test_the_run_keeps_its_number_of_threads(finished: Path) -> None:
    before = torch.get_num_threads()
    (OUTPUT / "finished.json").unlink()
    _edit_identity(threads=before + 1)
    try:
        assert train().code == 0
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_what_auto_became_is_kept(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The micro-batch decides the bits; on the second start the machine has less memory free."""
    from finetune import budget, hardware

    auto = "train.micro_batch_tokens=auto"
    assert train(auto, "output=runs/whole").code == 0
    with monkeypatch.context() as patch:
        signal_at(patch, loop.torch.nn.utils, "clip_grad_norm_", 2)
        assert train(auto).code == 6
    real = hardware.detect()
    ample = json.loads(Path("runs/whole/plan.json").read_text())
    process = ample["budget"]["overhead"] + ample["budget"]["weights"]
    fields = {**real.to_dict(), "free_memory": int(process / budget.USABLE)}
    monkeypatch.setattr(hardware, "detect", lambda: hardware.Hardware(**fields))
    said = train(auto)
    assert said.code == 0, said.err
    plans = [json.loads((folder / "plan.json").read_text()) for folder in (OUTPUT, Path("runs/whole"))]
    assert plans[0]["micro_batch_tokens"] < plans[1]["micro_batch_tokens"], "the test starves the machine too little"
    assert runs.adapter_digest() == runs.adapter_digest(Path("runs/whole"))


def test_a_damaged_identity_is_refused(finished: Path) -> None:
    (OUTPUT / "identity.json").write_text("{")
    said = train()
    assert said.code == 5
    assert "identity" in said.err


def test_a_loss_that_is_not_finite_names_rows_and_the_last_good_checkpoint(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = loop.torch.nn.utils.clip_grad_norm_, iter(range(1, 100))

    def blown(*arguments: Any) -> torch.Tensor:
        norm = real(*arguments)
        return torch.tensor(float("nan")) if next(calls) == 4 else norm

    monkeypatch.setattr(loop.torch.nn.utils, "clip_grad_norm_", blown)
    said = train()
    assert said.code == 4
    assert "step 4 is not finite" in said.err
    assert "train.jsonl:" in said.err
    assert f"last good checkpoint: {folder_name(2)}" in said.err


def test_a_moved_run_goes_on_where_it_lies(work: Path) -> None:
    assert train("train.steps=2").code == 0
    shutil.move("runs/one", "runs/moved")
    said = train("train.steps=4", "output=runs/moved", options=["--extend"])
    assert said.code == 0, said.err
    assert train("train.steps=4", f"output={Path('runs/moved').absolute()}").out.count("nothing to do") == 1


def test_beginning_again_is_said(work: Path) -> None:
    assert train("train.steps=4", "train.save_every=2").code == 0
    shutil.rmtree(OUTPUT / "checkpoints")
    shutil.rmtree(OUTPUT / "adapter")
    (OUTPUT / "finished.json").unlink()
    said = train("train.steps=4", "train.save_every=2")
    assert said.code == 0, said.err
    assert "begins again at its first step" in said.out


def test_only_what_a_run_leaves_behind_is_cleared(work: Path) -> None:
    assert train("train.steps=2").code == 0
    for name in ("mine.tmp-old", "step.tmp-77", "x.tmp-8-old"):
        (OUTPUT / name).mkdir()
    assert train("train.steps=4", options=["--extend"]).code == 0
    assert (OUTPUT / "mine.tmp-old").is_dir()
    assert not list(OUTPUT.glob("*.tmp-[0-9]*"))


def test_a_link_in_a_checkpoints_place_does_not_block(work: Path) -> None:
    assert train("train.steps=2").code == 0
    (OUTPUT / "checkpoints" / folder_name(4)).symlink_to("nowhere")
    assert train("train.steps=4", options=["--extend"]).code == 0
    assert (OUTPUT / "checkpoints" / folder_name(4) / "state.json").is_file()


def test_scores_that_are_no_scores_are_made_again(work: Path) -> None:
    assert train("train.steps=2").code == 0
    (OUTPUT / "scores.json").write_text("[1]")
    assert train("train.steps=4", options=["--extend"]).code == 0
    assert set(json.loads((OUTPUT / "scores.json").read_text())) == {"before", "after"}
