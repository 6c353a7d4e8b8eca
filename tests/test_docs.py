"""What the documents say is true: the tree, the commands, the links, the recipes' comments."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from finetune.cli import app

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    path
    for folder in ("docs", "benchmarks", "data", "notebooks")
    for path in (ROOT / folder).rglob("*.md")
    if "bases" not in path.parts
)
FIXED = {"pyproject.toml", "README.md", "Makefile", "finetune", "recipes", "data", "tests"}


def tree() -> dict[str, str]:
    """Path → phrase, from the README's tree (two spaces of indentation per level)."""
    block = README.split("```text\nfinetune/")[1].split("```")[0]
    found: dict[str, str] = {}
    folders: list[str] = []
    for line in block.splitlines():
        match = re.match(r"( *)(\S+?)(/?)  +(\S.*)$", line)
        if not match:
            continue
        depth = len(match[1]) // 2 - 1
        folders[depth:] = [match[2]] if match[3] else []
        found["/".join([*folders[: depth + 1], *([] if match[3] else [match[2]])])] = match[4]
    return found


def test_tree_names_every_room_with_a_phrase() -> None:
    real = {
        str(path.relative_to(ROOT / "finetune"))
        for path in (ROOT / "finetune").rglob("*")
        if "__pycache__" not in path.parts and (path.is_dir() or (path.suffix == ".py" and path.name != "__init__.py"))
    }
    assert set(tree()) == real


def test_fixed_top_level() -> None:
    assert {path.name for path in ROOT.iterdir()} >= FIXED


def prose(document: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """Headings as GitHub links to them: small letters, hyphens for blanks, no punctuation, a number at the next."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+?) *#*$", prose(document), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        again = found.get(name, 0)
        found[name] = again + 1
        if again:
            found[f"{name}-{again}"] = 1
    return set(found)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    """Files, and headings in them. Links to other hosts are well formed; nothing is asked of the network."""
    for target in re.findall(r"\]\(([^)]+)\)", prose(document)):
        if "://" in target:
            assert re.fullmatch(r"https://[\w.-]+(/\S*)?", target), f"{document.name} links to {target}"
            continue
        path, _, anchor = target.partition("#")
        there = (document.parent / path) if path else document
        assert there.exists(), f"{document.name} links to {target}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there), f"{document.name} links to {target}: no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_exist(document: Path) -> None:
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    text = document.read_text(encoding="utf-8")
    for verb, rest in re.findall(r"(?:\.venv/bin/|`)finetune ([a-z]+)([^`\n#]*)", text):
        assert verb in verbs, f"finetune {verb}"
        command = verbs[verb]
        below = getattr(command, "commands", {}).get(rest.split()[0] if rest.split() else "")  # data check, data show
        known = {option for parameter in (below or command).params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", rest)) <= known | {"--help"}, f"finetune {verb} {rest}"
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in re.findall(
        r"`?make ((?:[a-z][a-z0-9-]* ?)+)", " ".join(re.findall(r"`[^`]+`|^make .*$", text, re.MULTILINE))
    ):
        assert set(line.split()) <= targets, f"make {line}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_brackets_pass_for_a_reference(document: Path) -> None:
    """The site reads `[B] [A]` outside of code as a link to a name, and is not built where there is none."""
    plain = re.sub(r"`[^`\n]*`", "", prose(document))
    assert re.findall(r"\][ \n]?\[[^\]]+\](?!\()", plain) == []


def test_paths_in_readme_exist() -> None:
    for path in re.findall(r"`((?:tests|docs|recipes|data|benchmarks)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path


def test_nothing_unfinished_in_the_documents() -> None:
    for document in DOCUMENTS:
        assert not re.search(r"<!--|TODO|TBD|XXX", document.read_text(encoding="utf-8")), document.name


def test_tests_mirror_the_package() -> None:
    """Every room has a test file of its name; rooms that are proved elsewhere are named here with the place."""
    elsewhere = {
        "budget": "test_calibration", "fitting": "test_plan", "targets": "test_plan", "report": "test_plan",
        "decoder": "test_base",
        "ended": "test_runtable", "devices": "test_cli", "session": "test_chat", "pipeline": "test_merge",
        "prepare": "test_plan", "interrupts": "test_run", "scores": "test_run", "model": "test_loop",
        "known_models": "test_base", "errors": "test_cli", "finished": "test_merge_run",
        "certify": "test_merge_run", "train": "test_run", "state": "test_run", "records": "test_datacheck",
        "adapter_file": "test_adapter_layout", "metrics": "test_run", "tokenizer": "test_base",
        "layouts": "test_convert", "unpickle": "test_pickles", "headers": "test_base", "fold": "test_merge",
        "teacher": "objectives/test_distill", "taught": "objectives/test_distill",
        "whole": "test_trained", "gather": "test_dataset", "look": "test_datashow", "samples": "test_store",
        "messages": "formats/test_chat", "rowcheck": "test_conversation", "datacli": "test_datacheck",
        "card": "test_release", "shipcli": "test_cli", "export": "test_release", "upload": "test_push",
        "llamaruntime": "test_prove", "terms": "test_release", "signature": "test_verify",
        "joint_plan": "test_together", "runresult": "test_runpage",
        "runsections": "test_runpage",
        "foreign": "test_adopt", "dsfile": "importers/test_qwen", "foreignparts": "importers/test_axolotl",
        "foreignobjective": "importers/test_objectives", "foreignsampled": "importers/test_sampled",
        "beginning": "objectives/test_training",
        "startcli": "test_doctor", "survey": "test_draft", "proposal": "test_draft", "conflicts": "test_doctor",
        "tiny_base": "test_data_scripts",
        "runcli": "test_compare", "talkcli": "test_chat",
        "traincli": "test_launch", "follow": "test_launch", "jobtask": "test_launch",
        "sharding": "test_peers", "allreduce": "test_peers", "sweepplan": "test_sweep", "judgecli": "test_judgement",
        "bare": "test_judgement", "rating": "objectives/test_reward",
        "rollouts": "objectives/test_grpo",
    }  # fmt: skip
    for path in (ROOT / "finetune").glob("*.py"):
        if not path.name.startswith("__"):
            name = elsewhere.get(path.stem, f"test_{path.stem}")
            assert (ROOT / "tests" / f"{name}.py").is_file(), f"{path.name} has no test"
