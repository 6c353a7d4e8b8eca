"""``finetune import``: what is read, what is refused, what is written; hostile settings above all."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from finetune import adopt, importers, recipe
from finetune.foreign import reason
from tests.importers.conftest import place as place
from tests.runs import finetune

GOOD = "model_name_or_path: base\ndataset_name: train.jsonl\nuse_peft: true\ndtype: bfloat16\n"
OUT = Path("recipe.yaml")
BASES = {
    "trl": {"model_name_or_path": "base", "dataset_name": "train.jsonl", "use_peft": True},
    "axolotl": {
        "base_model": "base", "adapter": "lora", "lora_r": 8, "lora_alpha": 8, "lora_target_linear": True,
        "learning_rate": 1e-4, "datasets": [{"path": "train.jsonl", "type": "chat_template"}],
    },
    "llamafactory": {"model_name_or_path": "base", "dataset": "shop", "dataset_dir": "."},
    "swift": {"model": "base", "dataset": "train.jsonl"},
    "qwen": {"model_name_or_path": "base", "use_lora": True, "data_path": "train.jsonl"},
}  # fmt: skip
"""The least that each trainer's settings must hold."""


def refused(text: str | bytes, name: str = "c.yaml", *arguments: str) -> str:
    """What is said of settings that are no recipe; nothing is left behind."""
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    before = sorted(Path().iterdir())
    said = finetune("import", name, *arguments)
    assert said.code == 2, said.out + said.err
    assert sorted(Path().iterdir()) == before
    assert "Traceback" not in said.err
    return said.err


@pytest.mark.parametrize("name", ["axolotl.yaml", "llamafactory.yaml", "trl.yaml", "swift.sh", "qwen.sh"])
def test_every_key_is_accounted_for(place: Path, name: str) -> None:
    """Written keys = taken + lost + said to differ; nothing is passed over."""
    made = importers.read(Path(name), None, None, adopt.Place(columns=adopt._columns, reach=adopt._reach))
    said = {key for one in made.taken for key in one.keys} | {one.key for one in made.remarks}
    silent = {key for key, value in made.settings.values.items() if value is not None and value is not False} - said
    # Read together with a key that is named; settled later; or switched nothing here.
    assert silent <= {
        "adapter", "load_in_4bit", "use_peft", "dtype", "val_set_size", "evals_per_epoch", "saves_per_epoch", "bf16",
        "eval_strategy", "evaluation_strategy", "eval_steps", "save_steps", "save_strategy", "warmup_ratio",
        "split_dataset_ratio", "use_lora", "stage", "finetuning_type", "val_size",
    }  # fmt: skip


def test_people_and_programs_read_the_same(place: Path) -> None:
    said = finetune("import", "trl.yaml")
    assert said.code == 0, said.err
    assert "lora_r = 8 → adapter.r: 8" in said.out
    assert "lora_alpha = 32 (its default) → adapter.lora_alpha: 32" in said.out
    assert "next: finetune plan recipe.yaml" in said.out
    text = OUT.read_text()
    assert "  r: 8 # lora_r\n" in text
    assert "# - lora_aplha: TRL does not know this key" in text
    OUT.unlink()
    found = json.loads(finetune("import", "trl.yaml", "--json", "--quiet").out)
    assert {"keys": ["lora_r"], "value": 8, "written": True, "recipe": "adapter.r", "becomes": 8, "note": ""} in found[
        "taken"
    ]


def test_nothing_that_is_there_is_replaced(place: Path) -> None:
    OUT.write_text("mine")
    said = finetune("import", "trl.yaml")
    assert said.code == 5
    assert OUT.read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "the file is empty"),
        ("- a\n- b\n", "must be a mapping"),
        ("a: !!python/object/apply:os.system ['touch made']\n", "tag"),
        ("a: &x [1]\nb: *x\n", "anchor"),
        ("lora_r: 8\nlora_r: 9\n", "written twice"),
        ("a: [1, 2\n", "not valid YAML"),
        (b"a: \xff\n", "is not UTF-8"),
        ("a: 1\nb: 2\n", "its keys fit no trainer that is known here"),
        (
            "model_name_or_path: base\nper_device_train_batch_size: 1\n",
            "say which it is: --from axolotl|llamafactory|qwen|swift|trl",
        ),
        (b"a: " + b"x" * 1_000_001, "larger than 1000000 bytes"),
        ("a: .inf\n", "not a finite number"),
    ],
)
def test_files_that_are_no_settings(place: Path, text: str | bytes, what: str) -> None:
    assert what in refused(text)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("[1, 2]", "must be one object"),
        ('{"a": 1, "a": 2}', "written twice"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": 1', "not valid JSON"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deep"),
        ('{"a": ' + "9" * 5000 + "}", "too many digits"),
    ],
)
def test_json_that_is_no_settings(place: Path, text: str, what: str) -> None:
    assert what in refused(text, "c.json")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("output_dir: ${HOME}/x", "environment variables are not expanded"),
        ("output_dir: ../up", "must not contain .."),
        ("output_dir: https://host/x", "a URL is not accepted"),
        ("learning_rate: [1]", "learning_rate: must be a number"),
        ("learning_rate: .nan", "not a finite number"),
        ("learning_rate: 1e400", "not a finite number"),
        ("learning_rate: 1e30", "learning_rate: must be a number; found 1e+30"),
        ("num_train_epochs: 0", "num_train_epochs: must be above 0"),
        ("gradient_accumulation_steps: 1e300", "gradient_accumulation_steps: must be a number"),
        ("dataset_config: x\ndataset_name: ''", "dataset_name (here data.sources[0].path): the path is empty"),
        ("seed: -1", "seed: must be a whole number, at least 0"),
        ("max_length: 1e12", "max_length (here train.max_length)"),
        (
            "lora_target_modules: [q_proj, x_proj]",
            "lora_target_modules (here adapter.target_modules[1]): no such module",
        ),
        ("lora_target_modules: {a: b}", "lora_target_modules: must be a list of words"),
        ("lora_target_modules: ['(a+)+$']", "lora_target_modules (here adapter.target_modules)"),
        ("per_device_train_batch_size: 0", "must be a whole number, at least 1; found 0"),
        ("warmup_steps: -3", "warmup_steps: must be a number of steps"),
        ("save_strategy: sometimes", "save_strategy: must be no, steps or epoch"),
    ],
)
def test_values_that_no_recipe_has(place: Path, line: str, what: str) -> None:
    written = [one.partition(":")[0] for one in line.splitlines()]
    kept = "".join(one for one in GOOD.splitlines(keepends=True) if one.partition(":")[0] not in written)
    assert what in refused(f"{kept}{line}\n", "c.yaml", "--from", "trl")


def test_several_faults_are_told_at_once(place: Path) -> None:
    said = refused(f"{GOOD}lora_r: x\nlora_alpha: y\nseed: z\n", "c.yaml", "--from", "trl")
    assert said.count("recipe: c.yaml:") == 3


def test_hostile_text_stays_text(place: Path) -> None:
    """Terminal escapes are refused as control characters; a value cannot end its comment and write a key."""
    assert "control character" in refused(f"{GOOD}output_dir: \x1b[2Jx\n", "c.yaml", "--from", "trl")
    text = f'{GOOD}"learning_rate: 9 # x": 1\nrun_name: "a # b: c"\nmodel_revision: "v1\\nquantize: {{}}"\n'
    Path("c.yaml").write_text(text)
    said = finetune("import", "c.yaml", "--from", "trl")
    assert said.code == 0, said.err
    assert recipe.load(OUT).revision == "v1\nquantize: {}"
    assert recipe.load(OUT).train.learning_rate == 2e-5


def test_secrets_are_not_written(place: Path) -> None:
    Path("c.yaml").write_text(f"{GOOD}push_to_hub: true\nhub_token: hf_abcdefghijklmnopqrstuvwxyz012345\n")
    said = finetune("import", "c.yaml", "--from", "trl", "--json")
    assert said.code == 0, said.err
    assert "hf_abc" not in said.out + said.err + OUT.read_text()
    assert "finetune push" in said.out


def test_a_device_or_a_folder_is_no_file(place: Path) -> None:
    for name in ("base", "/dev/null", "missing.yaml"):
        said = finetune("import", name)
        assert said.code == 2
        assert ("not a file" in said.err) or ("no such file" in said.err)


def test_an_unknown_trainer_is_named(place: Path) -> None:
    said = finetune("import", "trl.yaml", "--from", "tlr")
    assert said.code == 2
    assert "one of axolotl, llamafactory, qwen, swift, trl" in said.err


def test_what_is_not_on_this_disk_does_not_stop_it(place: Path) -> None:
    """A recipe may be made on another machine than the one that trains."""
    Path("c.yaml").write_text(GOOD.replace("base", "/models/qwen").replace("train.jsonl", "/data/rows.jsonl"))
    said = finetune("import", "c.yaml", "--from", "trl")
    assert said.code == 0, said.err
    assert "not here yet:" in said.out
    assert said.out.count("(here ") == 2
    assert finetune("plan", str(OUT)).code == 2


def test_files_are_found_from_the_settings_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dataset_dir of LLaMA-Factory is said from its own root, while its settings lie deeper."""
    deep = place / "examples" / "lora"
    deep.mkdir(parents=True)
    (place / "trl.yaml").rename(deep / "trl.yaml")
    monkeypatch.chdir(place / "examples")
    said = finetune("import", "lora/trl.yaml", "--json", "--quiet")
    assert said.code == 0, said.err
    taken = {one["recipe"]: one["becomes"] for one in json.loads(said.out)["taken"]}
    assert Path(taken["data.train_path"]).samefile(place / "train.jsonl")


@pytest.mark.parametrize(
    ("key", "word"),
    [("push_to_hub", "finetune push"), ("deepspeed", "names no devices"), ("dataloader_num_workers", "finetune plan"),
     ("hub_token", "publishing"), ("wandb_project", "tracker"), ("something_else", "no such choice")],
)  # fmt: skip
def test_reasons(key: str, word: str) -> None:
    assert word in reason(key)


@pytest.mark.parametrize("seed", range(5))
def test_random_settings_are_refused_or_load(place: Path, seed: int) -> None:
    """Whatever stands behind the keys that an importer reads: a recipe that loads, or a coded refusal and no file."""
    odd = [
        None, True, False, 0, -1, 3, 0.5, 1e308, "", "x", "1e-4", "a,b", "epoch", "steps", "nan", [], [1], ["a", None],
        [[1]], {}, {"a": 1}, [{"path": 3}], [{"path": "train.jsonl", "type": 3, "data_files": "x"}], "\n# a", 10**30,
    ]  # fmt: skip
    rng, loaded = random.Random(seed), 0
    for trainer, base in BASES.items():
        Path("c.json").write_text(json.dumps(base))
        made = importers.read(Path("c.json"), trainer, None, adopt.Place(columns=adopt._columns, reach=adopt._reach))
        for _ in range(12):
            changed = {rng.choice(sorted(made.settings.used)): rng.choice(odd) for _ in range(rng.randint(1, 2))}
            Path("c.json").write_text(json.dumps(base | changed))
            said = finetune("import", "c.json", "--from", trainer, "--quiet", "--json")
            assert said.code in (0, 2), (changed, said.err)
            assert OUT.exists() == (said.code == 0), changed
            if OUT.exists():
                loaded += 1
                if not json.loads(said.out)["missing"]:
                    recipe.load(OUT)
                OUT.unlink()
    assert loaded > 5
