"""Whole runs of the objective that samples: rewards rise, kills in the middle of a step, plans, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import runs

GRPO = (
    "objective={method: grpo, rewards: [{metric: regex, regex: '[0-4]', weight: 1.0}, {metric: exact_match}], "
    "completions: 6, max_new_tokens: 5, batch_rows: 9}",
    "evaluate.metrics=[exact_match, regex]", "evaluate.regex='[0-9]'", "adapter.lora_dropout=0.1",
)  # fmt: skip
KILLED = """
import os, sys
from finetune import cli, loop, model
from finetune.objectives import grpo
where, count = sys.argv[1], int(sys.argv[2])
name, of = {"generation": ("generate", model.Policy), "update": ("loss", grpo.Grpo)}[where]
whole = getattr(of, name)
done = 0
def watched(*given, **more):
    global done
    done += 1
    if done > count:
        os.kill(os.getpid(), 9)
    return whole(*given, **more)
setattr(of, name, watched)
sys.exit(cli.main_in_process(sys.argv[3:]))
"""


def words(*overrides: str) -> list[str]:
    return ["train", "r.yaml", *(part for override in overrides for part in ("--set", override))]


@pytest.mark.usefixtures("work")
def test_a_run_killed_while_it_samples_and_while_it_updates_ends_with_the_same_bits() -> None:
    wanted = (*GRPO, "objective.iterations=2", "objective.beta=0.05", "train.save_every=2", "train.learning_rate=0.02")
    said = runs.train(*wanted, "output=runs/whole")
    assert said.code == 0, said.err
    calls = {"generation": 14, "update": 9}  # in the third or fourth of six steps, and not at its first call
    for where, count in calls.items():
        killed = runs.process(KILLED, where, str(count), *words(*wanted))
        assert killed.returncode == -9, killed.stderr
        assert not (runs.OUTPUT / "finished.json").exists()
    assert runs.metrics()[-1]["step"] >= 2
    assert runs.train(*wanted).code == 0
    assert runs.adapter_digest() == runs.adapter_digest(Path("runs/whole"))
    assert runs.curve() == runs.curve(Path("runs/whole"))
    figures = ("reward", "reward_std", "rewards/regex/mean", "completions/mean_length", "kl", "clip_ratio/region_mean")
    one, two = runs.metrics(), runs.metrics(Path("runs/whole"))
    assert [[line[key] for key in figures] for line in one] == [[line[key] for key in figures] for line in two]
    assert any(line["clip_ratio/region_mean"] > 0 for line in one)
    assert (runs.OUTPUT / "scores.json").read_text() == Path("runs/whole/scores.json").read_text()


@pytest.mark.usefixtures("work")
def test_what_is_rewarded_comes_more_often() -> None:
    said = runs.train(*GRPO, "train.steps=30", "train.learning_rate=0.02")
    assert said.code == 0, said.err
    lines = runs.metrics()
    begun, ended = (sum(line["rewards/regex/mean"] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    assert ended > begun + 0.3
    scores = json.loads((runs.OUTPUT / "scores.json").read_text())
    assert scores["after"]["regex"] > scores["before"]["regex"]
    answers = [json.loads(line) for line in (runs.OUTPUT / "samples.jsonl").read_text().splitlines()]
    assert {"before", "after", "expected"} <= set(answers[0])
    page = (runs.OUTPUT / "report.html").read_text()
    for title in ("reward", "rewards", "groups whose answers earn the same", "tokens of an answer"):
        assert f"<figcaption>{title}</figcaption>" in page
    assert "KL from the reference" not in page


@pytest.mark.usefixtures("work")
def test_it_goes_the_whole_road_from_an_adapter() -> None:
    assert runs.train("output=runs/first").code == 0
    said = runs.train(*GRPO[:3], "objective.beta=0.1", "adapter.start_from=runs/first", "train.steps=2")
    assert said.code == 0, said.err
    assert "the reference is the adapter of runs/first" in said.out
    assert runs.metrics()[0]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert runs.merge_run().code == 0
    assert runs.finetune("eval", str(runs.OUTPUT)).code == 0


CHECK = """
import json, sys
row = json.load(sys.stdin)
sys.exit(row["completion"].strip() != row["reference"] or not row["prompt"].startswith("What is"))
"""


@pytest.mark.usefixtures("work")
def test_a_unit_test_as_metric_and_as_reward() -> None:
    Path("check.py").write_text(CHECK)
    test = f"{{command: ['{sys.executable}', check.py], seconds: 20, processes: 8}}"
    wanted = (
        f"objective={{method: grpo, rewards: [{{metric: unit_test, unit_test: {test}}}], completions: 2}}",
        "objective.max_new_tokens=3",
        "evaluate.metrics=[unit_test]", f"evaluate.unit_test={test}", "train.steps=1", "train.examples_per_step=2",
    )  # fmt: skip
    said = runs.train(*wanted)
    assert said.code == 0, said.err
    assert "unit_test gives the rows' own answers 1.00 (the first 4)" in said.out
    assert runs.metrics()[0]["rewards/unit_test/mean"] == 0.0
    assert json.loads((runs.OUTPUT / "scores.json").read_text())["after"]["unit_test"] == 0.0
    assert "check.py" in json.loads((runs.OUTPUT / "identity.json").read_text())["data"]
    Path("check.py").write_text(CHECK + "\n")
    said = runs.train(*wanted)
    assert said.code == 3
    assert "check.py: this file is not the one that the run began with" in said.err
    Path("check.py").write_text("raise SystemExit(1)")
    said = runs.finetune("plan", "r.yaml", *(part for one in wanted for part in ("--set", one)))
    assert "unit_test gives the rows' own answers 0.00 (the first 4)" in said.out


@pytest.mark.usefixtures("work")
def test_the_plan_counts_what_is_sampled() -> None:
    def plan(*overrides: str) -> dict[str, Any]:
        said = runs.finetune("plan", "r.yaml", "--json", *(part for one in overrides for part in ("--set", one)))
        assert said.code == 0, said.err
        found: dict[str, Any] = json.loads(said.out)
        return found

    plain, once, twice = plan(), plan(*GRPO), plan(*GRPO, "objective.completions=12")
    assert (once["samples"], once["counted"]) == (24, "prompts")
    assert once["supervised_tokens"] == 24 * 6 * 5
    assert twice["tokens"] == 2 * once["tokens"]
    assert twice["seconds"] > once["seconds"] > plain["seconds"]
    more = plan(*GRPO, "objective.iterations=3", "objective.beta=0.1")
    assert more["seconds"] > once["seconds"]
    assert plan(*GRPO, "objective.batch_rows=24")["budget"]["generation"] > once["budget"]["generation"]
    assert any("1 × regex + 1 × exact_match; 6 answers to each prompt, 9 at once" in note for note in once["notes"])
    assert any("no reference policy" in note for note in once["notes"])
    assert any("the reference is the base without adapter" in note for note in more["notes"])


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize(
    ("overrides", "options", "what"),
    [
        (("objective.max_new_tokens=110",), (), "has 46 tokens: no room for so many in train.max_length"),
        ((), ("--processes", "2"), "grpo samples and judges its answers in one process"),
    ],
)
def test_what_is_refused(overrides: tuple[str, ...], options: tuple[str, ...], what: str) -> None:
    sets = [part for one in (*GRPO, *overrides) for part in ("--set", one)]
    for verb in ("plan", "train"):
        said = runs.finetune(verb, "r.yaml", *options, *sets)
        assert said.code == 2, said.err
        assert what in said.err
        assert "loading" not in said.out
        assert not Path("runs").exists()


@pytest.mark.usefixtures("work")
def test_a_probe_and_several_adapters_are_refused() -> None:
    Path("r.yaml").write_text(runs.RECIPE + "adapters: [{name: a, adapter: {r: 2}}, {name: b, adapter: {r: 4}}]\n")
    said = runs.train(*GRPO)
    assert said.code == 2
    assert "by sft alone, not by grpo" in said.err
    Path("r.yaml").write_text(runs.RECIPE)
    said = runs.finetune("plan", "r.yaml", "--probe", *(part for one in GRPO for part in ("--set", one)))
    assert said.code == 2
    assert "it must first sample" in said.err
