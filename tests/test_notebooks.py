"""The notebooks: each is what its script says, holds nothing of the machine that it was executed on, and runs."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import load_script

ROOT = Path(__file__).resolve().parents[1]
make = load_script("notebooks/make.py")
SCRIPTS: list[Path] = make.scripts()
MOST_BYTES = 1_000_000
"""All notebooks with their pictures: a repository keeps every version."""
MOST_LINES = 10
"""A longer function belongs in the package."""
each = pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem[:2])


def stored(script: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(script.with_suffix(".ipynb").read_text(encoding="utf-8"))
    return found


def code(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def setting_up(script: Path) -> str:
    """The line that finds the repository."""
    return next(line for line in script.read_text(encoding="utf-8").splitlines() if line.startswith("root = "))


def test_there_are_four_and_each_is_a_pair() -> None:
    assert [script.name[:2] for script in SCRIPTS] == ["01", "02", "03", "04"]
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == {script.stem for script in SCRIPTS}
    readme = (ROOT / "notebooks" / "README.md").read_text(encoding="utf-8")
    assert all(f"({script.stem}.ipynb)" in readme for script in SCRIPTS)


@each
def test_a_notebook_is_what_its_script_says(script: Path) -> None:
    pytest.importorskip("jupytext", reason="pip install 'finetune-qwen[notebooks]'")
    made = make.bare(script)
    found = stored(script)
    kept = [(cell["id"], cell["cell_type"], "".join(cell["source"]), cell["metadata"]) for cell in found["cells"]]
    assert kept == [(cell["id"], cell["cell_type"], cell["source"], {}) for cell in made.cells], (
        f"python notebooks/make.py {script.name[:2]}"
    )
    assert found["metadata"] == make.METADATA


@each
def test_a_notebook_was_executed_whole_and_says_nothing_of_the_machine(script: Path) -> None:
    cells = code(stored(script))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not [one for one in outputs if one["output_type"] == "error" or one.get("name") == "stderr"]
    assert not make.strangers(script.with_suffix(".ipynb").read_text(encoding="utf-8"))


def test_the_notebooks_are_small() -> None:
    assert sum(script.with_suffix(".ipynb").stat().st_size for script in SCRIPTS) < MOST_BYTES


@each
def test_a_notebook_says_what_one_gets_and_defines_nothing_big(script: Path) -> None:
    first, *_ = stored(script)["cells"]
    assert first["cell_type"] == "markdown"
    assert re.match(r"# \S.*\n\nYou \S", "".join(first["source"]))
    tree = ast.parse(script.read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert all((node.end_lineno or 0) - node.lineno < MOST_LINES for node in functions)
    ours = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("finetune")
    ]
    assert ours
    assert not [name.name for node in ours for name in node.names if name.name.startswith("_")]
    assert not make.strangers(script.read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", [".", "notebooks"])
def test_a_notebook_finds_the_repository_from_either_folder(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {setting_up(script) for script in SCRIPTS}
    assert len(lines) == 1
    monkeypatch.chdir(ROOT / folder)
    names: dict[str, Any] = {"Path": Path}
    exec(lines.pop(), names)
    assert names["root"].resolve() == ROOT


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What a notebook needs of the repository, without fetched bases: there it makes its own."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copytree(ROOT / "data", root / "data", ignore=shutil.ignore_patterns("bases", "bad", "__pycache__"))
    (root / "recipes").mkdir()
    return root


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@each
def test_a_notebook_runs_and_leaves_nothing_behind(script: Path, checkout: Path, tmp_path: Path) -> None:
    for package in ("nbmake", "ipykernel", "matplotlib", "babel"):
        pytest.importorskip(package, reason="pip install 'finetune-qwen[notebooks]'")
    settings, scratch = tmp_path / "pytest.ini", tmp_path / "scratch"
    settings.write_text("[pytest]\n")  # this project's own settings make an error of each warning of a library
    scratch.mkdir()
    before = listing(checkout)
    notebook = checkout / "notebooks" / f"{script.stem}.ipynb"
    options = ["--nbmake", "--nbmake-timeout=280", "-q", "-p", "no:cacheprovider", "-c", str(settings)]
    own = {"TMPDIR": str(scratch), "IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(notebook)], env=os.environ | own, cwd=tmp_path,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "1 passed" in done.stdout
    assert listing(checkout) == before
    assert not [path.name for path in scratch.iterdir() if path.name.startswith("finetune")]
