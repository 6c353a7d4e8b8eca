"""TRL's settings: what TRL's own parser makes of them, and what the recipe says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune import importers
from tests.importers.conftest import Imported, plan, rows
from tests.runs import finetune

PARSE = """
import dataclasses, json, sys, warnings
warnings.simplefilter("ignore")
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser
parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig))
parsed = parser.parse_args_and_config(["--config", sys.argv[1], "--use_cpu"], fail_with_unknown_args=False)
names = [[field.name for field in dataclasses.fields(one)] for one in parsed]
values = {name: getattr(one, name) for one, fields in zip(parsed, names) for name in fields}
plain = (int, float, str, bool, list, type(None))
print(json.dumps({key: value for key, value in values.items() if isinstance(value, plain)}))
"""


def theirs(config: str) -> dict[str, Any]:
    """The values that TRL itself reads from a file; skips where TRL is not installed."""
    pytest.importorskip("trl", reason="TRL is not installed (extra bench): nothing to compare with")
    done = subprocess.run([sys.executable, "-c", PARSE, config], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    values: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return values


SAME = {
    "train.max_length": "max_length", "train.epochs": "num_train_epochs", "train.learning_rate": "learning_rate",
    "train.schedule": "lr_scheduler_type", "train.warmup": "warmup_steps", "train.weight_decay": "weight_decay",
    "train.max_grad_norm": "max_grad_norm", "train.seed": "seed", "train.save_every": "save_steps",
    "adapter.r": "lora_r", "adapter.lora_alpha": "lora_alpha", "adapter.lora_dropout": "lora_dropout",
    "quantize.weights": "bnb_4bit_quant_type", "quantize.double": "use_bnb_nested_quant", "model": "model_name_or_path",
    "data.train_path": "dataset_name", "output": "output_dir",
}  # fmt: skip


def flat(found: Imported) -> dict[str, Any]:
    from finetune import recipe

    assert found.recipe is not None
    return recipe.flatten(found.recipe)


def test_effective_values_are_those_that_trl_itself_reads(place: Path) -> None:
    """With every slip in the file: a misspelt key, names of earlier versions, defaults that were never written."""
    found, trl = Imported("trl.yaml"), theirs("trl.yaml")
    ours = flat(found)
    assert {key: ours[key] for key in SAME} == {key: trl[name] for key, name in SAME.items()}
    per_step = trl["per_device_train_batch_size"] * trl["gradient_accumulation_steps"]
    assert ours["train.examples_per_step"] == per_step
    assert (ours["quantize.compute"] == "bf16") == trl["bf16"]


@pytest.mark.parametrize("extra", ["", "max_length: 300\nwarmup_steps: 0.5\nlr_scheduler_type: linear\nmax_steps: 8\n"])
def test_defaults_alone_are_trls(place: Path, extra: str) -> None:
    Path("bare.yaml").write_text(
        "model_name_or_path: base\ndataset_name: train.jsonl\nuse_peft: true\nload_in_4bit: true\n" + extra
    )
    found, trl = Imported("bare.yaml", "--from", "trl"), theirs("bare.yaml")
    ours = flat(found)
    same = {key: name for key, name in SAME.items() if key not in ("train.warmup", "train.epochs")}
    assert {key: ours[key] for key in same} == {key: trl[name] for key, name in same.items()}
    assert ours["train.warmup"] == (4 if extra else trl["warmup_steps"])
    assert ours["train.steps" if extra else "train.epochs"] == trl["max_steps" if extra else "num_train_epochs"]


def test_the_known_keys_are_trls() -> None:
    pytest.importorskip("trl", reason="TRL is not installed (extra bench)")
    code = PARSE.split("parsed =")[0].replace("import dataclasses", "import argparse, dataclasses")
    code += "print(json.dumps([action.dest for action in parser._actions]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    read = set(json.loads(done.stdout.splitlines()[-1])) - {"help"}
    assert read - set(importers.known("trl")) == set()


def test_what_is_dropped_without_a_word_is_said(place: Path) -> None:
    found = Imported("trl.yaml")
    assert "did you mean 'lora_alpha'?" in found.about("lora_aplha")
    assert "max_length, whose default is 1024" in found.about("max_seq_length")
    assert "0 by default" in found.about("warmup_ratio")
    assert "lose their end" in found.about("max_length")
    assert "q_proj and v_proj" in found.about("lora_target_modules")
    assert found.about("logging_steps", "lost")


def test_it_plans(place: Path) -> None:
    Imported("trl.yaml")
    planned = plan()
    assert planned["steps"] == 9  # 25 rows twice, 6 a step
    assert {one["module"] for one in planned["targets"]} == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    ("shape", "extra", "train_on"),
    [
        ("messages", "", "all"),
        ("messages", "assistant_only_loss: true", "assistant"),
        ("pairs", "", "assistant"),
        ("pairs", "completion_only_loss: false", "all"),
        ("text", "", "all"),
    ],
)
def test_what_is_in_the_loss_hangs_on_the_rows(place: Path, shape: str, extra: str, train_on: str) -> None:
    rows(Path("train.jsonl"), 8, shape)
    text = f"model_name_or_path: base\ndataset_name: train.jsonl\nuse_peft: true\ndtype: bfloat16\n{extra}\n"
    Path("c.yaml").write_text(text)
    found = Imported("c.yaml", "--from", "trl")
    assert found.values["data.train_on"] == train_on
    assert bool(found.about("assistant_only_loss")) == (train_on == "all" and shape != "text")
    plan()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("use_peft: false\nlora_r: 8", "use_peft: use_peft is not set: TRL trains every weight"),
        (
            "use_peft: true\nteacher_model_name_or_path: t",
            "distillation is not taken over: its model learns from a teacher",
        ),
        ("use_peft: true\ncpo_alpha: 1", "cpo_alpha: cpo is not taken over: its loss has no reference"),
        ("use_peft: true\nload_in_4bit: true\nload_in_8bit: true", "load_in_8bit: cannot be true beside load_in_4bit"),
        ("use_peft: true\nlora_r: many", "lora_r: must be a number; found many"),
        ("use_peft: true\nlora_r: 0", "lora_r: must be a whole number, at least 1; found 0"),
        ("use_peft: true\nlearning_rate: 40", "learning_rate (here train.learning_rate): must be a number, above 0"),
        ("use_peft: perhaps", "use_peft: must be true or false; found perhaps"),
    ],
)
def test_what_cannot_be_a_recipe_is_refused_by_its_key(place: Path, text: str, what: str) -> None:
    Path("c.yaml").write_text(f"model_name_or_path: base\ndataset_name: train.jsonl\n{text}\n")
    said = finetune("import", "c.yaml", "--from", "trl")
    assert said.code == 2
    assert what in said.err, said.err
    assert not Path("recipe.yaml").exists()


def test_packs_are_filled_by_tokens(place: Path) -> None:
    Path("c.yaml").write_text(
        "model_name_or_path: base\ndataset_name: train.jsonl\nuse_peft: true\ndtype: bfloat16\npacking: true\n"
        "max_length: 128\nper_device_train_batch_size: 2\nmax_steps: 3\n"
    )
    found = Imported("c.yaml", "--from", "trl", "--devices", "2")
    assert found.values["train.tokens_per_step"] == 2 * 2 * 128
    assert plan()["steps"] <= 3


def test_a_mixture_becomes_sources(place: Path) -> None:
    rows(Path("more.jsonl"), 5)
    Path("c.yaml").write_text(
        "model_name_or_path: base\nuse_peft: true\ndtype: bfloat16\ntest_split_size: 0.1\nmax_length: 256\n"
        "datasets:\n  - path: train.jsonl\n  - path: json\n    data_files: more.jsonl\n    fraction: 0.5\n"
    )
    found = Imported("c.yaml", "--from", "trl")
    assert [one["path"] for one in found.values["data.sources"]] == ["train.jsonl", "more.jsonl"]
    assert found.values["data.eval_fraction"] == 0.1
    assert "share of rows" in found.about("datasets", "lost")
    plan()
