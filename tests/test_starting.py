"""Whole runs of the objectives of judged answers, and runs that begin from an adapter."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import prepare
from tests import runs

METHODS = ("dpo", "orpo", "simpo", "kto")


def rows_of(method: str, count: int, step: int) -> list[dict[str, Any]]:
    asked = [f"What is {n} and {n + step}?" for n in range(count)]
    if method == "kto":
        return [
            {"prompt": text, "completion": f"{2 * n + step}" if n % 2 else "who knows", "label": bool(n % 2)}
            for n, text in enumerate(asked)
        ]
    return [
        {"prompt": text, "chosen": f"{2 * n + step}", "rejected": f"{2 * n + step + 1} or so"}
        for n, text in enumerate(asked)
    ]


def furnish(method: str) -> tuple[str, ...]:
    """Data for a method in the working folder; what to override in the recipe."""
    runs.write_rows(Path("train.jsonl"), rows_of(method, 20, 1))
    runs.write_rows(Path("eval.jsonl"), rows_of(method, 6, 2))
    return f"objective.method={method}", "evaluate.metrics=[loss]"


def scores(folder: Path = runs.OUTPUT) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    return found


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_ends_with_the_same_bits(method: str) -> None:
    """Over an NF4 base, with dropout; every objective learns something on the way."""
    wanted = (*furnish(method), "adapter.lora_dropout=0.1", "evaluate.every=2")
    assert runs.train(*wanted, "output=runs/whole").code == 0
    assert runs.train(*wanted, options=("--until", "4")).code == 0
    assert runs.train(*wanted).code == 0
    assert runs.adapter_digest() == runs.adapter_digest(Path("runs/whole"))
    assert runs.curve() == runs.curve(Path("runs/whole"))
    figures = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
    one, two = runs.metrics(), runs.metrics(Path("runs/whole"))
    assert [[line.get(key) for key in figures] for line in one] == [[line.get(key) for key in figures] for line in two]
    assert ("kl" in one[0]) == (method == "kto")
    assert scores() == scores(Path("runs/whole"))
    before, after = scores()["before"], scores()["after"]
    assert after["loss"] < before["loss"]
    assert after["reward_margin"] > before["reward_margin"]
    if method in ("dpo", "kto"):
        assert (before["reward_accuracy"], before["reward_margin"]) == (0.5, 0.0)


@pytest.mark.usefixtures("work")
def test_a_dpo_run_goes_the_whole_road() -> None:
    wanted = (furnish("dpo")[0], "train.steps=12")
    assert runs.train(*wanted).code == 0
    said = runs.finetune("eval", str(runs.OUTPUT), "--json")
    assert said.code == 0, said.err
    found, stored = json.loads(said.out)["scores"], scores()
    assert (found["base"], found["adapter"]) == (stored["before"], stored["after"])
    said = runs.merge_run()
    assert said.code == 0, said.err
    merged = scores()["merged"]
    assert merged["loss"] == pytest.approx(stored["after"]["loss"], rel=0.05)  # against the same reference
    assert merged["reward_accuracy"] == stored["after"]["reward_accuracy"]
    for to, out in (("adapter", "plain"), ("huggingface", "model")):
        said = runs.finetune("export", str(runs.OUTPUT), "--to", to, "--out", out)
        assert said.code == 0, said.err
    said = runs.finetune("chat", str(runs.OUTPUT), stdin="What is 3 and 4?\n")
    assert said.code == 0, said.err
    page = (runs.OUTPUT / "report.html").read_text()
    for words in ("margin of the rewards", "rewards right", "preference accuracy", "reward margin", "rejected"):
        assert words in page


@pytest.mark.usefixtures("work")
def test_the_chosen_text_is_the_better_one() -> None:
    """From the file to the sample: one row, the better ending first."""
    prepared = prepare.prepare(Path("r.yaml"), furnish("dpo")[:1])
    assert prepared.samples is not None
    renderer = prepare.open_renderer(Path("r.yaml"), ())[1]
    sample = prepared.samples[3]
    chosen, rejected = (renderer.tokenizer.decode(half.ids) for half in sample.halves())
    assert "What is 3 and 4?" in chosen
    assert chosen.split("assistant")[-1].strip().startswith("7<|im_end|>")
    assert rejected.split("assistant")[-1].strip().startswith("8 or so<|im_end|>")
    assert [sum(half.supervised) for half in sample.halves()] == [2, 7]


@pytest.mark.usefixtures("work")
def test_the_plan_counts_pairs() -> None:
    said = runs.finetune("plan", "r.yaml", "--set", furnish("dpo")[0])
    assert "course     6 steps, 24 pairs, " in said.out
    assert "the reference is the base without adapter" in said.out
    said = runs.finetune("data", "show", "r.yaml", "--set", "objective.method=dpo", "--step", "1")
    assert "micro-batch 1 of 2: 2 pairs, " in said.out
    assert said.out.count("(chosen)") == said.out.count("(rejected)") == 4


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize(
    ("data", "method", "what", "mend"),
    [
        ("sft", "dpo", "shows an answer and judges none", "objective.method: sft"),
        ("sft", "kto", "shows an answer and judges none", "add label: true or false"),
        ("dpo", "sft", "ranks two answers", "objective.method: dpo, orpo, simpo or reward"),
        ("dpo", "kto", "ranks two answers", "write both endings as rows"),
        ("kto", "simpo", "says whether an answer is wanted", "objective.method: kto"),
        ("kto", "sft", "says whether an answer is wanted", "objective.method: kto"),
    ],
)
def test_rows_of_another_kind_are_refused(data: str, method: str, what: str, mend: str) -> None:
    if data != "sft":
        furnish(data)
    chosen = ("--set", f"objective.method={method}", "--set", "evaluate.metrics=[loss]")
    said = runs.finetune("plan", "r.yaml", *chosen)
    assert said.code == 3
    assert f"train.jsonl:1: this row {what}" in said.err
    assert mend in said.err.splitlines()[0]
    checked = runs.finetune("data", "check", "r.yaml", *chosen)
    assert checked.code == 3
    assert f"[{'ranked' if data != 'sft' else 'not_ranked'}]" in checked.out
    assert not Path("runs").exists()


@pytest.mark.usefixtures("work")
def test_a_pair_is_left_out_where_either_text_is_too_long() -> None:
    wanted = furnish("dpo")
    rows = rows_of("dpo", 8, 1)
    rows[2]["rejected"] = "no " * 200
    runs.write_rows(Path("train.jsonl"), rows)
    said = runs.train(*wanted)
    assert said.code == 3
    assert "train.jsonl:3: " in said.err
    assert "more than train.max_length 128" in said.err
    said = runs.train(*wanted, "data.over_length=drop")
    assert said.code == 0, said.err
    assert "1 rows of the training data are left out" in said.out


def supervised(output: str = "runs/first") -> None:
    assert runs.train(f"output={output}").code == 0


@pytest.mark.usefixtures("work")
def test_a_run_begins_from_another_one() -> None:
    """The reference of its pairs is what it begins from; it resumes to the same bits; a merge is of the whole."""
    supervised()
    wanted = (*furnish("dpo"), "adapter.start_from=runs/first")
    said = runs.train(*wanted, "output=runs/whole")
    assert said.code == 0, said.err
    assert "the reference is the adapter of runs/first" in said.out
    before = scores(Path("runs/whole"))["before"]
    assert (before["reward_accuracy"], before["reward_margin"]) == (0.5, 0.0)
    first = runs.metrics(Path("runs/whole"))[0]
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-9)
    assert runs.train(*wanted[:2], "output=runs/fresh", options=("--until", "1")).code == 0
    fresh = runs.metrics(Path("runs/fresh"))[0]
    assert abs(first["logps/chosen"] - fresh["logps/chosen"]) > 1  # what was learned is there
    assert runs.train(*wanted, options=("--until", "2")).code == 0
    assert runs.train(*wanted).code == 0
    assert runs.adapter_digest() == runs.adapter_digest(Path("runs/whole"))
    shutil.rmtree("runs/first")  # a finished run needs it no more
    assert runs.merge_run().code == 0
    assert runs.finetune("eval", str(runs.OUTPUT)).code == 0


@pytest.mark.usefixtures("work")
def test_supervised_training_goes_on_too() -> None:
    supervised()
    assert runs.train("adapter.start_from=runs/first/adapter", "train.learning_rate=1e-12").code == 0
    first, second = scores(Path("runs/first")), scores()
    assert second["before"]["loss"] == pytest.approx(first["after"]["loss"], rel=1e-6)
    assert second["after"]["loss"] == pytest.approx(first["after"]["loss"], rel=1e-6)


@pytest.mark.usefixtures("work")
def test_what_one_cannot_begin_from() -> None:
    supervised()
    cases = {
        ("adapter.start_from=runs/none",): (2, "there is no runs/none; name the folder of a finished run"),
        ("adapter.start_from=runs/first", "adapter.r=8"): (2, "adapter.r: the adapter to begin from has 4, this"),
        ("adapter.start_from=runs/first", "adapter.use_rslora=true"): (2, "adapter.use_rslora: the adapter to begin"),
        ("adapter.start_from=runs/first", "adapter.target_modules=[q_proj]"): (2, "adapter.target_modules: the ad"),
        ("adapter.start_from=runs/one",): (2, "is the run's own output"),
    }
    for overrides, (code, words) in cases.items():
        said = runs.train(*overrides)
        assert said.code == code
        assert words in said.err
        assert "loading" not in said.out
        assert not runs.OUTPUT.exists()


@pytest.mark.usefixtures("work")
def test_a_plan_sees_another_base_by_its_small_files() -> None:
    supervised()
    assert runs.finetune("plan", "r.yaml", "--set", "adapter.start_from=runs/first").code == 0
    with Path("base/config.json").open("a") as config:
        config.write("\n")
    said = runs.finetune("plan", "r.yaml", "--set", "adapter.start_from=runs/first")
    assert said.code == 4
    assert "this adapter was trained on another base" in said.err


@pytest.mark.usefixtures("work")
def test_another_base_and_another_adapter_are_refused() -> None:
    supervised()
    note = Path("runs/first/adapter/finetune.json")
    made = json.loads(note.read_text())
    assert runs.train("adapter.start_from=runs/first", options=("--until", "2")).code == 0
    moved = Path("elsewhere")
    shutil.copytree("runs/first/adapter", moved)
    assert runs.train(f"adapter.start_from={moved}", options=("--until", "3")).code == 0  # the same adapter
    runs.awake(moved)
    said = runs.train(f"adapter.start_from={moved}")
    assert said.code == 4
    assert "adapter_model.safetensors: this file is not the one that the run began with" in said.err
    made["base_sha256"] = dict.fromkeys(made["base_sha256"], "0" * 64)
    (moved / "finetune.json").write_text(json.dumps(made))
    (moved / "manifest.json").unlink()
    said = runs.train(f"adapter.start_from={moved}", "output=runs/two")
    assert said.code == 4
    assert "was trained on another base" in said.err
    assert "loading" not in said.out
    assert not Path("runs/two").exists()


@pytest.mark.usefixtures("work")
def test_an_unfinished_or_damaged_one_is_refused() -> None:
    assert runs.train("output=runs/first", options=("--until", "2")).code == 0
    said = runs.train("adapter.start_from=runs/first")
    assert (said.code, "this run is not finished" in said.err) == (4, True)
    supervised()
    with Path("runs/first/adapter/adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\7")
    said = runs.train("adapter.start_from=runs/first")
    assert said.code == 4
    assert not runs.OUTPUT.exists()


def header_free(card: str) -> str:
    return card.split("---", 2)[2]


def loaded(folder: Path, adapter: Path | None = None) -> torch.nn.Module:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter) if adapter is not None else model


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_what_it_learned_is_published_whole(method: str) -> None:
    """Begun from a supervised run: the exported adapter, the release's two parts and the run are one model."""
    assert runs.train("output=runs/sft", "evaluate.metrics=[loss]", "quantize.weights=fp32").code == 0
    wanted = (*furnish(method), "adapter.start_from=runs/sft", "quantize.weights=fp32")
    assert runs.train(*wanted).code == 0
    shutil.rmtree("runs/sft")  # a finished run needs it no more
    said = runs.finetune("export", str(runs.OUTPUT), "--to", "adapter", "--target", "vllm", "--out", "plain")
    assert said.code == 0, said.err
    Path("base/LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    more = ("--what", "both", "--data-licence", "cc0-1.0")
    said = runs.finetune("release", str(runs.OUTPUT), "--out", "published", *more)
    assert said.code == 0, said.err
    assert runs.finetune("verify", "published").code == 0
    ids = torch.arange(40)[None] * 7 % 256
    with torch.no_grad():
        ways = [loaded(Path("base"), Path("plain")), loaded(Path("base"), Path("published/adapter"))]
        ways += [loaded(Path("published"))]
        logits = [model(input_ids=ids).logits for model in ways]
        bare = loaded(Path("base"))(input_ids=ids).logits
    assert float((logits[0] - logits[1]).abs().max()) <= 1e-6
    learned = float((logits[0] - bare).norm())
    assert learned > 1
    assert float((logits[0] - logits[2]).norm()) < 0.2 * learned  # the merged weights are rounded to bf16
    card = header_free(Path("published/README.md").read_text())
    assert f"by the objective `{method}`" in card
    begun = json.loads(Path("published/manifest.json").read_text())["provenance"]["begun_from"]
    assert begun["adapter_model.safetensors"][:16] in card
    for name, value in scores()["after"].items():
        if name.endswith(("accuracy", "margin")):
            assert re.search(rf"\| {name.replace('_', ' ')} \|.*{value:.3f}", card), name
