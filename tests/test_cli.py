"""The command line: one message and a code for every failure, quick answers, no tricks of other people's text."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune import __version__, cli, errors, pipeline
from tests import runs
from tests.runs import OUTPUT, finetune, process

RAISED: list[tuple[BaseException, int, str]] = [
    (errors.FinetuneError("the proof failed", "merged", "look"), 1, "check failed: merged: the proof failed; look\n"),
    (errors.RecipeError("bad key", "r.yaml:3", "did you mean x?"), 2, "recipe: r.yaml:3: bad key; did you mean x?\n"),
    (errors.DataError("broken", "d.jsonl:7"), 3, "data: d.jsonl:7: broken\n"),
    (errors.ModelError("no template", "base"), 4, "model: base: no template\n"),
    (errors.EnvironmentFault("disk full", "/x", "free some"), 5, "environment: /x: disk full; free some\n"),
    (errors.Interrupted("stopped"), 6, "interrupted: stopped\n"),
    (KeyboardInterrupt(), 6, "interrupted: stopped on request; give the same command again\n"),
    (PermissionError(13, "Not allowed", "/x/y"), 5, "environment: /x/y: Not allowed; mend that and run again\n"),
    (RuntimeError("a defect"), 70, "unexpected failure: RuntimeError: a defect\n"),
]  # fmt: skip


@pytest.mark.parametrize(("error", "code", "text"), RAISED, ids=[type(error).__name__ for error, _, _ in RAISED])
def test_each_failure_has_its_code_and_one_message(
    work: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, text: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(pipeline, "train", fail)
    said = runs.train()
    assert said.code == code
    assert said.err.startswith(text)
    assert "Traceback" not in said.err
    debugged = finetune("--debug", "train", "r.yaml")
    assert debugged.code == code
    assert ("Traceback" in debugged.err) == (not isinstance(error, KeyboardInterrupt))
    assert "Traceback" not in runs.train().err  # the switch is for one command


def test_every_fault_of_an_error_gets_its_line(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [errors.Fault(f"fault {n}", f"d.jsonl:{n}", "mend it") for n in range(3)]

    def fail(*_: Any, **__: Any) -> None:
        raise errors.DataError.of(faults)

    monkeypatch.setattr(pipeline, "plan", fail)
    said = finetune("plan", "r.yaml")
    assert said.err.splitlines() == [f"data: d.jsonl:{n}: fault {n}; mend it" for n in range(3)]


def test_a_failure_is_the_object_too_where_one_was_asked_for(work: Path) -> None:
    said = finetune("train", "r.yaml", "--json", "--set", "train.stepz=3")
    assert said.code == 2
    error = json.loads(said.out)["error"]
    assert (error["exit_code"], error["kind"]) == (2, "recipe")
    (fault,) = error["faults"]
    assert fault["where"] == "--set train.stepz"
    assert "did you mean 'steps'" in fault["what"] + fault["fix"]
    assert said.err.startswith("recipe: --set train.stepz: ")


@pytest.mark.parametrize("words", [["bogus"], ["train", "r.yaml", "--nonsense"], ["convert", "a", "b"]])
def test_a_wrong_command_line_is_told_a_program_too(work: Path, words: list[str]) -> None:
    said = finetune(*words, "--json")
    error = json.loads(said.out)["error"]
    assert (said.code, error["exit_code"], error["kind"]) == (2, 2, "usage")
    assert error["faults"][0]["what"]


def test_a_full_disk_at_the_very_end_is_one_message(work: Path) -> None:
    for words in (["schema"], ["dashboard", "x", "--json"], ["plan", "r.yaml"]):
        code = f"import sys; from finetune.cli import main; sys.argv = {['finetune', *words]}; main()"
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(
                [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )
        assert (done.returncode, done.stderr.count("\n")) == (5, 1), done.stderr


def verbs() -> dict[str, set[str]]:
    """Every verb with its options, as the command line has them."""
    import typer.main

    def below(group: Any, name: str) -> Iterator[tuple[str, set[str]]]:
        for word, command in group.commands.items():
            full = f"{name} {word}".strip()
            if hasattr(command, "commands"):
                yield from below(command, full)
            elif not command.hidden:
                yield full, {option for parameter in command.params for option in parameter.opts}

    return dict(below(typer.main.get_command(cli.app), ""))


def test_every_verb_answers_programs_and_can_be_quiet() -> None:
    silent = {"schema"}  # prints JSON and nothing else
    found = verbs()
    assert {"train", "data check", "merge"} <= set(found)
    lacking = {verb: {"--json", "--quiet"} - options for verb, options in found.items() if verb not in silent}
    assert {verb: options for verb, options in lacking.items() if options} == {}


HOSTILE = "\x1b[31mred\x1b]0;title\x07\r\x08\x9b2J\u202eevil\u2066\u200b\nsecond line\x00"


def test_control_characters_of_a_message_do_not_reach_the_terminal(work: Path) -> None:
    """A row's own words end up in a message."""
    row = {"messages": [{"role": HOSTILE, "content": "x"}, {"role": "assistant", "content": "y"}]}
    runs.write_rows(Path("train.jsonl"), [row])
    said = finetune("plan", "r.yaml")
    assert said.code == 3
    assert all(char.isprintable() for char in said.err.rstrip("\n"))
    assert len(said.err.splitlines()) == 1
    weights = {"what": HOSTILE, "where": HOSTILE}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "plan", _raising(errors.ModelError(**weights, fix=HOSTILE)))
        said = finetune("plan", "r.yaml")
        patch.setattr(pipeline, "plan", _raising(ValueError(HOSTILE)))
        defect = finetune("plan", "r.yaml")
    for text in (said.err, defect.err):
        assert all(char.isprintable() or char == "\n" for char in text)
        assert "\u202e" not in text


def _raising(error: Exception) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--version"], 0, __version__),
        (["--help"], 0, "One recipe trains, resumes, judges, merges and proves"),
        (["train", "--help"], 0, "--extend"),
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["train"], 2, "Missing argument"),
        (["train", "r.yaml", "--nonsense"], 2, "No such option"),
        (["merge", "runs/one", "--out", "m", "--base", "both"], 2, "must be auto, replayed or original"),
        (["train", "missing.yaml"], 2, "missing.yaml"),
        (["train", "r.yaml", "--set", "train.steps"], 2, "train.steps"),
        (["train", "r.yaml", "--set", "train.stepz=3"], 2, "did you mean 'steps'?"),
        (["chat", "nowhere"], 4, "this is not a run folder"),
        (["eval", "nowhere"], 4, "this is not a run folder"),
        (["dashboard", "nowhere"], 5, "no tracked runs here"),
    ],
)
def test_arguments(work: Path, arguments: list[str], code: int, text: str) -> None:
    said = finetune(*arguments)
    assert said.code == code
    assert text in (said.out if code == 0 else said.err)
    assert "Traceback" not in said.err


def test_no_command_shows_the_help(work: Path) -> None:
    said = finetune()
    assert "Usage" in said.out + said.err


HEAVY = "{'torch', 'transformers', 'peft', 'datasets', 'accelerate', 'trackio', 'wandb'} & set(sys.modules)"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["schema"], 0),
        (["dashboard", "--text"], 5),
        (["train", "r.yaml", "--set", "train.stepz=3"], 2),
        (["plan", "r.yaml", "--set", "train.learning_rate=fast"], 2),
    ],
)
def test_answers_that_need_no_torch_come_without_it(work: Path, arguments: list[str], code: int) -> None:
    program = (
        "import sys, time; from finetune.cli import main_in_process; code = main_in_process(sys.argv[1:]); "
        f"print(sorted({HEAVY}), time.process_time(), code)"
    )
    done = process(program, *arguments)
    loaded, seconds, found = done.stdout.splitlines()[-1].rsplit(" ", 2)
    assert (loaded, int(found)) == ("[]", code)
    assert float(seconds) < 3  # processor time: about 0.5 s on an idle machine, and a busy one must not fail it


def test_the_installed_command_ends_with_the_code(work: Path) -> None:
    program = "import sys; from finetune import cli; sys.argv = ['finetune', *sys.argv[1:]]; cli.main()"
    started = time.perf_counter()
    done = process(program, "plan", "r.yaml", "--set", "train.stepz=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("recipe: --set train.stepz: ")
    assert time.perf_counter() - started < 30


def test_a_plan_as_json_is_json_alone(work: Path) -> None:
    said = finetune("plan", "r.yaml", "--json", "--quiet")
    made = json.loads(said.out)
    assert (said.code, said.err) == (0, "")
    loud = finetune("plan", "r.yaml", "--json")
    assert "course     6 steps, 24 samples" in loud.err  # what a person reads is not lost
    assert json.loads(loud.out).keys() == made.keys()
    assert made["trainable_parameters"] > 0
    assert {"memory", "targets", "steps", "notes", "unchecked", "budget"} <= set(made)
    text = finetune("plan", "r.yaml").out
    for line in (
        "model      base (qwen2",
        "memory     ",
        "course     6 steps, 24 samples",
        "q_proj",
        "writes     runs/one",
    ):
        assert line in text


def test_eval_gives_the_runs_own_scores(finished: Path) -> None:
    said = finetune("eval", str(OUTPUT))
    assert (said.code, said.err) == (0, "")
    found = json.loads((OUTPUT / "evaluation.json").read_text())["scores"]
    stored = json.loads((OUTPUT / "scores.json").read_text())
    for subject, name in (("base", "before"), ("adapter", "after")):
        assert found[subject].keys() == stored[name].keys()
        for key, value in stored[name].items():  # packed otherwise where other memory is free
            one, two = found[subject][key], value
            if key == "perplexity":  # the exponential of the loss, which the bound is of
                one, two = math.log(one), math.log(two)
            assert one == pytest.approx(two, rel=1e-6)
    assert found["base"] != found["adapter"]
    assert "exact match" in said.out


def test_eval_without_held_out_rows_says_so(work: Path) -> None:
    assert runs.train("data.eval_path=null", "evaluate.metrics=[loss]", "train.steps=1").code == 0
    said = finetune("eval", str(OUTPUT))
    assert said.code == 3
    assert "there are no rows to judge on" in said.err


def test_summary_says_what_to_type_next(finished: Path) -> None:
    said = finetune("summary", str(OUTPUT), str(time.time() - 90))
    assert said.code == 0
    assert "done in 1m3" in said.out
    assert "finetune chat runs/one" in said.out


def test_importing_the_command_line_changes_nothing() -> None:
    program = (
        "import os, sys, warnings, signal; before = (dict(os.environ), list(warnings.filters), "
        "signal.getsignal(signal.SIGTERM)); import finetune.cli; "
        "assert before == (dict(os.environ), list(warnings.filters), signal.getsignal(signal.SIGTERM))"
    )
    assert process(program).returncode == 0
    assert cli.app.info.name == "finetune"


def test_a_run_folder_can_be_moved_with_its_inputs(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert finetune("eval", str(OUTPUT)).code == 0
    assert str(trained) not in "".join(
        path.read_text(errors="replace") for path in OUTPUT.rglob("*") if path.suffix in (".json", ".jsonl", ".yaml")
    )


def test_a_request_to_stop_that_comes_too_late_says_nothing() -> None:
    """A launcher asks the processes that are left to stop while they end: it hits them at any moment."""
    code = """
import os, signal
from finetune import cli
from finetune.errors import Interrupted

class Late:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)

def app(*arguments, **named):
    late = Late()  # freed with the traceback
    raise Interrupted("a process was lost", fix="go on")

cli.app = app
cli.main()
"""
    said = process(code)
    assert (said.returncode, said.stderr) == (6, "interrupted: a process was lost; go on\n")
