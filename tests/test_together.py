"""Several adapters in one run: each as its own single run, killed between two saves, asked to stop, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune import checkpoint, lockstep, together
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
RECIPE = runs.RECIPE.replace("runs/one", "runs/all") + ADAPTERS
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
    """What a run left, without times and without what tells of today's memory."""
    found: dict[str, Any] = {
        name: digest for name, (digest, _) in runs.snapshot(folder).items()
        if Path(name).name not in ("metrics.jsonl", "plan.json", ".lock")
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
    ("where", "name", "call"),
    [
        (checkpoint, "write", 2),  # between the saves of the first step that is saved: none is common yet
        (checkpoint, "write", 4),  # between the saves at the end of the shorter one
        (checkpoint, "write", 5),
        (checkpoint, "rotate", 4),  # all are saved, one has lost its older checkpoints
        (training, "write_adapter", 1),
        (training, "finish", 1),  # the shorter one is written and judged, not finished
        (lockstep.loop, "end_step", 9),  # long after it
        (training, "finish", 2),
    ],
)
def test_killed_and_given_again_it_ends_with_the_same_bits(
    place: Path, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, where: Any, name: str, call: int
) -> None:
    killed(monkeypatch, where, name, call)
    said = runs.train()
    assert said.code == 0, said.err
    assert left(ROOT) == whole
