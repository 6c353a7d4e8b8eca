"""Recipes: every known mistake is refused with file, line, column and key; good ones mean what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from finetune import known_models, recipe, yamlfile
from finetune.errors import RecipeError

REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))

BASE = """\
model: Qwen/Qwen2.5-14B
quantize:
  weights: nf4
  double: true
adapter:
  method: lora
  r: 8
  lora_alpha: 16
data:
  train_path: train.jsonl
  eval_path: eval.jsonl
train:
  steps: 12
  examples_per_step: 8
  learning_rate: 2e-3
  schedule: linear
  warmup: 2
  max_length: 256
  seed: 7
evaluate:
  metrics: [loss, exact_match]
tracker: none
output: runs/tiny
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data files, in which a recipe's relative paths start."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text(f'{{"{name}": 1}}\n')
    return tmp_path


def faults_of(text: str | bytes, *overrides: str) -> list[str]:
    """The faults of a recipe text as whole lines; the file is called r.yaml."""
    Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        recipe.load(Path("r.yaml"), overrides)
    return [str(fault) for fault in caught.value.faults]


def swap(old: str, new: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        assert text.count(old) == 1, old
        return text.replace(old, new)

    return edit


HEX40 = "0123456789abcdef0123456789abcdef01234567"

# name → edit of BASE, where the fault must point, words it must hold
CATALOGUE: dict[str, tuple[Callable[[str], str], str, str]] = {
    "1 unknown key": (
        swap("learning_rate", "learning_rte"),
        "r.yaml:15:3: train.learning_rte",
        "mean 'learning_rate'?",
    ),
    "2 synonym of a key": (swap("  r: 8", "  lora_rank: 8"), "r.yaml:7:3: adapter.lora_rank", "did you mean 'r'?"),
    "2 synonym lr": (swap("learning_rate", "lr"), "r.yaml:15:3: train.lr", "did you mean 'learning_rate'?"),
    "3 rate in quotes": (swap("2e-3", "'1e-4'"), "r.yaml:15:3: train.learning_rate", "write it without quotes"),
    "4 rate fast": (
        swap("2e-3", "fast"),
        "r.yaml:15:3: train.learning_rate",
        "a number, above 0, at most 1; found 'fast'",
    ),
    "5 rate NaN": (swap("2e-3", ".nan"), "r.yaml:15:18: train.learning_rate", "not a finite number"),
    "6 rate negative": (swap("2e-3", "-2e-3"), "r.yaml:15:3: train.learning_rate", "found -0.002"),
    "7 rate 1e9": (swap("2e-3", "1e9"), "r.yaml:15:3: train.learning_rate", "at most 1"),
    "8 batch 0": (swap("step: 8", "step: 0"), "r.yaml:14:3: train.examples_per_step", "at least 1"),
    "9 accumulation": (
        swap("  seed: 7", "  gradient_accumulation_steps: -2"),
        "r.yaml:19:3: train.gradient_accumulation_steps",
        "unknown key",
    ),
    "10 length 1": (swap("length: 256", "length: 1"), "r.yaml:18:3: train.max_length", "at least 8"),
    "11 rank 0": (swap("r: 8\n  lora", "r: 0\n  lora"), "r.yaml:7:3: adapter.r", "from 1"),
    "12 all targets misspelt": (
        swap("  r: 8", "  target_modules: [qproj]\n  r: 8"),
        "r.yaml:7:20: adapter.target_modules[0]",
        "did you mean 'q_proj'?",
    ),
    "13 half the targets misspelt": (
        swap("  r: 8", "  target_modules:\n  - q_proj\n  - v_porj\n  r: 8"),
        "r.yaml:9:5: adapter.target_modules[1]",
        "did you mean 'v_proj'?",
    ),
    "14 dropout 2": (swap("  r: 8", "  lora_dropout: 2.0\n  r: 8"), "r.yaml:7:3: adapter.lora_dropout", "below 1"),
    "15 batch 2.5": (swap("step: 8", "step: 2.5"), "r.yaml:14:3: train.examples_per_step", "found 2.5"),
    "16 two weight formats": (
        swap("nf4\n", "[nf4, int8]\n"),
        "r.yaml:3:3: quantize.weights",
        "one of nf4, fp4, int8, bf16, fp16, fp32; found a list",
    ),
    "17 4-bit option without 4 bits": (
        swap("nf4\n  double: true", "bf16\n  double: false"),
        "r.yaml:4:3: quantize.double",
        "no meaning with 'bf16'",
    ),
    "18 optimizer": (swap("  seed: 7", "  optimizer: adamw"), "r.yaml:19:3: train.optimizer", "unknown key"),
    "18 schedule typo": (swap(": linear", ": cosin"), "r.yaml:16:3: train.schedule", "did you mean 'cosine'?"),
    "18 weights typo": (swap(": nf4", ": nf5"), "r.yaml:3:3: quantize.weights", "did you mean 'nf4'?"),
    "18 key typo": (swap("schedule", "sechdule"), "r.yaml:16:3: train.sechdule", "did you mean 'schedule'?"),
    "19 data type typo": (swap("data:\n", "data:\n  format: chta\n"), "r.yaml:10:3: data.format", "mean 'chat'?"),
    "19 data path missing": (swap("train.jsonl", "tain.jsonl"), "r.yaml:10:3: data.train_path", "mean 'train.jsonl'?"),
    "20 fraction 2": (
        swap("eval_path: eval.jsonl", "eval_fraction: 2.0"),
        "r.yaml:11:3: data.eval_fraction",
        "above 0, below 1",
    ),
    "21 yes as bool": (swap("double: true", 'double: "yes"'), "r.yaml:4:3: quantize.double", "true or false"),
    "22 duplicate key": (swap("  seed: 7", "  seed: 7\n  warmup: 3"), "r.yaml:20:3: train.warmup", "first on line 17"),
    "23 tab": (swap("  seed: 7", "\tseed: 7"), "r.yaml:19:1", "tab character"),
    "24 no": (swap("double: true", "double: no"), "r.yaml:4:3: quantize.double", "found 'no'"),
    "24 010": (swap("steps: 12", "steps: 010"), "r.yaml:13:10: train.steps", "octal"),
    "24 1:30": (swap("steps: 12", "steps: 1:30"), "r.yaml:13:3: train.steps", "found '1:30'"),
    "24 date": (swap("steps: 12", "steps: 2026-11-24"), "r.yaml:13:3: train.steps", "found '2026-11-24'"),
    "25 alias bomb": (
        lambda text: f"a: &a [x, x]\nb: &b [{', '.join(['*a'] * 9)}]\nc: [{', '.join(['*b'] * 9)}]\n" + text,
        "r.yaml:1:4: a",
        "anchor",
    ),
    "26 recursive alias": (swap("[loss, exact_match]", "&x [*x]"), "r.yaml:21:12: evaluate.metrics", "anchor"),
    "27 object tag": (swap("seed: 7", "seed: !!python/object:os.x 7"), "r.yaml:19:9: train.seed", "tag"),
    "28 NBSP": (lambda text: text.replace(" ", "\u00a0"), "r.yaml:1:7", "U+00A0"),
    "29 empty file": (lambda text: "", "r.yaml:1:1", "empty"),
    "29 list at root": (lambda text: "- a\n", "r.yaml:1:1", "mapping"),
    "30 two documents": (lambda text: f"{text}---\n{text}", "r.yaml:24:1", "second document"),
    "31 secret": (swap(": none", ": hf_ABCDEFGHIJKLMNOPQRSTUVWX"), "r.yaml:22:10", "shaped like a secret"),
    "31 secret in a comment": (swap(": none", f": none # {HEX40}"), "r.yaml:22:17", "shaped like a secret"),
    "32 parent folder": (swap("runs/tiny", "../tiny"), "r.yaml:23:1: output", "must not contain .."),
    "32 URL as output": (swap("runs/tiny", "s3://b/tiny"), "r.yaml:23:1: output", "URL"),
    "32 URL as model": (swap("Qwen/Qwen2.5-14B", "https://a.b/c"), "r.yaml:1:1: model", "URL"),
    "32 URL as data": (swap("train.jsonl", "hf://a/b.jsonl"), "r.yaml:10:3: data.train_path", "URL"),
    "33 ${VAR}": (swap("runs/tiny", "${HOME}/tiny"), "r.yaml:23:1: output", ""),
    "33 $VAR": (swap("train.jsonl", "$DATA/train.jsonl"), "r.yaml:10:3: data.train_path", ""),
}


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("name", CATALOGUE)
def test_catalogue_of_bad_recipes(name: str) -> None:
    edit, where, words = CATALOGUE[name]
    found = faults_of(edit(BASE))
    matching = [fault for fault in found if fault.startswith(f"{where}: ") and words in fault]
    assert matching, "\n".join(found)
    if not name.startswith("31"):
        # one mistake, one line: no echo of it elsewhere
        assert len(found) == 1 or name.startswith(("25", "26")), "\n".join(found)


MORE: dict[str, tuple[Callable[[str], str], str, str]] = {
    "steps and epochs": (swap("  seed: 7", "  epochs: 1"), "r.yaml:19:3: train.epochs", "together with steps"),
    "neither": (swap("  steps: 12\n", ""), "r.yaml:12:1: train.steps", "steps or epochs must be given"),
    "two batch sizes": (
        swap("  seed: 7", "  tokens_per_step: 512"),
        "r.yaml:19:3: train.tokens_per_step",
        "together with examples_per_step",
    ),
    "two eval sources": (
        swap("eval.jsonl\n", "eval.jsonl\n  eval_fraction: 0.1\n"),
        "r.yaml:12:3: data.eval_fraction",
        "together with eval_path",
    ),
    "warmup": (swap("warmup: 2", "warmup: 13"), "r.yaml:17:3: train.warmup", "must not exceed steps (12)"),
    "tokens below length": (
        swap("examples_per_step: 8", "tokens_per_step: 255"),
        "r.yaml:14:3: train.tokens_per_step",
        "max_length (256)",
    ),
    "micro batch": (
        swap("  seed: 7", "  micro_batch_tokens: 255"),
        "r.yaml:19:3: train.micro_batch_tokens",
        "max_length (256)",
    ),
    "micro batch word": (
        swap("  seed: 7", "  micro_batch_tokens: atuo"),
        "r.yaml:19:3: train.micro_batch_tokens",
        "did you mean 'auto'?",
    ),
    "many steps": (swap("steps: 12", "steps: 10000001"), "r.yaml:13:3: train.steps", "at most 10000000"),
    "bool for int": (swap("seed: 7", "seed: true"), "r.yaml:19:3: train.seed", "found true"),
    "bool for float": (swap("2e-3", "true"), "r.yaml:15:3: train.learning_rate", "found true"),
    "whole float for int": (swap("steps: 12", "steps: 12.0"), "r.yaml:13:3: train.steps", "a whole number"),
    "decay": (swap("seed: 7", "weight_decay: 1.5"), "r.yaml:19:3: train.weight_decay", "at most 1"),
    "clip 0": (swap("seed: 7", "max_grad_norm: 0"), "r.yaml:19:3: train.max_grad_norm", "above 0"),
    "new tokens 0": (
        swap("evaluate:\n", "evaluate:\n  max_new_tokens: 0\n"),
        "r.yaml:21:3: evaluate.max_new_tokens",
        "at least 1",
    ),
    "metric typo": (swap("exact_match", "exact_mach"), "r.yaml:21:19: evaluate.metrics[1]", "mean 'exact_match'?"),
    "metric without rows": (
        swap("  eval_path: eval.jsonl\n", ""),
        "r.yaml:20:19: evaluate.metrics[1]",
        "needs held-out rows",
    ),
    "every without rows": (
        lambda text: text.replace("  eval_path: eval.jsonl\n", "").replace("[loss, exact_match]", "[loss]\n  every: 5"),
        "r.yaml:21:3: evaluate.every",
        "no held-out rows",
    ),
    "empty metrics": (swap("[loss, exact_match]", "[]"), "r.yaml:21:3: evaluate.metrics", "a list"),
    "section missing": (lambda text: text[: text.index("evaluate")], "r.yaml:1:1: output", "missing"),
    "key missing": (swap("  max_length: 256\n", ""), "r.yaml:12:1: train.max_length", "missing"),
    "adapter missing": (
        swap("adapter:\n  method: lora\n  r: 8\n  lora_alpha: 16\n", ""),
        "r.yaml:1:1: adapter",
        "missing",
    ),
    "empty section": (
        swap("quantize:\n  weights: nf4\n  double: true\n", "quantize:\n"),
        "r.yaml:2:1: quantize",
        "a section of 'key: value' lines; found nothing",
    ),
    "list for a section": (
        swap("adapter:\n  method: lora\n  r: 8\n  lora_alpha: 16\n", "adapter: [lora]\n"),
        "r.yaml:5:1: adapter",
        "a section",
    ),
    "key in the wrong section": (
        swap("evaluate:\n", "evaluate:\n  schedule: wsd\n"),
        "r.yaml:21:3: evaluate.schedule",
        "move it under 'train:'",
    ),
    "root key in a section": (swap("  seed: 7", "  tracker: none"), "r.yaml:19:3: train.tracker", "left margin"),
    "nearest key is elsewhere": (
        swap("  seed: 7", "  max_new_token: 7"),
        "r.yaml:19:3: train.max_new_token",
        "did you mean 'evaluate.max_new_tokens'?",
    ),
    "same data": (
        swap(": eval.jsonl", ": ./train.jsonl"),
        "r.yaml:11:3: data.eval_path",
        "is the file that is trained on",
    ),
    "data is a folder": (swap(": train.jsonl", ": ."), "r.yaml:10:3: data.train_path", "is a folder"),
    "data in home": (swap(": train.jsonl", ": ~/t"), "r.yaml:10:3: data.train_path", "~ is not expanded"),
    "data empty": (swap(": train.jsonl", ": ''"), "r.yaml:10:3: data.train_path", "empty"),
    "data too long": (swap(": train.jsonl", f": {'a' * 5000}"), "r.yaml:10:3: data.train_path", "no such file"),
    "data NUL": (swap(": train.jsonl", ': "a\\0b"'), "r.yaml:10:3: data.train_path", "control character"),
    "output empty": (swap("runs/tiny", "''"), "r.yaml:23:1: output", "empty"),
    "output home": (swap("runs/tiny", "~/tiny"), "r.yaml:23:1: output", "usable folder name"),
    "output newline": (swap("runs/tiny", '"runs/a\\nb"'), "r.yaml:23:1: output", "usable folder name"),
    "output space": (swap("runs/tiny", "runs/a b"), "r.yaml:23:1: output", "usable folder name"),
    "output long": (swap("runs/tiny", f"runs/{'a' * 97}"), "r.yaml:23:1: output", "usable folder name"),
    "output here": (swap("runs/tiny", "."), "r.yaml:23:1: output", "folder of its own"),
    "output root": (swap("runs/tiny", "/"), "r.yaml:23:1: output", "folder of its own"),
    "model unknown": (swap("Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-14"), "r.yaml:1:1: model", "mean 'Qwen/Qwen2.5-14B'?"),
    "model is a file": (swap("Qwen/Qwen2.5-14B", "train.jsonl"), "r.yaml:1:1: model", "neither a folder"),
    "model empty": (swap("Qwen/Qwen2.5-14B", "''"), "r.yaml:1:1: model", "neither a folder"),
    "DoRA on int8": (
        lambda text: text.replace("nf4", "int8").replace("  r: 8", "  use_dora: true\n  r: 8"),
        "r.yaml:7:3: adapter.use_dora",
        "int8",
    ),
    "method key typo": (swap("method: lora", "mehtod: lora"), "r.yaml:6:3: adapter.mehtod", "did you mean 'method'?"),
    "method missing": (swap("  method: lora\n", ""), "r.yaml:5:1: adapter.method", "missing"),
    "other PEFT method": (swap("method: lora", "method: vera"), "r.yaml:6:3: adapter.method", "vera cannot yet"),
}


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("name", MORE)
def test_more_bad_recipes(name: str) -> None:
    edit, where, words = MORE[name]
    found = faults_of(edit(BASE))
    assert len(found) == 1, "\n".join(found)
    assert found[0].startswith(f"{where}: ")
    assert words in found[0]


@pytest.mark.usefixtures("work")
def test_all_faults_come_at_once_in_file_order() -> None:
    text = BASE.replace("nf4", "nf5").replace("steps: 12", "stpes: 12").replace("warmup: 2", "warmup: -1")
    text = text.replace("r: 8\n", "r: 0\n").replace("train.jsonl", "tain.jsonl").replace("runs/tiny", "$HOME/x")
    found = faults_of(text, "train.sede=3", "tracker=wandbb")
    assert [fault.split(": ")[0] for fault in found if not fault.startswith("--set")] == [
        "r.yaml:3:3",
        "r.yaml:7:3",
        "r.yaml:10:3",
        "r.yaml:13:3",
        "r.yaml:17:3",
        "r.yaml:23:1",
    ]
    assert [fault for fault in found if fault.startswith("--set")] == [
        "--set tracker: must be one of trackio, wandb, tensorboard, mlflow, none; found 'wandbb'; "
        "did you mean 'wandb'?",
        "--set train.sede: unknown key; did you mean 'seed'?",
    ]


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize(
    "secret",
    [
        "hf_AbCdEfGhIjKlMnOpQrStUvWx",
        "sk-proj-abcdefghij0123456789",
        "ghp_abcdefghijABCDEFGHIJ0123",
        "AKIAABCDEFGHIJKLMNOP",
        HEX40,
    ],
)
def test_a_secret_is_refused_and_never_echoed(secret: str) -> None:
    for text in (
        BASE.replace("runs/tiny", f"runs/{secret}" if secret != HEX40 else secret),
        BASE.replace("seed: 7", f"seed: {secret}"),
        BASE.replace("seed: 7", f"{secret}: 7"),
        BASE.replace("model: Qwen/Qwen2.5-14B", f"model: '{secret}'"),
        f"# {secret}\n{BASE}",
        BASE.replace("seed: 7", f"seed: 7\n  {secret}: 1\n  {secret}: 1"),
    ):
        found = "\n".join(faults_of(text))
        assert secret not in found
    assert secret not in "\n".join(faults_of(BASE, f"train.seed={secret}"))
    assert "shaped like a secret" in "\n".join(faults_of(BASE, f"train.seed={secret}"))
    assert secret not in "\n".join(faults_of(BASE, secret))


def test_a_commit_in_a_path_is_not_a_secret(work: Path) -> None:
    (work / "snapshots" / HEX40).mkdir(parents=True)
    (work / "r.yaml").write_text(BASE.replace("Qwen/Qwen2.5-14B", f"snapshots/{HEX40}"))
    assert recipe.load(Path("r.yaml")).model == f"snapshots/{HEX40}"


@pytest.mark.usefixtures("work")
def test_values_and_defaults() -> None:
    Path("r.yaml").write_text(BASE.replace("learning_rate: 2e-3", "learning_rate: 1"))
    read = recipe.load(Path("r.yaml"))
    assert (read.train.learning_rate, type(read.train.learning_rate)) == (1.0, float)
    assert (read.train.steps, read.train.epochs, read.train.micro_batch_tokens) == (12, None, "auto")
    assert (read.train.save_every, read.train.keep_last, read.train.max_grad_norm) == (50, 2, 1.0)
    assert (read.evaluate.every, read.evaluate.rows, read.evaluate.batch_rows) == (0, None, 32)
    assert (read.quantize.compute, read.data.format, read.adapter.method) == ("auto", "auto", "lora")
    assert (read.adapter.fields["r"], read.adapter.fields["target_modules"]) == (8, None)
    with pytest.raises(ValidationError):
        read.train.steps = 3  # type: ignore[misc]


@pytest.mark.usefixtures("work")
def test_unusual_but_legal_values() -> None:
    text = BASE.replace("runs/tiny", "/tmp/läufe/数据.v1/").replace("double: true", "compute: fp32")
    text = text.replace("eval_path: eval.jsonl", "eval_fraction: 0.25").replace("steps: 12", "epochs: 0.5")
    Path("r.yaml").write_text(text)
    read = recipe.load(Path("r.yaml"))
    assert (read.output, read.data.eval_fraction, read.train.epochs) == ("/tmp/läufe/数据.v1/", 0.25, 0.5)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_resolved_recipe_reloads_equal(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(with_data(tmp_path))
    read = recipe.load(path)
    (tmp_path / "again.yaml").write_text(yamlfile.dump(read.to_yaml_dict()))
    assert recipe.load(tmp_path / "again.yaml") == read
    flat = recipe.flatten(read)
    assert all(isinstance(value, str | int | float | bool) for value in flat.values())
    assert flat["adapter.r"] == read.adapter.fields["r"]
    assert flat["evaluate.metrics"] == ", ".join(read.evaluate.metrics)
    assert flat["data.eval_fraction"] == "null"


def with_data(folder: Path) -> Path:
    """A working folder with the files that the shipped recipes name."""
    (folder / "data" / "dates").mkdir(parents=True)
    for name in ("train", "eval"):
        (folder / "data" / "dates" / f"{name}.jsonl").write_text(f'{{"{name}": 1}}\n')
    return folder


def test_extends_merges_deeply_and_keeps_origins(work: Path) -> None:
    (work / "bases").mkdir()
    (work / "bases" / "root.yaml").write_text(BASE)
    (work / "bases" / "middle.yaml").write_text("extends: root.yaml\ntrain:\n  seed: 8\n  warmup: 1\n")
    (work / "r.yaml").write_text("extends: bases/middle.yaml\ntrain: {warmup: 0}\nevaluate:\n  metrics: [loss]\n")
    located = recipe.locate(Path("r.yaml"), ["train.keep_last=5", "adapter.target_modules=[q_proj]"])
    read = located.recipe
    assert (read.train.seed, read.train.warmup, read.train.steps, read.train.keep_last) == (8, 0, 12, 5)
    assert (read.evaluate.metrics, read.adapter.fields["target_modules"]) == (["loss"], ["q_proj"])
    assert located.where("train.warmup") == "r.yaml:2:9: train.warmup"
    assert located.where("train.seed") == "bases/middle.yaml:3:3: train.seed"
    assert located.where("train.steps") == "bases/root.yaml:13:3: train.steps"
    assert located.where("train.keep_last") == "--set train.keep_last"
    assert located.where("train.workers") == "r.yaml:2:1: train.workers"


def test_faults_point_into_the_file_that_wrote_the_value(work: Path) -> None:
    (work / "base.yaml").write_text(BASE.replace("seed: 7", "seed: x").replace("nf4", "nf5"))
    found = faults_of("extends: base.yaml\nquantize:\n  weights: nf6\ntrain:\n  epochs: 2\n")
    assert [fault.split(": ")[:2] for fault in found] == [
        ["base.yaml:19:3", "train.seed"],
        ["r.yaml:3:3", "quantize.weights"],
        ["r.yaml:5:3", "train.epochs"],
    ]


def test_null_switches_an_inherited_key_off(work: Path) -> None:
    (work / "base.yaml").write_text(BASE)
    (work / "r.yaml").write_text("extends: base.yaml\ntrain:\n  steps: null\n  epochs: 2\n")
    assert recipe.load(Path("r.yaml")).train.epochs == 2.0


def test_extends_faults(work: Path) -> None:
    (work / "a.yaml").write_text("extends: b.yaml\n")
    (work / "b.yaml").write_text("extends: r.yaml\n")
    assert faults_of("extends: a.yaml\n") == [
        "b.yaml:1:1: extends: the recipes extend each other in a circle; remove one extends"
    ]
    assert "circle" in faults_of("extends: r.yaml\n")[0]
    assert faults_of(f"{BASE}extends: c.yaml\n")[0].startswith("r.yaml:24:1: extends: no such file: c.yaml; did you")
    assert faults_of("extends: [a.yaml]\n")[0].startswith("r.yaml:1:1: extends: must be the path")
    assert faults_of("extends: https://x/y.yaml\n")[0].startswith("r.yaml:1:1: extends: must be the path")
    [only] = faults_of("extend: base.yaml\ntracker: none\n")
    assert only == "r.yaml:1:1: extend: unknown key; did you mean 'extends'?"
    for number in range(9):
        (work / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\n")
    (work / "9.yaml").write_text(BASE)
    assert "more than 8" in faults_of("extends: 0.yaml\n")[0]


@pytest.mark.usefixtures("work")
def test_overrides_are_read_by_the_rules_of_the_file() -> None:
    Path("r.yaml").write_text(BASE)
    read = recipe.load(Path("r.yaml"), ["train.learning_rate=2e-4", "evaluate.rows=5", "evaluate.metrics=[loss]"])
    assert (read.train.learning_rate, read.evaluate.rows, read.evaluate.metrics) == (2e-4, 5, ["loss"])
    read = recipe.load(Path("r.yaml"), ["adapter.rank_pattern={q_proj: 4}", "train={steps: 3}"][:1])
    assert read.adapter.fields["rank_pattern"] == {"q_proj": 4}


OVERRIDES = {
    "train.seed": "--set train.seed: must look like section.key=value",
    "=3": "--set =3: must look like section.key=value",
    "train..seed=3": "--set train..seed=3: must look like",
    "train.seed=no": "--set train.seed: must be a whole number, at least 0, below 4294967296; found 'no'",
    "train.seed=[": "--set train.seed: not valid YAML",
    "train.seed=&a 3": "--set train.seed: an anchor",
    "train.seed=010": "--set train.seed: a number with leading zeros",
    "train.seed.x=1": "--set train.seed.x: train.seed is not a section",
    "trian.seed=1": "--set trian.seed: trian: unknown key; did you mean 'train'?",
    "extends=x.yaml": "--set extends: extends works in a file only",
    "train.max_length=": "--set train.max_length: must be a whole number, at least 8, at most 1048576; found nothing",
    "adapter={method: lora, r: 4}": "--set adapter: adapter.lora_alpha: missing",
    "output=$HOME": "--set output: ",
}


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("override", OVERRIDES)
def test_bad_overrides_name_themselves(override: str) -> None:
    found = faults_of(BASE, override)
    assert len(found) == 1, "\n".join(found)
    assert found[0].startswith(OVERRIDES[override])


@pytest.mark.usefixtures("work")
def test_an_override_given_twice_is_refused() -> None:
    assert faults_of(BASE, "train.seed=1", "train.seed=2") == ["--set train.seed: given twice; keep one"]


def test_list_of_keys_is_frozen() -> None:
    """A new key is a promise to keep: add it here, to the docs and to a shipped recipe together."""
    adapter = (
        "method r lora_alpha lora_dropout target_modules exclude_modules use_rslora use_dora rank_pattern "
        "alpha_pattern init_lora_weights layers_to_transform layers_pattern modules_to_save bias fan_in_fan_out"
    )
    train = (
        "steps epochs examples_per_step tokens_per_step learning_rate schedule warmup weight_decay max_grad_norm "
        "max_length micro_batch_tokens recompute save_every keep_last seed workers"
    )
    expected: dict[str, str | None] = {
        "extends": None,
        "model": None,
        "quantize": "weights double compute",
        "adapter": adapter,
        "data": "train_path eval_path eval_fraction format",
        "train": train,
        "evaluate": "metrics every rows max_new_tokens batch_rows",
        "tracker": None,
        "output": None,
    }
    properties = recipe.schema()["properties"]
    assert list(properties) == list(expected)
    for section, keys in expected.items():
        assert list(properties[section].get("properties", [])) == (keys.split() if keys else [])
        assert properties[section]["description"]


def test_committed_schema_is_current() -> None:
    # python -c "from finetune import recipe; print(recipe.schema_text(), end='')" > recipes/schema.json
    assert (REPOSITORY / "recipes" / "schema.json").read_text() == recipe.schema_text()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    for line in text.splitlines():
        assert not line.strip() or "#" in line, f"a key without a comment: {line}"
    tree = yamlfile.load(path).value
    jsonschema.Draft202012Validator(json.loads((path.parent / "schema.json").read_text())).validate(tree)
    monkeypatch.chdir(with_data(tmp_path))
    read = recipe.load(path)
    assert known_models.find(read.model) is not None
    assert read.output.startswith("runs/")


def test_schema_is_a_schema_and_refuses_what_the_loader_refuses() -> None:
    schema = recipe.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    tree: dict[str, Any] = yamlfile.parse(BASE, "f").value
    assert validator.is_valid(tree)
    assert not validator.is_valid({**tree, "trian": {}})
    assert not validator.is_valid({**tree, "train": {**tree["train"], "seed": "x"}})
    assert not validator.is_valid({**tree, "adapter": {"method": "lora", "r": 8}})
    assert not validator.is_valid({key: value for key, value in tree.items() if key != "model"})
    assert validator.is_valid({"extends": "base.yaml", "train": {"seed": 3}})
    assert not validator.is_valid({"extends": "base.yaml", "train": {"sede": 3}})


def test_known_models_are_consistent() -> None:
    names = known_models.names()
    assert len(set(names)) == len(names)
    for model in known_models.MODELS:
        assert known_models.find(model.name) is model
        assert model.num_attention_heads % model.num_key_value_heads == 0
        assert model.num_attention_heads * model.head_dim == model.hidden_size
    assert known_models.find("./data/bases/tiny/") is known_models.find("data/bases/tiny")
    assert known_models.find("") is None


def test_known_models_have_the_sizes_their_makers_state() -> None:
    counted = {model.name: _parameters(model) for model in known_models.MODELS}
    assert counted["Qwen/Qwen1.5-14B"] == 14_167_290_880
    assert counted["Qwen/Qwen2.5-14B"] == 14_770_033_664
    assert counted["Qwen/Qwen3-14B"] == 14_768_307_200
    assert counted["HuggingFaceTB/SmolLM2-135M-Instruct"] == 134_515_008


def _parameters(model: known_models.KnownModel) -> int:
    """Parameters of a decoder with gated MLP, RMS norms, and q/k norms where the family has them."""
    queries = model.num_attention_heads * model.head_dim
    keys = model.num_key_value_heads * model.head_dim
    attention = model.hidden_size * (2 * queries + 2 * keys) + (queries + 2 * keys) * model.attention_bias
    norms = 2 * model.hidden_size + 2 * model.head_dim * (model.family == "qwen3")
    layer = attention + 3 * model.hidden_size * model.intermediate_size + norms
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return embeddings + model.num_hidden_layers * layer + model.hidden_size


def test_load_is_quick_and_imports_nothing_heavy(work: Path) -> None:
    (work / "r.yaml").write_text(BASE)
    code = (
        "import sys, pathlib; from finetune import recipe; recipe.load(pathlib.Path('r.yaml')); recipe.schema(); "
        "sys.exit(','.join({'torch', 'transformers', 'peft', 'datasets', 'accelerate'} & set(sys.modules)) or None)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XDG_CACHE_HOME": str(work / "cache")}
    done = subprocess.run([sys.executable, "-c", code], cwd=work, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    start = time.process_time()
    recipe.load(Path("r.yaml"))
    assert time.process_time() - start < 0.25  # about 0.01 s of work; CPU time, so that a busy machine does not fail it
