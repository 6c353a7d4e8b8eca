"""LLaMA-Factory's settings, and its defaults as its package says them."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune import importers
from tests.importers import facts
from tests.importers.conftest import Imported, plan, rows
from tests.runs import finetune

BARE = """\
stage: sft
finetuning_type: lora
model_name_or_path: base
dataset_dir: .
dataset: shop
"""


def bare(text: str) -> Imported:
    Path("c.yaml").write_text(BARE + text)
    return Imported("c.yaml")


@pytest.fixture(autouse=True)
def shop(place: Path) -> None:
    rows(place / "train.jsonl", 24, "shop")


def test_the_example_has_the_same_meaning() -> None:
    found = Imported("llamafactory.yaml")
    assert found.json["trainer"] == "llamafactory"
    expected = {
        "model": "base", "quantize.weights": "nf4", "adapter.r": 12, "adapter.lora_alpha": 24,
        "adapter.lora_dropout": 0.0, "adapter.target_modules": ["q_proj", "v_proj", "down_proj"],
        "train.lora_plus_ratio": 16, "train.max_length": 512, "data.train_path": "train.jsonl", "train.epochs": 3.0,
        "train.examples_per_step": 2, "train.learning_rate": 1e-4, "train.schedule": "cosine", "train.warmup": 3,
        "train.save_every": 14, "evaluate.every": 2, "data.eval_fraction": 0.25, "train.seed": 42,
        "data.train_on": "assistant", "output": "saves/shop",
    }  # fmt: skip
    assert {key: found.values[key] for key in expected} == expected
    assert found.recipe is not None
    assert found.recipe.data.columns == {"instruction": "question", "output": "reply"}
    assert found.recipe.quantize.double
    assert plan()["steps"] == 27  # 18 of 24 rows, three times, two a step


def test_defaults_are_those_of_its_package() -> None:
    hparams = facts.source("llamafactory") / "hparams"
    read = {
        "lora_rank": 8, "lora_alpha": None, "lora_dropout": 0.0, "lora_target": "all", "stage": "sft",
        "finetuning_type": "lora", "pissa_init": False,
    }  # fmt: skip
    tuning = facts.defaults(hparams / "finetuning_args.py")
    assert {key: tuning[key] for key in read} == read
    data = facts.defaults(hparams / "data_args.py")
    read = {"cutoff_len": 2048, "train_on_prompt": False, "mask_history": False, "val_size": 0.0, "packing": None,
            "neat_packing": False, "dataset_dir": "data"}  # fmt: skip
    assert {key: data[key] for key in read} == read
    model = facts.defaults(hparams / "model_args.py")
    assert (model["quantization_type"], model["double_quantization"]) == ("nf4", True)
    assert "lora_alpha or self.lora_rank * 2" in (hparams / "finetuning_args.py").read_text(encoding="utf-8")
    assert "self.cutoff_len -= 1" in (hparams / "data_args.py").read_text(encoding="utf-8")


def test_the_known_keys_are_its_packages() -> None:
    hparams = facts.source("llamafactory") / "hparams"
    for part in ("model", "data", "finetuning", "generating"):
        read = facts.defaults(hparams / f"{part}_args.py")
        assert set(read) - set(importers.known("llamafactory")) == set()


def test_defaults_alone() -> None:
    found = bare("")
    expected = {
        "quantize.weights": "bf16", "adapter.r": 8, "adapter.lora_alpha": 16,
        "adapter.target_modules": "all-linear", "train.max_length": 2048, "train.examples_per_step": 8,
        "train.epochs": 3.0, "train.learning_rate": 5e-5, "train.schedule": "linear", "train.warmup": 0,
        "train.save_every": 500,
    }  # fmt: skip
    assert {key: found.values[key] for key in expected} == expected
    assert "cut in proportion" in found.about("cutoff_len")
    assert "neither bf16 nor fp16" in found.about("bf16")
    assert "nothing was saved" in found.about("save_steps")


@pytest.mark.parametrize(
    ("text", "train_on"),
    [("train_on_prompt: true\n", "all"), ("mask_history: true\n", "last"), ("train_on_prompt: off\n", "assistant")],
)
def test_what_is_in_the_loss(text: str, train_on: str) -> None:
    assert bare(text).values["data.train_on"] == train_on


def test_packing_takes_a_token_and_lets_rows_see_each_other() -> None:
    found = bare("packing: true\ncutoff_len: 129\nmax_steps: 4\n")
    assert found.values["train.max_length"] == 128
    assert found.values["train.tokens_per_step"] == 8 * 128
    assert "see each other" in found.about("packing")
    Path("recipe.yaml").unlink()
    assert not bare("neat_packing: true\ncutoff_len: 129\nmax_steps: 4\n").about("packing")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("chats", {"train_path": "chats.json", "format": "chat", "columns": {"messages": "dialog"}}),
        ("hub", {"sources": [{"path": "owner/chats", "format": "sharegpt", "split": "train_sft"}]}),
        ("shop,hub", {"sources": [{"path": "train.jsonl", "format": "alpaca",
                                   "columns": {"instruction": "question", "output": "reply"}},
                                  {"path": "owner/chats", "format": "sharegpt", "split": "train_sft"}]}),
    ],
)  # fmt: skip
def test_declared_sets(name: str, data: dict[str, object]) -> None:
    rows(Path("chats.json"), 4)
    Path("c.yaml").write_text(BARE.replace("dataset: shop", f"dataset: {name}"))
    found = Imported("c.yaml")
    assert found.recipe is not None
    written = found.recipe.data.model_dump(exclude_defaults=True)
    assert {key: written[key] for key in data} == data


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("stage: ppo\n", "stage: ppo is not taken over: it learns from answers that it samples"),
        ("finetuning_type: full\n", "full trains what is no LoRA"),
        ("quantization_bit: 3\n", "3 bits have no format here"),
        ("dataset: shpo\n", "'shop'"),
        ("eval_dataset: chats\nval_size: 0.1\n", "cannot be given together with eval_dataset"),
    ],
)
def test_what_cannot_be_a_recipe_is_refused(text: str, what: str) -> None:
    key = text.split(":")[0]
    kept = "".join(line for line in BARE.splitlines(keepends=True) if not line.startswith(f"{key}:"))
    Path("c.yaml").write_text(kept + text)
    said = finetune("import", "c.yaml", "--from", "llamafactory")
    assert (said.code, what in said.err) == (2, True), said.err
    assert not Path("recipe.yaml").exists()


def test_a_set_that_is_not_here_is_named(place: Path) -> None:
    (place / "dataset_info.json").unlink()
    found = Imported("llamafactory.yaml")
    assert "write the file that it stands for" in found.about("dataset", "lost")
    assert "no such file" in found.json["missing"][0]["what"]
    assert Path("recipe.yaml").exists()
