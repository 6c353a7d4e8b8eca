"""The house rules, enforced: which way imports run, how large a room may be, and that importing does nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "finetune"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the top of the house to its ground. A room may import rooms below it, or earlier ones of its own floor.
ENTRANCE = [
    "api", "__main__", "jobtask", "cli", "startcli", "datacli", "shipcli", "runcli", "judgecli", "talkcli", "traincli",
    "options", "pipeline", "chat", "serve", "endpoint", "openai_api", "session", "answer",
]  # fmt: skip
ROAD = [
    "judgement", "harness", "teach", "predict", "rating", "bare", "unanswered", "doctor", "numerics", "adopt", "draft",
    "proposal", "survey",
    "push", "upload", "release", "export", "seal", "card", "terms", "as_lora", "prove", "certify", "trained",
    "whole", "blend",
    "finished", "convert", "adapter_layout", "weigh", "adapter_file", "dashboard", "sweep", "sweepplan", "grid",
    "comparepage", "compare", "runtable", "runview", "engines", "launch", "together", "follow", "train", "state",
    "copies", "probe", "teacher", "starts", "fallback", "best", "run",
    "runpage", "runresult", "runsections", "runstory", "datasample", "look", "prepare",
    "teaching", "rollouts", "gather", "starting", "heldout", "source", "datafix", "datashow", "datacheck", "repeats",
    "similar", "texts", "report", "joint_plan", "plan", "targets", "fitting", "speed", "budget", "merge", "fold",
    "proof", "scores", "evaluate", "taught", "generation", "metrics", "devices", "lockstep", "loop", "optimizer",
    "peers", "allreduce", "checkpoint", "shared_base", "model", "methods", "beginning", "sharding", "loading",
    "control_tokens", "tokenizer",
    "store", "samples", "window", "renderer", "dataset", "records", "hubdata", "datafolder", "layouts", "pickles",
    "unpickle", "shards", "base", "packed", "tokens", "tiktoken_file", "fetch", "headers", "identity", "hardware",
]  # fmt: skip
CHOICES = [
    "importers", "families", "formats", "evals", "exporters", "objectives", "forms", "kernels", "recipe",
    "known_models",
]  # fmt: skip
GROUND = [
    "hftrainer", "dsfile", "foreignobjective", "foreignsampled", "foreignparts", "foreign", "shellscript",
    "plot", "webpage", "gguf_file", "answer_schema", "pattern", "cage", "endings", "llamacpp", "llamaruntime",
    "interrupts", "jobplace", "timelimit", "unfinished", "ended",
    "terminal", "halving", "bootstrap", "schedule", "sampling", "decoder", "rowcheck", "messages", "conversation",
    "signature", "verify", "manifest", "runfolder", "conflicts", "tiny_base", "errors",
]  # fmt: skip
ORDER = [*ENTRANCE, *ROAD, *CHOICES, *GROUND]


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0] if parts[0] != "__init__" else ""


def imports(path: Path, *, top_level: bool = False) -> list[str]:
    """Modules of this package that a file imports; type-checking imports do not count."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    nodes = tree.body if top_level else list(ast.walk(tree))
    found = []
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def rooms_used(path: Path) -> set[str]:
    inside = (name.split(".") for name in imports(path) if name.startswith("finetune."))
    return {parts[1] for parts in inside if parts[1] != "__version__"} - {room(path)}


def test_every_room_has_its_place() -> None:
    assert {room(path) for path in FILES} - {""} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    if not room(path):
        return
    above = {other for other in rooms_used(path) if ORDER.index(other) < ORDER.index(room(path))}
    assert not above, f"{path.name} imports {above}, which stand above it"


def test_choices_know_no_step_and_no_other_kind_of_choice() -> None:
    allowed = {
        "objectives": {"kernels"},
        "forms": {"kernels"},
        "evals": {"objectives"},
        "recipe": {"known_models"},
        "importers": {"recipe"},
    }
    for path in FILES:
        if room(path) in CHOICES:
            strangers = rooms_used(path) - set(GROUND) - allowed.get(room(path), set())
            assert not strangers, f"{path} imports {strangers}"


def test_no_import_circles() -> None:
    graph: dict[str, set[str]] = {}
    for path in FILES:
        graph.setdefault(room(path), set()).update(rooms_used(path))
    seen: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import circle: {' → '.join((*trail, name))}"
        if name not in seen:
            for other in graph.get(name, set()):
                visit(other, (*trail, name))
            seen.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is too long"


def test_the_loop_is_small() -> None:
    assert len((PACKAGE / "loop.py").read_text().splitlines()) <= 250


def test_only_hardware_asks_for_the_card() -> None:
    askers = {path.name for path in FILES if "torch.cuda" in path.read_text() and path.name != "hardware.py"}
    assert not askers


def test_no_pickle_shell_or_remote_code() -> None:
    """One exception: the converter's child process reads original ``.bin`` shards, weights only."""
    forbidden = {"eval", "exec", "torch.load", "torch.save", "os.system", "yaml.load", "pickle.load", "pickle.loads"}
    for path in FILES:
        tree = ast.parse(path.read_text())
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
        allowed = {"torch.load"} if path.name == "unpickle.py" else set()
        assert not {ast.unparse(call.func) for call in calls} & (forbidden - allowed), path
        loads = [call for call in calls if ast.unparse(call.func) == "torch.load"]
        assert all("weights_only=True" in ast.unparse(call) for call in loads), path
        switched = {(word.arg, getattr(word.value, "value", None)) for call in calls for word in call.keywords}
        assert not switched & {("shell", True), ("trust_remote_code", True), ("weights_only", False)}, path
        assert not {name for name in imports(path) if name.split(".")[0] in ("pickle", "dill", "joblib", "yaml")}, path


def test_importing_does_nothing() -> None:
    """No variable set, no card asked, nothing heavy loaded."""
    code = (
        "import os, sys; before = dict(os.environ); import finetune, finetune.cli;"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'accelerate', 'bitsandbytes'} & set(sys.modules);"
        "sys.exit(f'{heavy} {dict(os.environ) == before}' if heavy or dict(os.environ) != before else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
