"""Preferences as other trainers say them: method, loss, numbers, reference, and the adapter to go on from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune import foreignobjective, importers
from tests.importers import facts
from tests.importers.conftest import AXOLOTL, FACTORY, LABELS, SWIFT, TRL, Imported, imported, plan
from tests.runs import finetune

pytestmark = pytest.mark.usefixtures("judged")


def brief(value: object) -> str:
    return value if isinstance(value, str) and len(value) < 20 else ""


AXOLOTL_OWN = AXOLOTL.replace("chat_template.argilla_chat", "chatml.ultra")
AXOLOTL_LABELS = AXOLOTL_OWN.replace(*LABELS)


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("trl", TRL, {"method": "dpo", "loss": "sigmoid", "beta": 0.1}),
    (
        "trl",
        f"{TRL}beta: 0.3\nloss_type: [ipo]\n",
        {"method": "dpo", "loss": "ipo", "beta": 0.3, "length_normalised": True},
    ),
    ("trl", f"{TRL}loss_type: robust\nlabel_smoothing: 0.2\n", {"loss": "robust", "label_smoothing": 0.2}),
    ("trl", f"{TRL}loss_type: hinge\n", {"method": "dpo", "loss": "hinge"}),
    ("trl", f"{TRL}loss_type: simpo\ncpo_alpha: 0\n", {"method": "simpo", "beta": 0.1, "gamma": 0.5}),
    ("trl", TRL.replace(*LABELS), {"method": "kto", "beta": 0.1, "desirable_weight": 1, "undesirable_weight": 1}),
    ("trl", f"{TRL.replace(*LABELS)}undesirable_weight: 1.5\n", {"method": "kto", "undesirable_weight": 1.5}),
    ("axolotl", f"{AXOLOTL}rl: dpo\n", {"method": "dpo", "loss": "sigmoid", "beta": 0.1}),
    ("axolotl", f"{AXOLOTL}rl: dpo\nrl_beta: 0.2\ndpo_loss_type: [hinge]\n", {"loss": "hinge", "beta": 0.2}),
    ("axolotl", f"{AXOLOTL}rl: dpo\nrl_beta: 0.2\ntrl:\n  beta: 0.4\n", {"beta": 0.4}),
    ("axolotl", f"{AXOLOTL}rl: ipo\nrl_beta: 0.2\n", {"method": "dpo", "loss": "ipo", "length_normalised": True}),
    ("axolotl", f"{AXOLOTL}rl: orpo\norpo_alpha: 0.25\n", {"method": "orpo", "beta": 0.25}),
    ("axolotl", f"{AXOLOTL}rl: simpo\nsimpo_gamma: 0.7\nrl_beta: 2\n", {"method": "simpo", "beta": 2, "gamma": 0.7}),
    ("axolotl", f"{AXOLOTL_LABELS}rl: kto\nkto_desirable_weight: 0.5\n", {"method": "kto", "desirable_weight": 0.5}),
    ("llamafactory", f"{FACTORY}stage: dpo\n", {"method": "dpo", "loss": "sigmoid", "beta": 0.1}),
    (
        "llamafactory",
        f"{FACTORY}stage: dpo\npref_beta: 0.4\ndpo_label_smoothing: 0.1\n",
        {"beta": 0.4, "label_smoothing": 0.1},
    ),
    ("llamafactory", f"{FACTORY}stage: dpo\npref_loss: ipo\n", {"loss": "ipo", "length_normalised": True}),
    ("llamafactory", f"{FACTORY}stage: dpo\npref_loss: orpo\n", {"method": "orpo", "beta": 0.1}),
    (
        "llamafactory",
        f"{FACTORY}stage: dpo\npref_loss: simpo\npref_beta: 2.5\n",
        {"method": "simpo", "beta": 2.5, "gamma": 0.5},
    ),
    (
        "llamafactory",
        f"{FACTORY.replace(*LABELS)}stage: kto\nkto_rejected_weight: 2\n",
        {"method": "kto", "undesirable_weight": 2},
    ),
    ("swift", f"{SWIFT}rlhf_type: dpo\nlabel_smoothing: 0.1\n", {"method": "dpo", "beta": 0.1, "label_smoothing": 0.1}),
    ("swift", f"{SWIFT}rlhf_type: simpo\ncpo_alpha: 0\n", {"method": "simpo", "beta": 2, "gamma": 1}),
    ("swift", f"{SWIFT}rlhf_type: cpo\nloss_type: simpo\ncpo_alpha: 0\n", {"method": "simpo", "beta": 0.1}),
    ("swift", f"{SWIFT.replace('pairs', 'swift')}rlhf_type: orpo\nbeta: 0.2\n", {"method": "orpo", "beta": 0.2}),
    ("swift", f"{SWIFT.replace(*LABELS)}rlhf_type: kto\n", {"method": "kto", "desirable_weight": 1}),
]


@pytest.mark.parametrize(
    ("trainer", "text", "expected"),
    CASES,
    ids=brief,
)
def test_it_becomes_an_objective_that_plans(trainer: str, text: str, expected: dict[str, Any]) -> None:
    found = imported(trainer, text)
    assert found.recipe is not None
    settings = found.recipe.objective.settings() | {"method": found.recipe.objective.method}
    assert {key: settings[key] for key in expected} == expected
    assert {f"objective.{key}" for key in settings} - set(found.values) <= {
        "objective.label_smoothing", "objective.length_normalised",
    }, "a number of the objective that nobody was told"  # fmt: skip
    assert found.recipe.adapter.fields["lora_dropout"] == 0
    assert plan()["steps"] == 2


@pytest.mark.parametrize(
    ("trainer", "text", "key", "kind", "what"),
    [
        ("trl", f"{TRL}loss_type: bco_pair\n", "loss_type", "lost", "bco_pair is no loss of a recipe"),
        (
            "trl",
            f"{TRL}loss_type: [sigmoid, sft]\nloss_weights: [1, 0.2]\n",
            "loss_type",
            "lost",
            "a recipe has one loss",
        ),
        ("trl", f"{TRL}label_smoothing: 0.1\n", "label_smoothing", "differs", "does not heed it there"),
        ("trl", f"{TRL}loss_type: simpo\n", "cpo_alpha", "lost", "it is 1, its default"),
        ("trl", f"{TRL}sync_ref_model: true\nbeta: 0.1\n", "sync_ref_model", "lost", "here it stays"),
        ("trl", f"{TRL}f_divergence_type: js_divergence\n", "f_divergence_type", "lost", "reverse KL"),
        ("trl", f"{TRL}beta: 0.1\n", "beta", "differs", "orpo.py has such rows"),
        ("trl", f"{TRL}beta: 0.1\n", "lora_dropout", "differs", "it was 0.05 and did nothing"),
        (
            "trl",
            f"{TRL}beta: 0.1\ndisable_dropout: false\nlabel_smothing: 0.1\n",
            "label_smothing",
            "differs",
            "did you mean",
        ),
        ("trl", TRL.replace(*LABELS), "train_sampling_strategy", "differs", "in the file's order"),
        (
            "trl",
            f"{TRL.replace(*LABELS)}loss_type: apo_zero_unpaired\n",
            "loss_type",
            "lost",
            "no loss of a recipe's kto",
        ),
        (
            "axolotl",
            f"{AXOLOTL}rl: dpo\ndpo_label_smoothing: 0.1\n",
            "dpo_label_smoothing",
            "differs",
            "does not heed it",
        ),
        ("axolotl", f"{AXOLOTL}rl: dpo\nlora_model_dir: earlier\n", "lora_model_dir", "differs", "never loaded there"),
        ("axolotl", f"{AXOLOTL_OWN}rl: dpo\n", "datasets", "differs", "writes chatml's marks itself"),
        ("llamafactory", f"{FACTORY}stage: dpo\npref_ftx: 0.1\n", "pref_ftx", "lost", "cross-entropy"),
        ("llamafactory", f"{FACTORY}stage: dpo\npref_loss: kto_pair\n", "pref_loss", "lost", "kto_pair is no loss"),
        ("llamafactory", f"{FACTORY}stage: dpo\nref_model: other\n", "ref_model", "lost", "no model of its own"),
        ("swift", f"{SWIFT}rlhf_type: dpo\nrpo_alpha: 1.0\n", "rpo_alpha", "lost", "cross-entropy"),
        ("swift", f"{SWIFT}rlhf_type: dpo\nref_adapters: x\n", "ref_adapters", "lost", "does not begin from"),
    ],
    ids=brief,
)
def test_what_has_no_counterpart_or_meant_something_else_is_said(
    trainer: str, text: str, key: str, kind: str, what: str
) -> None:
    found = imported(trainer, text)
    assert what in found.about(key, kind), found.json[kind]
    plan()


def test_dropout_counts_where_the_trainer_was_told_to_keep_it() -> None:
    found = imported("trl", f"{TRL}beta: 0.1\ndisable_dropout: false\n")
    assert found.values["adapter.lora_dropout"] == 0.05


# ── the adapter to go on from ─────────────────────────────────────────────


@pytest.fixture
def earlier(judged: Path) -> Path:
    """A finished run of rank 4, and its adapter as a folder of its own."""
    Path("sft.yaml").write_text(
        "model: base\nquantize: {weights: bf16}\n"
        "adapter: {method: lora, r: 4, lora_alpha: 8, lora_dropout: 0.1, target_modules: [q_proj, v_proj]}\n"
        "data: {train_path: train.jsonl}\n"
        "train: {steps: 1, examples_per_step: 2, learning_rate: 0.001, max_length: 256}\n"
        "trainable_tokens: none\nevaluate: {metrics: [loss]}\ntracker: none\noutput: runs/sft\n"
    )
    said = finetune("train", "sft.yaml")
    assert said.code == 0, said.err
    shutil.copytree("runs/sft/adapter", "earlier")
    return judged / "earlier"


ONWARD = {
    "llamafactory": (f"{FACTORY}stage: dpo\nadapter_name_or_path: earlier\n", "adapter_name_or_path"),
    "swift": (f"{SWIFT}rlhf_type: dpo\nadapters: earlier\n", "adapters"),
    "axolotl": (f"{AXOLOTL}rl: orpo\nlora_model_dir: earlier\n", "lora_model_dir"),
}


@pytest.mark.parametrize("trainer", ONWARD)
def test_an_adapter_to_go_on_from_is_one_here_with_its_own_shape(trainer: str, earlier: Path) -> None:
    text, key = ONWARD[trainer]
    found = imported(trainer, text)
    expected = {"start_from": "earlier", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    assert {name: found.values[f"adapter.{name}"] for name in expected} == expected
    assert ("is the base without this adapter" in found.about(key)) == (trainer != "axolotl")
    plan()
    said = finetune("train", "recipe.yaml", "--set", "tracker=none", "--set", "evaluate.metrics=[loss]")
    assert said.code == 0, said.err


def test_the_same_reference_is_no_difference(earlier: Path) -> None:
    own = "ref_model: base\nref_model_adapters: earlier\n"
    found = imported("llamafactory", f"{ONWARD['llamafactory'][0]}{own}")
    assert not found.about("adapter_name_or_path")
    assert not found.about("ref_model", "lost")
    found = imported("swift", f"{ONWARD['swift'][0]}ref_adapters: earlier\n")
    assert not found.about("adapters")


def test_supervised_settings_go_on_from_an_adapter_too(earlier: Path) -> None:
    found = imported("swift", SWIFT.replace("pairs", "train") + "adapters: runs/sft\n")
    assert (found.values["adapter.start_from"], found.values["adapter.r"]) == ("runs/sft", 4)
    assert found.values["adapter.lora_dropout"] == 0.1
    plan()


def test_an_adapter_that_is_not_here_is_named_by_the_plan_only() -> None:
    found = imported("swift", f"{SWIFT}rlhf_type: dpo\nadapters: elsewhere\n")
    assert found.values["adapter.start_from"] == "elsewhere"
    assert finetune("plan", "recipe.yaml").code == 2


# ── scripts, and what the packages themselves say ─────────────────────────


@pytest.mark.parametrize(
    ("line", "method", "beta"),
    [
        ("trl dpo --model_name_or_path base --dataset_name pairs.jsonl --use_peft --dtype bfloat16", "dpo", 0.1),
        ("python orpo.py --model_name_or_path base --dataset_name pairs.jsonl --use_peft --beta 0.2", "orpo", 0.2),
        ("trl kto --model_name_or_path base --dataset_name labels.jsonl --use_peft --dtype bfloat16", "kto", 0.1),
        ("swift rlhf --model base --dataset pairs.jsonl --torch_dtype bfloat16 --max_length 256", "dpo", 0.1),
    ],
)  # fmt: skip
def test_the_program_of_a_script_tells_the_method(line: str, method: str, beta: float) -> None:
    Path("c.sh").write_text(f"{line} --max_steps 2\n")
    found = Imported("c.sh")
    assert (found.values["objective.method"], found.values["objective.beta"]) == (method, beta)
    assert not found.about("beta")
    plan()


@pytest.mark.parametrize("line", ["trl distillation --model_name_or_path base", "trl rloo --model_name_or_path base"])
def test_other_programs_are_refused_by_name(line: str) -> None:
    Path("c.sh").write_text(f"{line} --dataset_name pairs.jsonl --use_peft\n")
    said = finetune("import", "c.sh")
    assert (said.code, f"{line.split()[1]} is not taken over" in said.err) == (2, True), said.err


def test_every_word_of_the_table_is_a_method_or_has_its_reason() -> None:
    from finetune.recipe.objective_keys import DEFAULTS

    for word, one in foreignobjective.METHODS.items():
        assert bool(one.method) != bool(one.why), word
        assert not one.method or one.method in DEFAULTS, word


PARSE = """
import dataclasses, json, sys, warnings
warnings.simplefilter("ignore")
from trl import (DatasetMixtureConfig, DPOConfig, GRPOConfig, KTOConfig, ModelConfig, RewardConfig, ScriptArguments,
                 TrlParser)
from trl.experimental.cpo import CPOConfig
from trl.experimental.orpo import ORPOConfig
programs = {"dpo": DPOConfig, "kto": KTOConfig, "orpo": ORPOConfig, "cpo": CPOConfig, "reward": RewardConfig,
            "grpo": GRPOConfig}
config = programs[sys.argv[1]]
parser = TrlParser((ScriptArguments, config, ModelConfig, DatasetMixtureConfig))
fields = {field.name: field.default for field in dataclasses.fields(config)}
plain = (int, float, str, bool, type(None))
print(json.dumps({"keys": [action.dest for action in parser._actions],
                  "defaults": {key: value for key, value in fields.items() if isinstance(value, plain)}}))
"""


def theirs(program: str) -> dict[str, Any]:
    """The keys and plain defaults of one of TRL's programs, by its own parser; skips where it is not installed."""
    pytest.importorskip("trl", reason="TRL is not installed (extra bench): nothing to compare with")
    done = subprocess.run([sys.executable, "-c", PARSE, program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("program", ["dpo", "kto", "orpo", "cpo"])
def test_keys_and_defaults_are_trls(program: str) -> None:
    found = theirs(program)
    assert set(found["keys"]) - {"help"} == set(importers.known(f"trl.{program}"))
    read = {"learning_rate": 1e-6, "beta": 0.1, "max_length": 1024, "disable_dropout": True}
    if program == "kto":
        read |= {"desirable_weight": 1.0, "undesirable_weight": 1.0, "loss_type": "kto"}
    if program == "cpo":
        read |= {"simpo_gamma": 0.5, "cpo_alpha": 1.0}
    assert {key: found["defaults"][key] for key in read} == read


def test_defaults_are_those_of_llamafactory() -> None:
    found = facts.defaults(facts.source("llamafactory") / "hparams" / "finetuning_args.py", "RLHFArguments")
    read = {
        "pref_beta": 0.1, "pref_ftx": 0.0, "pref_loss": "sigmoid", "dpo_label_smoothing": 0.0, "simpo_gamma": 0.5,
        "kto_chosen_weight": 1.0, "kto_rejected_weight": 1.0,
    }  # fmt: skip
    assert {key: found[key] for key in read} == read


def test_defaults_are_those_of_swift() -> None:
    swift = facts.source("swift")
    found = facts.defaults(swift / "arguments" / "rlhf_args.py", "RLHFArguments")
    read = {
        "rlhf_type": "dpo", "beta": None, "label_smoothing": 0, "cpo_alpha": 1.0, "simpo_gamma": 1,
        "desirable_weight": 1.0, "undesirable_weight": 1.0,
    }  # fmt: skip
    assert {key: found[key] for key in read} == read
    text = (swift / "arguments" / "rlhf_args.py").read_text(encoding="utf-8")
    assert "self.beta = 2." in text
    assert "self.beta = 0.1" in text


def test_axolotl_never_loads_the_adapter_of_a_preference_run() -> None:
    text = (facts.source("axolotl") / "loaders" / "model.py").read_text(encoding="utf-8")
    assert "self.cfg.rl in [RLType.DPO, RLType.IPO, RLType.KTO]" in text
    assert "config_only=True" in text
