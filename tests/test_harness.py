"""Tasks of lm-evaluation-harness on the live model. Skipped, and said, where the extra ``eval`` is not installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.runs import OUTPUT, finetune

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not INSTALLED, reason='needs lm-eval: pip install "finetune-qwen[eval]"')
PARITY = """\
task: parity
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/parity.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "Is {{n}} even? Answer:"
doc_to_target: label
doc_to_choice: [" yes", " no"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
SUMS = """\
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: tasks/sums.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def tasks(finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    runs.awake(OUTPUT / "adapter")
    folder = finished / "tasks"
    folder.mkdir()
    (folder / "parity.yaml").write_text(PARITY)
    (folder / "sums.yaml").write_text(SUMS)
    runs.write_rows(folder / "parity.jsonl", [{"n": n, "label": n % 2} for n in range(24)])
    return folder


def likelier(policy: Any, prompt: str, options: tuple[str, ...]) -> int:
    """By transformers alone: the option whose tokens are the most likely after the prompt."""
    import torch

    costs = []
    begin = policy.tokenizer.encode(prompt, add_special_tokens=False)
    for option in options:
        ids = policy.tokenizer.encode(prompt + option, add_special_tokens=False)
        logits = policy.causal_lm(torch.tensor([ids])).logits[0].log_softmax(-1)
        costs.append(-sum(float(logits[at - 1, ids[at]]) for at in range(len(begin), len(ids))))
    return costs.index(min(costs))


@needs_lm_eval
@pytest.mark.filterwarnings("default")
def test_base_and_adapter_are_judged_as_they_are_in_memory(tasks: Path) -> None:
    from finetune import finished, generation
    from finetune.terminal import Terminal

    prepared, files = finished.open_run(OUTPUT, Terminal(silent=True))
    _, policy = finished.live(prepared, files, Terminal(silent=True))
    share = {}
    asked = [f"Is {n} even? Answer:" for n in range(24)]
    generated: dict[str, list[str]] = {}
    for name, adapter in (("base", False), ("adapter", True)):
        with policy.evaluating(adapter=adapter):
            share[name] = sum(likelier(policy, text, (" yes", " no")) == n % 2 for n, text in enumerate(asked)) / 24
            prompts = [policy.tokenizer.encode(text, add_special_tokens=False) for text in ("ab", "What is 3?")]
            generated[name] = [generation.text(policy, policy.generate([one], 4)[0]) for one in prompts]
    # The adapter's own greedy texts are the right answers of the second task: it knows them, the base does not.
    runs.write_rows(tasks / "sums.jsonl", [
        {"q": q, "a": a.split("\n")[0]} for q, a in zip(("ab", "What is 3?"), generated["adapter"], strict=True)
    ])  # fmt: skip
    said = finetune("eval", str(OUTPUT), "--tasks", "parity,sums", "--task-path", "tasks", "--json", "--quiet")
    assert said.code == 0, said.err
    found = json.loads(said.out)["tasks"]
    assert {name: numbers["acc"] for name, numbers in found["parity"].items()} == pytest.approx(share)
    assert found["sums"]["adapter"]["exact_match"] == 1
    assert found["sums"]["base"]["exact_match"] < 1
    assert json.loads((OUTPUT / "evaluation.json").read_text())["tasks"] == found
    again = json.loads(
        finetune("eval", str(OUTPUT), "--tasks", "parity", "--task-path", "tasks", "--json", "--quiet").out
    )
    assert again["tasks"]["parity"] == found["parity"]
    runs.write_rows(tasks / "parity.jsonl", [{"n": n, "label": 1 - n % 2} for n in range(24)])
    turned = finetune("eval", str(OUTPUT), "--tasks", "parity", "--task-path", "tasks", "--json", "--quiet")
    other = json.loads(turned.out)["tasks"]["parity"]
    assert other["base"]["acc"] == pytest.approx(1 - share["base"])  # other rows are another question


@needs_lm_eval
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("parit", "--task-path", "tasks"), "there is no task 'parit'; one of parity"),
        (("parity", "--task-path", "nowhere"), "this is not a folder"),
        (("sums", "--task-path", "tasks"), "lm-eval cannot do this: FileNotFoundError"),
    ],
)
def test_tasks_that_are_not_there(tasks: Path, words: tuple[str, ...], said: str) -> None:
    found = finetune("eval", "base", "--tasks", *words)
    assert (found.code, said in found.err) == (5, True), found.err
    assert len(found.err.splitlines()) == 1


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_the_package_the_extra_is_named(tasks: Path) -> None:
    said = finetune("eval", str(OUTPUT), "--tasks", "parity", "--task-path", "tasks")
    assert said.code == 5
    assert 'pip install "finetune-qwen[eval]"' in said.err
    assert not (OUTPUT / "evaluation.json").exists()
