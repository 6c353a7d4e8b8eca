"""Whole runs that learn from a teacher: an adapter over the same base, another model, and what one said once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import identity, manifest, model, prepare, teacher
from finetune import run as runs_module
from finetune.terminal import Terminal
from tests import runs

TEACHER = Path("runs/teacher")
WHOLE = Path("runs/whole")
WANTED = ("objective.method=distill", "adapter.r=2", "adapter.lora_alpha=4")


@pytest.fixture
def school(work: Path) -> Path:
    """The working folder with a finished run that teaches, of twice the student's rank."""
    said = runs.train(f"output={TEACHER}", "train.steps=12")
    assert said.code == 0, said.err
    runs.awake(TEACHER / "adapter")
    return work


def wanted(*more: str) -> list[str]:
    """The overrides of a student's run: ``more``, and the teacher where that names none."""
    named = any(one.startswith("objective.teacher=") for one in more)
    return [*WANTED, *more, *([] if named else [f"objective.teacher={TEACHER}"])]


def student(*more: str, **how: Any) -> runs.Said:
    return runs.train(*wanted(*more), **how)


def scores(folder: Path = runs.OUTPUT) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    return found


def written(*more: str, out: str = "said") -> runs.Said:
    words = wanted(*(one for one in more if not one.startswith("--")))
    options = [one for one in more if one.startswith("--")]
    return runs.finetune("teach", "r.yaml", "--out", out, *options, *(part for one in words for part in ("--set", one)))


@pytest.mark.usefixtures("school")
@pytest.mark.parametrize("kind", ["live", "stored"])
def test_an_interrupted_run_ends_with_the_same_bits(kind: str) -> None:
    """Over an NF4 base with dropout; nearer to the teacher at the end."""
    course = ["adapter.lora_dropout=0.1", "evaluate.every=2", "train.steps=8"]
    if kind == "stored":
        assert written("--top-k=8").code == 0
        shutil.rmtree(TEACHER)
        course.append("objective.teacher=said")
    assert student(*course, f"output={WHOLE}").code == 0
    assert student(*course, options=("--until", "4")).code == 0
    assert student(*course).code == 0
    assert runs.adapter_digest() == runs.adapter_digest(WHOLE)
    assert runs.curve() == runs.curve(WHOLE)
    figures = ("cross_entropy", "divergence")
    one, two = runs.metrics(), runs.metrics(WHOLE)
    assert [[line[key] for key in figures] for line in one] == [[line[key] for key in figures] for line in two]
    assert scores() == scores(WHOLE)
    before, after = scores()["before"], scores()["after"]
    assert after["teacher_kl"] < before["teacher_kl"]
    assert before["loss"] > 0


@pytest.mark.usefixtures("school")
def test_a_run_goes_the_whole_road() -> None:
    """Judged against the teacher before, after and merged, also where the teacher is long gone."""
    said = student("train.steps=12", "objective.divergence=jsd", "objective.alpha=0.2")
    assert said.code == 0, said.err
    assert "the adapter of runs/teacher over this run's own base: no second model" in said.out
    stored = scores()
    shutil.rmtree(TEACHER)
    said = runs.finetune("eval", str(runs.OUTPUT), "--fresh", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)["scores"]
    assert (found["base"], found["adapter"]) == (stored["before"], stored["after"])
    assert "teacher kl" in said.err
    assert runs.merge_run().code == 0
    assert scores()["merged"]["teacher_kl"] == pytest.approx(stored["after"]["teacher_kl"], rel=0.05, abs=1e-4)
    page = (runs.OUTPUT / "report.html").read_text()
    assert "divergence from the teacher" in page
    assert "teacher kl" in page
    runs.write_rows(Path("other.jsonl"), [runs.chat("What is 90 and 7?", "97")])
    said = runs.finetune("eval", str(runs.OUTPUT), "--data", "other.jsonl", "--json")
    assert said.code == 0, said.err
    assert "teacher_kl is left out" in said.err
    assert "teacher_kl" not in json.loads(said.out)["scores"]["adapter"]


@pytest.mark.usefixtures("school")
def test_a_model_of_its_own_teaches_the_same() -> None:
    """The teacher merged into a folder, held as a second model in fp32; its memory is in the plan."""
    base = "quantize.weights=fp32"  # a merge into the base as it was published is exact there
    assert runs.train("output=runs/plain", base, "train.steps=12").code == 0
    runs.awake(Path("runs/plain/adapter"))
    assert runs.merge_run(run=Path("runs/plain")).code == 0
    assert student(base, "objective.teacher=runs/plain", f"output={WHOLE}").code == 0
    said = student(base, f"objective.teacher={runs.MERGED}")
    assert said.code == 0, said.err
    assert f"the teacher is {runs.MERGED} in fp32, in memory beside the base" in said.out
    assert f"loading the teacher {runs.MERGED} as fp32" in said.out
    for one, two in zip(runs.metrics(), runs.metrics(WHOLE), strict=True):
        assert one["divergence"] == pytest.approx(two["divergence"], rel=0.02)  # rounded to bf16
    assert scores()["after"]["teacher_kl"] == pytest.approx(scores(WHOLE)["after"]["teacher_kl"], rel=0.02)
    plans = [json.loads((folder / "plan.json").read_text())["budget"]["teacher"] for folder in (runs.OUTPUT, WHOLE)]
    weights = (runs.MERGED / "model.safetensors").stat().st_size
    assert plans[0] == pytest.approx(2 * weights, rel=0.05)  # stored in bf16
    assert plans[1] == (Path("runs/plain/adapter/adapter_model.safetensors")).stat().st_size


@pytest.mark.usefixtures("school")
def test_the_base_itself_can_teach() -> None:
    """Starting from an adapter, back towards the base: no second model either."""
    said = runs.train("objective.method=distill", "objective.teacher=base", f"adapter.start_from={TEACHER}")
    assert said.code == 0, said.err
    assert "the teacher is this run's own base with the adapter switched off" in said.out
    assert scores()["after"]["teacher_kl"] < scores()["before"]["teacher_kl"]


@pytest.mark.usefixtures("school")
def test_an_adapter_over_another_form_of_its_base() -> None:
    said = student("quantize.weights=fp32", options=("--until", "1"))
    assert "that adapter was trained over nf4; teacher_weights: nf4 has it so" in said.out
    said = student(
        "quantize.weights=fp32", "objective.teacher_weights=nf4", f"output={WHOLE}", options=("--until", "1")
    )
    assert said.code == 0, said.err
    assert "loading the teacher runs/teacher as nf4" in said.out
    ours = student("output=runs/nf4", options=("--until", "1"))
    assert ours.code == 0, ours.err
    told = [runs.metrics(folder)[0]["divergence"] for folder in (runs.OUTPUT, WHOLE, Path("runs/nf4"))]
    assert len(set(told)) == 3


@pytest.mark.usefixtures("school")
def test_another_teacher_is_another_run() -> None:
    assert student(options=("--until", "2")).code == 0
    shutil.copytree(TEACHER, "runs/moved")
    assert student("objective.teacher=runs/moved", options=("--until", "3")).code == 0  # the same one, elsewhere
    weights = Path("runs/moved/adapter/adapter_model.safetensors")
    from safetensors.torch import load_file, save_file

    save_file({name: value * 1.01 for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    manifest.write(weights.parent, manifest.digests(weights.parent))
    said = student("objective.teacher=runs/moved")
    assert said.code == 4
    assert "teacher/adapter_model.safetensors: this file is not the one that the run began with" in said.err
    said = student("objective.temperature=2.0")
    assert said.code == 2
    assert "objective.temperature" in said.err


def other_base(build: Callable[..., Path], folder: Path, swap: tuple[str, str] | None, **fields: Any) -> None:
    """Another model; ``swap``: two of its tokens change their ids."""
    build(folder, 7, **fields)
    if swap:
        path = folder / "tokenizer.json"
        stored = json.loads(path.read_text())
        words = stored["model"]["vocab"]
        words[swap[0]], words[swap[1]] = words[swap[1]], words[swap[0]]
        path.write_text(json.dumps(stored))


@pytest.mark.usefixtures("school")
def test_a_model_of_another_vocabulary_is_refused_before_anything_loads(build_tiny: Callable[..., Path]) -> None:
    other_base(build_tiny, Path("same"), None)
    assert student("objective.teacher=same", options=("--until", "1")).code == 0
    other_base(build_tiny, Path("swapped"), ("a", "b"))
    said = student("objective.teacher=swapped", "output=runs/two")
    assert said.code == 4
    assert "the teacher has another vocabulary: token " in said.err
    assert "and 1 more differ" in said.err
    assert "loading" not in said.out
    assert not Path("runs/two").exists()


@pytest.mark.usefixtures("school")
def test_who_cannot_teach() -> None:
    assert runs.train("output=runs/half", options=("--until", "2")).code == 0
    assert written("--top-k=4").code == 0
    shutil.copytree("said", "torn")
    with Path("torn/part-00000.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\7")
    shutil.copytree(TEACHER / "adapter", "judge")
    config = json.loads(Path("judge/adapter_config.json").read_text())
    Path("judge/adapter_config.json").write_text(json.dumps(config | {"task_type": "SEQ_CLS"}))
    manifest.write(Path("judge"), manifest.digests(Path("judge")))
    cases = {
        "judge": (4, "this is a reward model, which says nothing of tokens"),
        "runs/none": (2, "there is no runs/none; name a finished run, an adapter, a model"),
        "runs/half": (4, "this run is not finished"),
        "torn": (4, "part-00000.safetensors is damaged"),
        "runs/one": (2, "is the run's own output"),
    }
    for name, (code, words) in cases.items():
        said = student(f"objective.teacher={name}")
        assert (said.code, words in said.err) == (code, True), said.err
        assert "loading" not in said.out
        assert not runs.OUTPUT.exists()
    said = student("objective.teacher=said", "objective.temperature=2.0")
    assert (said.code, "was asked at the temperature 1, the recipe says 2" in said.err) == (2, True)
    runs.write_rows(Path("train.jsonl"), [runs.chat(f"What is {n} and {n + 1}?", f"{2 * n + 2}") for n in range(20)])
    said = student("objective.teacher=said")
    assert (said.code, "says nothing of 20 samples, the first is train.jsonl:1" in said.err) == (4, True), said.err


@pytest.mark.usefixtures("school")
def test_a_teacher_over_another_base_than_it_was_trained_on_is_refused() -> None:
    note = TEACHER / "adapter" / "finetune.json"
    made = json.loads(note.read_text())
    made["base_sha256"] = dict.fromkeys(made["base_sha256"], "0" * 64)
    note.write_text(json.dumps(made))
    manifest.write(note.parent, manifest.digests(note.parent))
    said = student()
    assert (said.code, "the teacher's adapter was trained on another base" in said.err) == (4, True)
    assert not runs.OUTPUT.exists()


@pytest.mark.usefixtures("school")
def test_the_plan_knows_the_teacher() -> None:
    words = [part for one in (*WANTED, f"objective.teacher={TEACHER}") for part in ("--set", one)]
    said = runs.finetune("plan", "r.yaml", *words)
    assert said.code == 0, said.err
    assert "teacher " in next(line for line in said.out.splitlines() if "overhead" in line)
    assert "objective distill (teacher runs/teacher, teacher_weights auto, temperature 1.0, divergence" in said.out
    same = [part for one in WANTED[1:] for part in ("--set", one)]
    plain = json.loads(runs.finetune("plan", "r.yaml", "--json", *same).out)
    distilled = json.loads(runs.finetune("plan", "r.yaml", "--json", *words).out)
    assert distilled["memory"] > plain["memory"]
    assert distilled["seconds"] > plain["seconds"]
    assert runs.finetune("plan", "r.yaml", "--probe", *words).code == 0
    assert not runs.OUTPUT.exists()


@pytest.mark.usefixtures("school")
@pytest.mark.parametrize("model", ["base", "Qwen/Qwen2.5-14B-Instruct"])  # the second is known by its numbers
def test_a_teacher_in_memory_is_refused_beside_shards_and_what_it_said_is_not(model: str) -> None:
    def plan(teacher: Path, *options: str) -> runs.Said:
        overrides = wanted(f"model={model}", "train.shard=fsdp", f"objective.teacher={teacher}")
        sets = [part for one in overrides for part in ("--set", one)]
        return runs.finetune("plan", "r.yaml", "--processes", "2", "--card", "80", *options, *sets)

    said = plan(TEACHER)
    assert said.code == 2
    fix = "take shard: none, or as teacher what it said once: finetune teach"
    assert f"train.shard: a teacher in memory stands on a whole base; {fix}" in said.err
    assert written("train.shard=fsdp", "--top-k=4").code == 0, "one process asks it, over a whole base"
    said = plan(Path("said"))
    assert said.code == 0, said.err
    assert "each of 2 processes, which holds 1/2 of the layers" in said.out


@pytest.mark.usefixtures("school")
def test_the_teacher_is_the_prepared_one_and_holds_no_base_of_its_own() -> None:
    prepared = prepare.prepare(Path("r.yaml"), [*WANTED, f"objective.teacher={TEACHER}"])
    made = runs_module.Run(prepared, Terminal(silent=True))
    assert set(made.identity.teacher) == {"teacher/base", "teacher/adapter_model.safetensors"}
    assert student(options=("--until", "1")).code == 0
    stored = identity.read(runs.OUTPUT / "identity.json")
    assert stored is not None
    assert stored.teacher == made.identity.teacher
    assert prepared.teacher is not None
    base = model.load_base(made.base, made.form())
    live = teacher.load(prepared.teacher, base, made.form(), Terminal(silent=True))
    assert isinstance(live, teacher.Live)
    held = {one.data_ptr() for one in (*base.model.parameters(), *base.model.buffers())}
    own = [name for name, one in live.policy.model.named_parameters() if one.data_ptr() not in held]
    assert own
    assert all("lora_" in name for name in own)
    assert not any(isinstance(one, torch.nn.Parameter) and one.requires_grad for one in live.policy.model.parameters())
