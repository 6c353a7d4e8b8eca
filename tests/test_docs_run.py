"""Every fenced block of README.md and docs/ does what it says: commands and Python run over a tiny base, YAML is read.

What cannot run here (a card, a cluster, a network, minutes) is listed by its own text with the reason, is still parsed
by the real command line, and may not outlive the page that it stands on. Recipes are made small (``SMALL``).
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import typer.main

from finetune import recipe
from finetune.cli import app
from finetune.recipe import yamlfile
from tests.conftest import ROOT
from tests.importers.conftest import rows as rows_file
from tests.runs import chat, finetune, write_rows

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


class Block(NamedTuple):
    page: str
    line: int
    kind: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(kind: str = "") -> list[Block]:
    """Every fenced block; of one kind, where it is named."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Block(str(page.relative_to(ROOT)), line, match[2], match[3]))
    return [one for one in found if one.kind == kind] if kind else found


def commands(page: str) -> list[str]:
    """The lines of a page's bash blocks, without comments."""
    lines = [line for one in blocks("bash") if one.page == page for line in one.text.splitlines()]
    return [bare for line in lines if (bare := re.sub(r"\s+# .*$|^# .*$", "", line).strip())]


COMMANDED = sorted({one.page for one in blocks("bash")})
CALL = re.compile(r"\.venv/bin/finetune ([^|;]+)")
_MINUTES = "the real base, for minutes: make test-real"
_CLUSTER = "needs a cluster: tests/test_launch.py runs the same road with two processes"
_SERVES = "serves until it is stopped: tests/test_serve.py and tests/test_dashboard.py"
_GGUF = "needs llama.cpp's converters, which are fetched: tests/exporters"
_TASKS = "needs the extra of lm-evaluation-harness: tests/test_harness.py"
_HUB = "needs the hub: tests/test_push.py talks to one of its own"
_NOT_HERE = "tests/test_qwen14b_page.py runs it over a small base of the same format"
LISTED = {
    "make quickstart": _MINUTES,
    "make test": "it is what runs this",
    ".venv/bin/finetune doctor --numerics": "a quarter of a minute: tests/test_numerics.py",
    ".venv/bin/finetune train recipes/quickstart.yaml --processes 2": "two more processes: tests/test_launch.py",
    ".venv/bin/finetune push published owner/name": _HUB,
    ".venv/bin/finetune sweep recipes/quickstart.yaml --set output=runs/sweep --grid adapter.r=8,16 "
    "--grid train.learning_rate=1e-4,2e-4": "four runs: docs/comparing.md has the same line, which is run",
    ".venv/bin/finetune chat runs/quickstart --serve": _SERVES,
    ".venv/bin/finetune chat runs/quickstart --serve --port 8000": _SERVES,
    ".venv/bin/finetune dashboard runs": _SERVES,
    ".venv/bin/finetune dashboard runs --text --watch": _SERVES,
    ".venv/bin/finetune train recipes/qwen14b-qlora-24gb.yaml": _NOT_HERE,
    ".venv/bin/finetune train recipes/qwen14b-lora-80gb.yaml --processes 2 --set train.shard=fsdp": _NOT_HERE,
    ".venv/bin/finetune eval runs/qwen14b-dates": _NOT_HERE,
    ".venv/bin/finetune merge runs/qwen14b-dates --out merged": _NOT_HERE,
    ".venv/bin/finetune merge runs/qwen14b-dates --out merged-qwen --layout original": _NOT_HERE,
    ".venv/bin/finetune convert runs/qwen14b-dates/adapter adapter-qwen --to original": _NOT_HERE,
    ".venv/bin/finetune convert Qwen-14B qwen-14b-native --to native": _NOT_HERE,
    ".venv/bin/finetune convert qwen-14b-native qwen-14b-again --to original": _NOT_HERE,
    ".venv/bin/finetune prove my-model model.gguf": _GGUF,
    ".venv/bin/finetune export runs/quickstart --to gguf --quantize q4_k_m --out model.gguf": _GGUF,
    ".venv/bin/finetune export runs/quickstart --to gguf --adapter-only --out adapter.gguf": _GGUF,
    ".venv/bin/finetune export runs/quickstart --to ollama --quantize q8_0 --out for-ollama": _GGUF,
    ".venv/bin/finetune eval runs/quickstart --tasks parity --task-path tasks": _TASKS,
    ".venv/bin/finetune train recipe.yaml --processes 4": _CLUSTER,
    ".venv/bin/finetune train recipe.yaml --processes 4 --launch accelerate --launch-config config.yaml": _CLUSTER,
    ".venv/bin/finetune train recipe.yaml --processes 8 --launch slurm --job slurm_partition=gpu --job nodes=2 "
    "--job timeout_min=240 --job gpus_per_node=4": _CLUSTER,
    "torchrun --nnodes=2 --node-rank=0 --nproc-per-node=8 --master-addr=HOST --master-port=29500 -m finetune train "
    "recipe.yaml --world 16": _CLUSTER,
    "export FINETUNE_SERVE_TOKEN=$(openssl rand -hex 24)": "for the endpoint that the Python block below asks",
}
"""Lines of bash blocks that are not run here, and why."""
ENDINGS = {".venv/bin/finetune data check data/bad/nul.jsonl --fix mended.jsonl": 3}
"""Exit codes that are not 0: that one has a fault to mend."""


def test_no_listed_line_is_stale() -> None:
    there = {line for page in COMMANDED for line in commands(page)}
    assert set(LISTED) - there == set()
    assert set(ENDINGS) - there == set()


@pytest.mark.parametrize("page", COMMANDED)
def test_every_command_line_is_one(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parsed by the command line's own parser, whether it runs here or not: verbs, options, arguments, values."""
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").touch()  # must be there to be parsed
    root = typer.main.get_command(app)
    for line in commands(page):
        for call in CALL.findall(line):
            command, words = root, shlex.split(call)
            while isinstance(command, click.Group) or hasattr(command, "commands"):
                command = command.commands[words.pop(0)]
            command.make_context(command.name, words)
        if not CALL.search(line):
            assert re.match(r"(make [a-z-]+$|torchrun |export )", line), f"what is this line? {line}"


# ── the workplace ─────────────────────────────────────────────────────────

SMALL = {
    r"^  steps: \d+": "  steps: 2",
    r"^  save_every: \d+": "  save_every: 1",
    r"^  warmup: \d+": "  warmup: 0",
    r"^  rows: \d+": "  rows: 4",
    r"^  examples_per_step: \d+": "  examples_per_step: 2",
    r"^  max_new_tokens: \d+": "  max_new_tokens: 4",
    r"^tracker: trackio": "tracker: none",
    # a random model's noise in bf16 is as large as a proof's bound
    r"^  weights: nf4": "  weights: nf4\n  compute: fp32",
}
"""What is changed in the recipes that are run."""
WRITTEN = {"train.steps=90 --extend": "train.steps=3 --set output=runs/other --extend"}
"""Words that are replaced: what is lengthened is a copy, since the page's next lines go on with the run."""
IMPORTED = {
    "qlora.yaml --from trl --devices 4": "trl.yaml",
    "finetune_qlora_ds.sh": "qwen.sh",
    "qlora.yaml": "axolotl.yaml",
}
"""Somebody else's settings → the fixture of tests/importers that stands in for them, the first that fits."""


def small(text: str) -> str:
    for old, new in SMALL.items():
        text = re.sub(old, new, text, flags=re.MULTILINE)
    return re.sub(r"\n  compute: fp32(.*\n)  compute: fp32[^\n]*\n", r"\n  compute: fp32\1", text)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Path:
    """A checkout after ``make quickstart``, made small: data, recipes, one finished run, other people's settings."""
    place = tmp_path_factory.mktemp("docs") / "checkout"
    for name in ("bad", "dates", "preferences", "samples"):
        shutil.copytree(ROOT / "data" / name, place / "data" / name)
    for name in ("smollm2-135m-instruct", "tiny"):
        shutil.copytree(tiny_base, place / "data" / "bases" / name)
        (place / "data" / "bases" / name / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    (place / "recipes").mkdir()
    for path in (ROOT / "recipes").iterdir():
        own = "14b" in path.name or path.suffix != ".yaml"
        (place / "recipes" / path.name).write_text(path.read_text() if own else small(path.read_text()))
    shutil.copy(place / "recipes" / "tiny.yaml", place / "recipe.yaml")
    shutil.copytree(tiny_base, place / "base")
    rows = [chat(f"What comes after {n}?", f"{n + 1}") for n in range(25)]
    for name in ("more", "rows", "train", "eval", "support"):
        write_rows(place / f"{name}.jsonl", rows[:4] if name in ("more", "rows") else rows)
    (place / "dataset_info.json").write_text("{}")
    shutil.copytree(tiny_base, place / "my-model")  # until a page makes one
    rows_file(place / "train.json", 25, "conversations")
    with contextlib.chdir(place):
        for more in ((), ("--set", "adapter.use_dora=true", "--set", "output=runs/dora")):
            said = finetune("train", "recipes/quickstart.yaml", *more)
            assert said.code == 0, said.err
    for name in ("other", "a", "b"):
        shutil.copytree(place / "runs" / "quickstart", place / "runs" / name)
    return place


@pytest.fixture
def place(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(template, tmp_path / "checkout")
    monkeypatch.chdir(tmp_path / "checkout")
    return tmp_path / "checkout"


def made_way(words: list[str]) -> None:
    """What an earlier line of the page left where this one writes."""
    outs = [words[at + 1] for at, word in enumerate(words[:-1]) if word in ("--out", "--fix", "--html")]
    outs += [words[2]] if words[0] == "convert" else []
    outs += ["recipe.yaml"] if words[0] == "import" and not outs else []
    for out in map(Path, outs):
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)


def prepared(line: str) -> tuple[list[str], str]:
    """The words behind ``finetune``, and what stands on its input."""
    call = CALL.search(line)
    assert call is not None
    text = call[1]
    for old, new in WRITTEN.items():
        text = text.replace(old, new)
    words = shlex.split(text)
    piped = re.match(r'echo "([^"]+)" \|', line)
    if words[0] == "import":
        fixture = next(file for part, file in IMPORTED.items() if part in text)
        shutil.copy(ROOT / "tests" / "importers" / fixture, words[1])
        shutil.copy(ROOT / "tests" / "importers" / "ds_config_zero2.json", "ds_config_zero2.json")
    if words[0] == "release":
        words += ["--data-licence", "cc0-1.0"]
    if words[0] == "init":
        words += ["--model", "data/bases/tiny"]
    return words, piped[1] + "\n" if piped else "hello\n" if words[0] == "chat" else ""


@pytest.mark.parametrize("page", [page for page in COMMANDED if set(commands(page)) - set(LISTED)])
def test_every_command_of_a_page_runs(page: str, place: Path) -> None:
    """In their order, in one checkout."""
    for line in commands(page):
        if line in LISTED:
            continue
        words, entered = prepared(line)
        made_way(words)
        said = finetune(*words, stdin=entered)
        assert said.code == ENDINGS.get(line, 0), f"{line}\n{said.err or said.out}"
        assert not said.err.startswith("Traceback")


# ── Python, YAML, JSON ────────────────────────────────────────────────────

ELSEWHERE = {
    "docs/python.md": "tests/test_api.py runs it and looks at what it prints",
    "docs/evaluating.md": "a judge of one's own: tests/evals/test_command.py runs it as that page's example",
}
"""Pages whose Python is not run here."""
BEFORE = {"docs/objectives.md": ("train", "recipes/dates-reward.yaml")}
"""What a page's commands have made when its Python runs."""


@pytest.fixture
def served(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The endpoint over the finished run, as its page starts it; the port."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("FINETUNE_SERVE_TOKEN", "a-token-of-the-test")
    command = [
        sys.executable,
        "-m",
        "finetune",
        "chat",
        "runs/quickstart",
        "--serve",
        "--port",
        str(port),
        "--max-new-tokens",
        "4",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 120
        while True:
            assert process.poll() is None, process.stderr and process.stderr.read()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            except urllib.error.HTTPError:
                break
            except OSError:
                assert time.monotonic() < until, "the endpoint never answered"
                time.sleep(0.1)
            else:
                break
        yield port
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize(
    "block", [one for one in blocks("python") if one.page not in ELSEWHERE], ids=lambda one: one.name
)
def test_python_runs(
    block: Block, place: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    text = block.text
    if block.page in BEFORE:
        said = finetune(*BEFORE[block.page])
        assert said.code == 0, said.err
    if "openai" in text:
        pytest.importorskip("openai", reason="the openai client is not installed (extra dev)")
        text = text.replace(":8000/", f":{request.getfixturevalue('served')}/")
    exec(compile(text, block.name, "exec"), {})  # the page's own text
    assert capsys.readouterr().out.strip() or "export(" in text


def test_no_page_is_named_in_vain() -> None:
    assert set(ELSEWHERE) <= {one.page for one in blocks("python")}
    for reason in (*LISTED.values(), *ELSEWHERE.values()):
        for path in re.findall(r"tests/[\w/]+(?:\.py)?", reason):
            assert (ROOT / path).exists(), reason


RECIPE = """\
model: base
quantize: {weights: nf4}
adapter: {method: lora, r: 4, lora_alpha: 8}
data: {train_path: train.jsonl}
train: {steps: 100, examples_per_step: 2, learning_rate: 0.001, max_length: 128}
output: runs/from-docs
"""


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda one: one.name)
def test_yaml_is_a_recipe_or_a_part_of_one(block: Block, place: Path) -> None:
    for path in ("schemas/answer.json", "scripts/judge.py"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text("{}")
    Path("block.yaml").write_text(block.text)
    found = yamlfile.load(Path("block.yaml")).value
    if "task" in found:  # a task of lm-eval
        assert {"task", "dataset_path", "output_type", "metric_list"} <= set(found)
        return
    if "extends" in found:
        shutil.move("block.yaml", "recipes/block.yaml")
        assert len(recipe.locate_all(Path("recipes/block.yaml"))) == len(found["adapters"])
        return
    whole: dict[str, Any] = _read(RECIPE)
    for section, keys in found.items():
        whole[section] = keys if section == "data" or not isinstance(keys, dict) else {**whole.get(section, {}), **keys}
    judged = whole.get("evaluate") is not None and "eval_fraction" not in whole["data"]
    if judged:
        whole["data"].setdefault("eval_path", "eval.jsonl")
    Path("whole.yaml").write_text(yamlfile.dump(whole))
    loaded = recipe.load(Path("whole.yaml"))
    flat = recipe.flatten(loaded)
    assert set(found) <= {key.partition(".")[0] for key in flat}


def _read(text: str) -> dict[str, Any]:
    Path("read.yaml").write_text(text)
    found: dict[str, Any] = yamlfile.load(Path("read.yaml")).value
    return found


@pytest.mark.parametrize("block", blocks("json"), ids=lambda one: one.name)
def test_json_is_json(block: Block) -> None:
    for line in block.text.splitlines():
        assert json.loads(line)


def test_every_kind_of_block_is_seen_to() -> None:
    """``text`` is what a terminal showed, or a tree."""
    assert {one.kind for one in blocks()} <= {"bash", "python", "yaml", "json", "text"}
    assert len(blocks("bash")) >= 20
