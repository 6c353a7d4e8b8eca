"""Several adapters in one run: each as its own single run, killed between two saves, asked to stop, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from finetune import checkpoint, interrupts, lockstep, prepare, state
from finetune import train as training
from tests import runs, tiny

ADAPTERS = """\
adapters:
  - name: wide
    adapter:
      r: 8
    train:
      learning_rate: 0.001
  - name: short
    adapter:
      lora_alpha: 16
      target_modules: [q_proj, down_proj]
    data:
      train_path: eval.jsonl
      eval_path: train.jsonl
    train:
      steps: 3
      examples_per_step: 2
      seed: 5
"""
# One checkpoint is kept: the step that all have must not go before all have the next one.
RECIPE = (
    runs.RECIPE.replace("runs/one", "runs/all").replace("save_every: 2", "save_every: 2\n  keep_last: 1") + ADAPTERS
)
ROOT = Path("runs/all")
NAMES = ("short", "wide")


@pytest.fixture
def place(work: Path) -> Path:
    (work / "r.yaml").write_text(RECIPE)
    return work


def apart(one: Path, two: Path) -> float:
    """Of the whole adapters, norm-relative; their tensors have the same names."""
    a, b = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two))
    return tiny.distance(tiny.flat(a), tiny.flat(b)) if a.keys() == b.keys() else 1.0


def left(folder: Path) -> dict[str, Any]:
    """What a run left, without times (the report has them too) and without what tells of today's memory."""
    found: dict[str, Any] = {
        name: digest for name, (digest, _) in runs.snapshot(folder).items()
        if Path(name).name not in ("metrics.jsonl", "plan.json", "report.html", ".lock")
    }  # fmt: skip
    return found | {f"curve of {name}": runs.curve(folder / name) for name in NAMES}


def test_each_is_its_own_single_run(place: Path) -> None:
    said = runs.train()
    assert said.code == 0, said.err
    shutil.move(ROOT, "together")
    for name in NAMES:
        one = Path("together") / name
        assert runs.train(f"adapters={name}").code == 0
        assert apart(one, ROOT / name) < 1e-5
        for mine, own in zip(runs.metrics(one), runs.metrics(ROOT / name), strict=True):
            assert abs(mine["loss"] - own["loss"]) <= 1e-5 * own["loss"]
            assert abs(mine["grad_norm"] - own["grad_norm"]) <= 1e-5 * own["grad_norm"]
            for key in ("step", "learning_rate", "tokens", "supervised_tokens", "samples"):
                assert mine[key] == own[key]
        assert (one / "recipe.yaml").read_bytes() == (ROOT / name / "recipe.yaml").read_bytes()
        for file in ("adapter_config.json", "finetune.json"):
            assert (one / "adapter" / file).read_bytes() == (ROOT / name / "adapter" / file).read_bytes()
        scores, own_scores = (json.loads((folder / "scores.json").read_text()) for folder in (one, ROOT / name))
        for moment in ("before", "after"):
            assert scores[moment].keys() == own_scores[moment].keys()
            assert scores[moment]["loss"] == pytest.approx(own_scores[moment]["loss"], rel=1e-5)
    assert apart(Path("together/wide"), Path("together/short")) == 1.0
    assert "these runs are finished" not in said.out
    shutil.rmtree(ROOT)
    shutil.move("together", ROOT)
    assert "these runs are finished: nothing to do in runs/all" in runs.train().out
    assert runs.merge_run(run=ROOT / "short").code == 0
    assert runs.finetune("eval", str(ROOT / "wide")).code == 0


class Killed(BaseException):
    """Nothing of ours catches it, as nothing catches a SIGKILL."""


def killed(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, call: int) -> None:
    """Run until the ``call``-th call of that function, and no further."""
    real, calls = getattr(where, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, counted)
        with pytest.raises(Killed):
            runs.train()
    assert calls == call


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> dict[str, Any]:
    """What an unbroken run leaves."""
    folder = tmp_path_factory.mktemp("whole") / "work"
    runs.furnish(folder, RECIPE)
    shutil.copytree(tiny_base, folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert runs.train().code == 0
        return left(ROOT)


@pytest.mark.parametrize(
    ("where", "name", "call", "step"),
    [
        (checkpoint, "write", 2, 0),  # between the saves of the first step that is saved: none is common yet
        (checkpoint, "write", 4, 2),  # between the saves at the end of the shorter one
        (checkpoint, "write", 5, 3),
        (checkpoint, "rotate", 4, 3),  # all are saved, one has lost its older checkpoints
        (state, "write_adapter", 1, 3),
        (state, "finish", 1, 3),  # the shorter one is written and judged, not finished
        (lockstep.loop, "end_step", 9, 4),  # long after it
        (state, "finish", 2, 6),
    ],
)
def test_killed_and_given_again_it_ends_with_the_same_bits(
    place: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, where: Any, name: str, call: int, step: int
) -> None:
    """And goes on from the newest step that all have."""
    killed(monkeypatch, where, name, call)
    said = runs.train()
    assert said.code == 0, said.err
    assert f"going on after step {step}" in said.out if step else "going on" not in said.out
    assert left(ROOT) == whole


def test_a_damaged_checkpoint_of_one_takes_all_back_to_the_one_before(
    place: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(monkeypatch, lockstep.loop, "end_step", 9)
    (ROOT / "wide" / "checkpoints" / "step-00000004" / "optimizer.safetensors").write_bytes(b"")
    said = runs.train()
    assert said.code == 0, said.err
    assert "step-00000004 is passed over" in said.out
    assert left(ROOT) == whole


@pytest.mark.parametrize("call", [1, 3, 4, 6])
def test_asked_to_stop_all_are_saved_and_go_on(
    place: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    """Within a step; the step is finished, every member saved."""
    real, calls, requests = lockstep.loop.end_step, 0, []
    made = interrupts.StopRequest.__init__

    def remembered(self: interrupts.StopRequest) -> None:
        made(self)
        requests.append(self)

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            requests[-1].requested = True
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(interrupts.StopRequest, "__init__", remembered)
        patch.setattr(lockstep.loop, "end_step", counted)
        said = runs.train()
    step = {1: 1, 3: 2, 4: 2, 6: 3}[call]
    assert said.code == 6
    assert f"step {step} of 6 is saved for each adapter in runs/all" in said.err
    for name in NAMES:
        own = min(step, 3) if name == "short" else step
        assert (ROOT / name / "checkpoints" / f"step-{own:08d}").is_dir()
    again = runs.train()
    assert again.code == 0, again.err
    assert left(ROOT) == whole


def test_stopped_while_one_is_judged_it_is_judged_later(
    place: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> bool:
        return False

    with monkeypatch.context() as patch:
        patch.setattr(training, "judged", stopped)
        said = runs.train()
    assert said.code == 6
    assert not (ROOT / "short" / "finished.json").exists()
    assert runs.train().code == 0
    assert left(ROOT) == whole


def test_one_can_go_on_alone_and_is_told_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(monkeypatch, lockstep.loop, "end_step", 9)
    said = runs.train("adapters=wide")
    assert said.code == 0, said.err
    assert "wide was trained together with short and goes on without short: its bits will differ" in said.out
    assert "going on after step 4" in said.out
    assert runs.metrics(ROOT / "wide")[-1]["step"] == 6


def test_who_stands_elsewhere_is_not_taken_back(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(monkeypatch, lockstep.loop, "end_step", 6)  # in step 3, saved at 2
    assert runs.train("adapters=wide").code == 0
    before = runs.snapshot(ROOT)
    said = runs.train()
    assert said.code == 5
    assert "these adapters do not stand together any more: short at 2, wide at 6" in said.err
    assert "go on with each alone: --set adapters=NAME" in said.err
    assert runs.snapshot(ROOT) == before
    assert runs.train("adapters=short").code == 0
    assert "these runs are finished" in runs.train().out


def test_an_adapter_that_began_alone_does_not_join(place: Path) -> None:
    assert runs.train("adapters=wide").code == 0
    said = runs.train()
    assert said.code == 2
    assert "runs/all/wide: this adapter began without short" in said.err
    assert not (ROOT / "short" / "metrics.jsonl").exists()


def test_lengthened_together(place: Path) -> None:
    text = RECIPE.replace("      steps: 3\n", "")
    Path("r.yaml").write_text(text)
    assert runs.train("output=runs/long", "train.steps=9").code == 0
    assert runs.train().code == 0
    assert runs.train("train.steps=9").code == 2
    said = runs.train("train.steps=9", options=["--extend"])
    assert said.code == 0, said.err
    for name in NAMES:
        assert runs.curve(ROOT / name) == runs.curve(Path("runs/long") / name)
        assert runs.adapter_digest(ROOT / name) == runs.adapter_digest(Path("runs/long") / name)


@pytest.mark.parametrize(
    ("old", "new", "code", "said"),
    [
        ("  seed: 3\n", '  seed: 3\n  kernels: "off"\n', 2, "one after the other: --set adapters=NAME"),
        ("      r: 8\n", "      use_dora: true\n", 2, "DoRA's norms need a pass of its own"),
        ("      r: 8\n", "      modules_to_save: [norm]\n", 2, "trained whole cannot be shared"),
        ("micro_batch_tokens: 256", "micro_batch_tokens: 200", 2, "must hold one example of each of 2 adapters (256)"),
        ("  - name: wide\n", "  - name: wide\n    quantize: nf4\n", 2, "is shared by all adapters"),
        ("train_path: eval.jsonl", "train_path: bad.jsonl", 3, "bad.jsonl:1"),
    ],
)
def test_refused_before_anything_is_written(place: Path, old: str, new: str, code: int, said: str) -> None:
    assert RECIPE.count(old) == 1
    Path("bad.jsonl").write_text("{}\n")
    Path("r.yaml").write_text(RECIPE.replace(old, new))
    answer = runs.train()
    assert answer.code == code, answer.err
    assert said in answer.err
    assert not ROOT.exists()


@pytest.mark.parametrize("verb", ["plan", "train"])
def test_one_process_trains_them(place: Path, verb: str) -> None:
    said = runs.finetune(verb, "r.yaml", "--processes", "2")
    assert said.code == 2
    assert "several adapters are trained by one process; train one of them: --set adapters=NAME" in said.err
    assert not Path("runs").exists()


def test_a_folder_that_is_a_run_of_its_own_is_refused(place: Path) -> None:
    Path("one.yaml").write_text(runs.RECIPE.replace("runs/one", "runs/all"))
    assert runs.finetune("train", "one.yaml").code == 0
    said = runs.train()
    assert said.code == 5
    assert "holds a run of its own" in said.err
    shutil.rmtree(ROOT)
    assert runs.train().code == 0
    assert runs.finetune("train", "one.yaml").code == 5


def test_the_plan_says_what_is_shared_and_what_each_has(place: Path) -> None:
    said = runs.finetune("plan", "r.yaml")
    assert said.code == 0, said.err
    assert said.out.count("model      base") == 1
    assert "2 adapters over this base, in one run" in said.out
    for part in ("adapter    short: ", "adapter    wide: ", "3 steps, 6 samples", "6 steps, 24 samples"):
        assert part in said.out
    assert "batches    at most 256 tokens of all at once" in said.out
    planned = json.loads(runs.finetune("plan", "r.yaml", "--json").out)
    assert {one["micro_batch_tokens"] for one in planned["adapters"].values()} == {128}
    alone = json.loads(runs.finetune("plan", "r.yaml", "--set", "adapters=wide", "--json").out)
    assert planned["adapters"]["wide"]["budget"]["weights"] == alone["budget"]["weights"]
    trained = sum(one["trainable_parameters"] for one in planned["adapters"].values())
    assert planned["adapters"]["wide"]["budget"]["adapter"] == 4 * trained


def test_the_base_is_judged_once_where_the_rows_are_the_same(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune import evaluate

    judged: list[bool] = []
    real = evaluate.judge
    monkeypatch.setattr(evaluate, "judge", lambda *args, **how: judged.append(how["adapter"]) or real(*args, **how))
    Path("r.yaml").write_text(RECIPE.replace("      eval_path: train.jsonl\n", "      eval_path: null\n"))
    assert runs.train("evaluate.metrics=[loss]").code == 0
    assert judged.count(False) == 1  # one has no held-out rows
    judged.clear()
    text = RECIPE.replace("    data:\n      train_path: eval.jsonl\n      eval_path: train.jsonl\n", "")
    Path("r.yaml").write_text(text.replace("runs/all", "runs/same"))
    assert runs.train().code == 0
    assert (judged.count(False), judged.count(True)) == (1, 2)
    scores = [json.loads((Path("runs/same") / name / "scores.json").read_text()) for name in NAMES]
    assert scores[0]["before"] == scores[1]["before"]


def test_plain_peft_loads_each(place: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    assert runs.train("evaluate.metrics=[loss]").code == 0
    for name in NAMES:
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), ROOT / name / "adapter")
        ours = load_file(ROOT / name / "adapter" / "adapter_model.safetensors")
        theirs = {key.replace(".default", ""): value for key, value in loaded.state_dict().items() if "lora_" in key}
        assert tiny.same({key: value.float() for key, value in theirs.items()}, ours)


def test_one_tracked_run_holds_the_curves_of_all(place: Path) -> None:
    done = runs.process(
        "import sys; from finetune.cli import main; sys.argv = ['finetune', *sys.argv[1:]]; main()",
        "train", "r.yaml", "--set", "tracker=trackio", "--set", "evaluate.metrics=[loss]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    read = runs.process(_TRACKIO, TRACKIO_DIR=str((place / "runs" / "trackio").absolute()))
    assert read.returncode == 0, read.stderr
    name, config, losses = json.loads(read.stdout.splitlines()[-1])
    assert name == "all"
    assert (config["wide.adapter.r"], config["short.train.seed"]) == (8, 5)
    assert losses == {one: [line["loss"] for line in runs.metrics(ROOT / one)] for one in NAMES}


_TRACKIO = """\
import json
from trackio.sqlite_storage import SQLiteStorage
(run,) = SQLiteStorage.get_runs("finetune")
rows = SQLiteStorage.get_logs("finetune", run)
config = SQLiteStorage.get_run_config("finetune", run)
losses = {one: [row[f"{one}/loss"] for row in rows if f"{one}/loss" in row] for one in ("short", "wide")}
print(json.dumps([run, config, losses]))
"""


def test_other_verbs_ask_for_one(place: Path) -> None:
    said = runs.finetune("data", "show", "r.yaml")
    assert said.code == 2
    assert "this asks for one run, the recipe has short, wide; take one: --set adapters=NAME" in said.err
    assert runs.finetune("data", "show", "r.yaml", "--set", "adapters=short", "--row", "1").code == 0
    assert prepare.prepare(Path("r.yaml"), ["adapters=wide"]).together == ()
