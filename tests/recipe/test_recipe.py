"""Recipes: what a good one means, how bases and overrides merge, and that the schema and the shipped files agree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from finetune import known_models, recipe
from finetune.recipe import adapter_fields, yamlfile
from tests.recipe.text import BASE

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data files, in which a recipe's relative paths start."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text(f'{{"{name}": 1}}\n')
    return tmp_path


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


def test_a_commit_in_a_path_is_not_a_secret(work: Path) -> None:
    commit = "0123456789" * 4
    (work / "snapshots" / commit).mkdir(parents=True)
    (work / "r.yaml").write_text(BASE.replace("Qwen/Qwen2.5-14B", f"snapshots/{commit}"))
    assert recipe.load(Path("r.yaml")).model == f"snapshots/{commit}"


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
    for read, _, _ in recipe.locate_all(path):
        (tmp_path / "again.yaml").write_text(yamlfile.dump(read.to_yaml_dict()))
        assert recipe.load(tmp_path / "again.yaml") == read
        flat = recipe.flatten(read)
        assert all(isinstance(value, str | int | float | bool) for value in flat.values())
        assert flat["adapter.r"] == read.adapter.fields["r"]
        assert flat["evaluate.metrics"] == ", ".join(read.evaluate.metrics)
        assert flat["data.eval_fraction"] == (read.data.eval_fraction or "null")


def with_data(folder: Path) -> Path:
    """A working folder with the files that the shipped recipes name."""
    for place in ("dates", "preferences"):
        (folder / "data" / place).mkdir(parents=True)
        for name in ("train", "eval", "train-labels", "eval-labels"):
            (folder / "data" / place / f"{name}.jsonl").write_text(f'{{"{name}": 1}}\n')
    (folder / "data" / "samples").mkdir()
    (folder / "data" / "samples" / "alpaca.jsonl").write_text("{}\n")
    return folder


def test_list_of_keys_is_frozen() -> None:
    """A new key is a promise to keep: add it here, to the docs and to a shipped recipe together."""
    adapter = (
        "method start_from r lora_alpha lora_dropout target_modules exclude_modules use_rslora use_dora "
        "rank_pattern alpha_pattern init_lora_weights layers_to_transform layers_pattern modules_to_save bias "
        "fan_in_fan_out eva_config corda_config lora_ga_config"
    )
    others = dict.fromkeys(key for method in adapter_fields.trainable() for key in adapter_fields.legal(method))
    adapter = " ".join([adapter, *(key for key in others if key not in adapter.split())])
    train = (
        "steps epochs examples_per_step tokens_per_step learning_rate schedule warmup optimizer lora_plus_ratio "
        "weight_decay max_grad_norm max_length micro_batch_tokens recompute kernels compile shard save_every keep_last "
        "copy_to seed workers"
    )
    expected: dict[str, str | None] = {
        "extends": None,
        "model": None,
        "revision": None,
        "rope": None,
        "quantize": "weights double compute",
        "adapter": adapter,
        "trainable_tokens": None,
        "objective": "method loss beta label_smoothing length_normalised gamma desirable_weight undesirable_weight "
        "margin centre_rewards_coefficient teacher teacher_weights temperature divergence alpha "
        "rewards completions max_new_tokens epsilon epsilon_high scale_rewards iterations "
        "mask_truncated_completions use_bias_correction_kl batch_rows",
        "data": "train_path sources eval_path eval_split eval_fraction format columns train_on thinking literal_tokens "
        "over_length",
        "train": train,
        "evaluate": "metrics every keep best_by early_stopping_patience early_stopping_threshold rows max_new_tokens "
        "batch_rows regex json_schema multiple_choice command command_timeout unit_test",
        "tracker": None,
        "output": None,
        "adapters": None,
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
    for read, _, _ in recipe.locate_all(path):
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
