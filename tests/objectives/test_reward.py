"""The reward model: its loss is TRL's and its gradient the plain formula's, its files are what plain transformers and
PEFT load, and what needs words is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune import base as bases
from finetune import loop, model, objectives, prepare, proof
from finetune.budget import Pass, passing_bytes
from finetune.dataset import Example
from finetune.loading import BaseForm
from finetune.model import Policy
from finetune.objectives import Pairs, reward
from finetune.renderer import Renderer
from finetune.tokenizer import load_tokenizer
from tests import qwen1, runs, tiny
from tests.objectives import rows

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"margin": 0.0, "centre_rewards_coefficient": 0.0},
    "margin": {"margin": 0.4, "centre_rewards_coefficient": 0.0},
    "centred": {"margin": 0.4, "centre_rewards_coefficient": 0.1},
}
CUTS = (10_000, 1, 70, 45)
HEAD = "base_model.model.score.weight"
Build = Callable[..., Path]


def make(kind: str = "plain") -> reward.Reward:
    made = objectives.get("reward", SETTINGS[kind])
    assert isinstance(made, reward.Reward)
    return made


def awake(policy: Policy) -> Policy:
    """The adapter with values in all of it, the head too."""
    adapted = tiny.adapt(policy)
    with torch.no_grad():
        for name, value in adapted.trainable().items():
            if ".score." in name:
                value.copy_(torch.randn(value.shape, generator=torch.Generator().manual_seed(5)) * 0.2)
    return adapted


def load(folder: Path, weights: str = "fp32") -> Policy:
    form = BaseForm(weights=weights, double=True, compute="fp32", device="cpu")
    return model.load_base(bases.as_scorer(bases.inspect(folder)), form)


def exact(folder: Path) -> Policy:
    """The base with a head of zeros, wholly in fp64, by transformers' own class."""
    from transformers import AutoModelForSequenceClassification

    found = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float64, attn_implementation="sdpa"
    )
    for name, module in list(found.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight, norm.variance_epsilon = module.weight, module.variance_epsilon
            found.set_submodule(name, norm)
    found.requires_grad_(False)
    found.score.weight.zero_()
    tokenizer, stop = load_tokenizer(folder), bases.inspect(folder).stop_token
    return Policy(model=found, tokenizer=tokenizer, renderer=Renderer(tokenizer, stop), stop_token=stop, adapted=False)


@pytest.fixture(scope="module")
def policies(tiny_base: Path) -> dict[str, Policy]:
    return {"fp32": awake(load(tiny_base)), "fp64": awake(exact(tiny_base))}


def padded(classifier: Any, texts: Sequence[Example]) -> torch.Tensor:
    """Each text's reward by the library's own forward: rows padded to one width. [texts]"""
    pad, width = int(classifier.config.pad_token_id), max(len(text.ids) for text in texts)
    ids = torch.tensor([[*text.ids, *[pad] * (width - len(text.ids))] for text in texts])
    mask = torch.tensor([[1] * len(text.ids) + [0] * (width - len(text.ids)) for text in texts])
    found: torch.Tensor = classifier(ids, attention_mask=mask).logits[:, 0]
    return found


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("fp64", 1e-10)])
def test_every_cut_gives_the_gradient_of_padded_rows(
    policies: dict[str, Policy], kind: str, precision: str, bound: float
) -> None:
    policy, examples, objective = policies[precision], rows.drawn("dpo sigmoid", seed=3), make(kind)
    found = padded(policy.causal_lm, objective.texts(examples)).double().view(-1, 2)
    # By its definition, written anew: Ouyang et al. 2022, equation 1, with Touvron et al.'s margin.
    odds = torch.sigmoid(found[:, 0] - found[:, 1] - objective.margin)
    expected = (-odds.log() + objective.centre_rewards_coefficient * (found[:, 0] + found[:, 1]) ** 2).mean()
    expected.backward()
    gradient = tiny.flat({name: value.grad.clone() for name, value in policy.trainable().items()})
    assert any(".score." in name and value.grad.abs().sum() > 0 for name, value in policy.trainable().items())
    policy.model.zero_grad(set_to_none=True)
    seen = []
    for limit in CUTS:
        recorder = tiny.Recorder(policy)
        plan = tiny.course([[3, 6, 0, 5, 1, 4, 2]], micro_batch_tokens=limit, max_grad_norm=math.inf)
        (event,) = loop.run(policy, objective, examples, plan, recorder)
        assert event.loss == pytest.approx(expected.item(), rel=bound)
        assert tiny.distance(tiny.flat(recorder.gradients[0]), gradient) < bound
        assert set(event.figures) == {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
        seen.append(event.figures)
    for figures in seen:
        assert figures == pytest.approx(seen[0], rel=100 * bound)
        assert figures["rewards/margins"] == pytest.approx((found[:, 0] - found[:, 1]).mean().item(), rel=100 * bound)


def test_kernels_off_is_the_same(tiny_base: Path) -> None:
    seen = []
    for kernels in (True, False):
        policy = replace(awake(load(tiny_base)), kernels=kernels)
        plan = tiny.course([range(7)])
        (event,) = loop.run(policy, make(), rows.drawn("dpo sigmoid"), plan, tiny.Recorder(policy))
        seen.append((event.loss, event.grad_norm))
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


@pytest.mark.parametrize("form", ["fp32", "nf4"])
def test_a_fresh_head_tells_no_pair_apart(tiny_base: Path, form: str) -> None:
    policy = tiny.adapt(load(tiny_base, form), wake=False)
    plan = tiny.course([range(7)] * 16, peak_rate=0.01)
    events = list(loop.run(policy, make(), rows.drawn("dpo sigmoid"), plan, tiny.adamw(policy)))
    assert events[0].loss == pytest.approx(math.log(2), rel=1e-12)
    assert events[0].figures["rewards/accuracies"] == 0.5
    assert events[-1].loss < 0.3
    assert events[-1].figures["rewards/accuracies"] == 1.0
    (batch,) = make().batches(rows.drawn("dpo sigmoid"), 10_000)
    with policy.evaluating(adapter=False):
        assert not reward.rewards(policy, batch).any()  # what the head began with is still there, below the adapter


def test_rewards_are_read_in_fp32_from_a_bf16_base(tiny_base: Path) -> None:
    form = BaseForm(weights="bf16", double=True, compute="bf16", device="cpu")
    policy = awake(model.load_base(bases.as_scorer(bases.inspect(tiny_base)), form))
    (batch,) = make().batches(rows.drawn("dpo sigmoid"), 10_000)
    with policy.evaluating():
        found = reward.rewards(policy, batch).float()
    assert not torch.equal(found, found.bfloat16().float())


@pytest.fixture(scope="module")
def peer(build_tiny: Build, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """The model that TRL was given: base, adapter and head."""
    made = tiny.adapt(load(build_tiny(tmp_path_factory.mktemp("peer") / "base")), wake=False)
    rows.script().wake(made.model)
    return made


@pytest.mark.parametrize("kind", SETTINGS)
def test_loss_and_gradient_are_trls(kind: str, peer: Policy) -> None:
    expected = rows.TRL["reward"][kind]
    peer.model.train()
    (batch,) = make(kind).batches(rows.of_trl("dpo sigmoid"), 10_000)
    result = make(kind).loss(peer, batch)
    (result.total / result.count).backward()
    norm = tiny.flat({name: value.grad for name, value in peer.trainable().items()}).double().norm()
    peer.model.zero_grad(set_to_none=True)
    assert result.total.item() / result.count == pytest.approx(expected["loss"], rel=1e-5)
    assert float(norm) == pytest.approx(expected["gradient"], rel=1e-4)
    told = {name.rpartition("/")[2]: total / of for name, (total, of) in result.tallies.items()}
    assert told["accuracies"] == pytest.approx(expected["accuracy"])
    assert told["chosen"] - told["rejected"] == pytest.approx(expected["margin"], rel=1e-4)
    assert (told["chosen"] + told["rejected"]) / 2 == pytest.approx(expected["mean_reward"], rel=1e-4)


def test_a_comparison_of_rewards_counts_in_units_of_their_spread() -> None:
    live = torch.tensor([[-2.0], [0.0], [1.0], [3.0]])
    assert proof.compare(live, live, 1e-3).to_dict()["apart"] == 0
    near = proof.compare(live, live + 0.01, 1e-3)
    assert near.holds
    assert near.apart == pytest.approx(0.01, rel=1e-4)
    assert near.mean_kl == pytest.approx((0.01 / float(live.std())) ** 2 / 2, rel=1e-4)
    assert not proof.compare(live, live + 0.2, 1e-3).holds
    assert not proof.compare(live, live * math.nan, 1e-3).holds
    assert proof.loss(live, ()) == pytest.approx((math.log1p(math.exp(2)) + math.log1p(math.exp(2))) / 2)


# Whole runs.

PAIRS = ("objective.method=reward", "evaluate.metrics=[loss]")


def furnish() -> None:
    for name, count, step in (("train", 20, 1), ("eval", 6, 2)):
        pairs = [
            {"prompt": f"What is {n} and {n + step}?", "chosen": f"{2 * n + step}", "rejected": f"{2 * n} or so"}
            for n in range(count)
        ]
        runs.write_rows(Path(f"{name}.jsonl"), pairs)


def scores(folder: Path = runs.OUTPUT) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "scores.json").read_text())
    return found


def texts() -> list[Example]:
    """The held-out texts, as the run read them."""
    held_out = prepare.prepare(Path("r.yaml"), PAIRS).held_out
    assert held_out is not None
    return make().texts(held_out.examples)


def plain(folder: Path, adapter: Path | None = None, **more: Any) -> Any:
    """What plain transformers, and PEFT, make of a folder."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    found = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, **more)
    return (PeftModel.from_pretrained(found, str(adapter)) if adapter else found).eval()


def predicted(subject: str, data: str = "eval.jsonl") -> list[Any]:
    out = Path(f"{Path(subject).name}-{data}")
    said = runs.finetune("predict", subject, data, "--out", str(out), "--batch-rows", "2")
    assert said.code == 0, said.err
    return [json.loads(line)["reward"] for line in out.read_text().splitlines()]


@pytest.mark.usefixtures("work")
def test_an_interrupted_run_ends_with_the_same_bits_head_and_moments_too() -> None:
    furnish()
    wanted = (*PAIRS, "adapter.lora_dropout=0.1", "evaluate.every=2")
    assert runs.train(*wanted, "output=runs/whole").code == 0
    assert runs.train(*wanted, options=("--until", "4")).code == 0
    assert runs.train(*wanted).code == 0
    one, two = runs.OUTPUT, Path("runs/whole")
    assert runs.adapter_digest(one) == runs.adapter_digest(two)
    assert runs.curve(one) == runs.curve(two)
    assert scores(one) == scores(two)
    (first, second) = (load_file(at / "checkpoints" / "step-00000006" / "optimizer.safetensors") for at in (one, two))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {name.rpartition("|")[2] for name in first if ".score." in name} >= {"exp_avg", "exp_avg_sq"}
    assert load_file(one / "adapter" / "adapter_model.safetensors")[HEAD].abs().sum() > 0
    before, after = scores()["before"], scores()["after"]
    assert before["loss"] == pytest.approx(math.log(2))
    assert (before["reward_accuracy"], before["reward_margin"]) == (0.5, 0.0)
    assert after["loss"] < before["loss"]
    assert "preference_accuracy" not in after


def stop_token_pads(folder: Path) -> None:
    """As SmolLM2's folder has it: the token that ends a turn is the one that pads."""
    for name, key, value in (
        ("tokenizer_config.json", "pad_token", "<|im_end|>"),
        ("config.json", "pad_token_id", 292),
    ):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("kind", ["qwen2", "llama tied", "pads with the stop token", "original"])
def test_plain_libraries_give_the_same_rewards(kind: str, build_tiny: Build) -> None:
    """The adapter on its base, and the merge alone, padded batch and all; from an fp32 base, so that nothing rounds."""
    furnish()
    if kind == "original":
        shutil.rmtree("base")
        qwen1.build(Path("base"), build_tiny, dtype="float32")
    elif kind != "qwen2":
        shutil.rmtree("base")
        more = {"family": "llama", "tie_word_embeddings": True} if kind == "llama tied" else {}
        build_tiny(Path("base"), dtype="float32", **more)
    if kind == "pads with the stop token":
        stop_token_pads(Path("base"))
    assert runs.train(*PAIRS, "quantize.weights=fp32", "train.learning_rate=0.02").code == 0
    said = runs.merge_run()
    assert said.code == 0, said.err
    live = torch.tensor([value for row in predicted(str(runs.OUTPUT)) for value in row.values()])
    assert live.std() > 0.05
    made = json.loads((runs.OUTPUT / "adapter" / "finetune.json").read_text())
    config = json.loads((runs.OUTPUT / "adapter" / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    with torch.no_grad():
        merged = plain(runs.MERGED)
        assert merged.config.num_labels == 1
        assert merged.config.pad_token_id == made["pad_token_id"] != texts()[0].ids[-1]
        assert load_tokenizer(runs.MERGED).pad_token_id == made["pad_token_id"]
        bound = 2e-2 if kind == "qwen2" else 1e-4  # the tiny base is stored in bf16, and so is its merge
        assert torch.allclose(padded(merged, texts()), live, atol=bound)
        if kind != "original":  # which plain transformers does not read
            adapted = plain(Path("base"), runs.OUTPUT / "adapter", num_labels=1, pad_token_id=made["pad_token_id"])
            assert torch.allclose(padded(adapted, texts()), live, atol=1e-5)
    stored = load_file(runs.MERGED / "model.safetensors") if (runs.MERGED / "model.safetensors").is_file() else {}
    assert "lm_head.weight" not in stored
    assert scores()["merged"]["reward_accuracy"] == scores()["after"]["reward_accuracy"]


@pytest.mark.usefixtures("work")
def test_a_reward_run_goes_the_whole_road() -> None:
    """Over NF4: judged, merged, compared, its rows scored, the merge judged alone and learned from again."""
    furnish()
    assert runs.train(*PAIRS, "train.learning_rate=0.02").code == 0
    run, merged = str(runs.OUTPUT), str(runs.MERGED)
    said = runs.merge_run()
    assert said.code == 0, said.err
    assert "rewards differ by" in said.err + said.out
    note = json.loads((runs.MERGED / "finetune.json").read_text())["proof"]
    assert note["holds"]
    assert 0 < note["apart"] < 0.1
    said = runs.finetune("eval", run, "--merged", merged, "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)["scores"]
    assert [found[name]["reward_accuracy"] for name in ("base", "adapter", "merged")] == [
        scores()[name]["reward_accuracy"] for name in ("before", "after", "merged")
    ]
    said = runs.finetune("eval", merged, "--data", "eval.jsonl", "--json")
    assert json.loads(said.out)["scores"]["model"]["reward_accuracy"] == found["merged"]["reward_accuracy"]
    said = runs.finetune("prove", run, merged, "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["apart"] == pytest.approx(note["apart"], rel=0.5)
    said = runs.train(*PAIRS, "model=merged", "output=runs/further")
    assert said.code == 0, said.err
    assert scores(Path("runs/further"))["before"]["loss"] == pytest.approx(found["merged"]["loss"], rel=0.05)
    page = (runs.OUTPUT / "report.html").read_text()
    for words in ("margin of the rewards", "rewards right", "reward margin"):
        assert words in page


@pytest.mark.usefixtures("work")
def test_predict_scores_rows_of_any_format_and_goes_on_to_the_same_bytes() -> None:
    furnish()
    assert runs.train(*PAIRS, "train.learning_rate=0.02").code == 0
    run = str(runs.OUTPUT)
    pairs = predicted(run)
    held = [json.loads(line) for line in Path("eval.jsonl").read_text().splitlines()]
    better = sum(row["chosen"] > row["rejected"] for row in pairs) / len(pairs)
    assert better == pytest.approx(scores()["after"]["reward_accuracy"])
    single = [{"messages": runs.chat(row["prompt"], row["chosen"])["messages"]} for row in held]
    runs.write_rows(Path("single.jsonl"), single)
    assert predicted(run, "single.jsonl") == pytest.approx([row["chosen"] for row in pairs], abs=1e-5)
    whole = Path("one-single.jsonl").read_bytes()
    facts = json.loads(Path("one-single.jsonl.facts.json").read_text())
    lines = [{"key": facts["key"]}, {"batch": 0, "answers": predicted(run, "single.jsonl")[:2], "cut": 0}]
    part = Path("one-single.jsonl.part")
    for name in ("one-single.jsonl", "one-single.jsonl.facts.json"):
        Path(name).unlink()
    part.write_text(json.dumps(lines[0]) + "\n" + json.dumps(lines[1])[:-9])  # torn in its second line
    predicted(run, "single.jsonl")
    assert Path("one-single.jsonl").read_bytes() == whole
    runs.write_rows(Path("asked.jsonl"), [{"prompt": "What is 3 and 4?"}])
    said = runs.finetune("predict", run, "asked.jsonl", "--out", "x.jsonl")
    assert said.code == 3
    assert "asked.jsonl:1" in said.err


@pytest.mark.usefixtures("work")
def test_what_needs_words_is_refused() -> None:
    furnish()
    assert runs.train(*PAIRS, "train.steps=2").code == 0
    assert runs.merge_run().code == 0
    run, merged = str(runs.OUTPUT), str(runs.MERGED)
    refused: dict[str, tuple[str, ...]] = {
        "a conversation": ("chat", run, "--prompt", "hi"),
        "a conversation ": ("chat", merged, "--serve"),
        "a GGUF file": ("export", run, "--to", "gguf", "--out", "x.gguf"),
        "a GGUF file ": ("export", merged, "--to", "gguf", "--out", "x.gguf"),
        "Ollama": ("export", run, "--to", "ollama", "--out", "x"),
        "a task of lm-eval": ("eval", run, "--tasks", "any"),
        "the metric contains": ("eval", merged, "--data", "eval.jsonl", "--set", "evaluate.metrics=[contains]"),
        "vllm cannot load modules_to_save": ("export", run, "--to", "adapter", "--target", "vllm", "--out", "x"),
        "no place for a score head": ("merge", run, "--layout", "original", "--out", "x"),
        "one of them is a reward model": ("prove", run, "base"),
        "which dpo cannot train": ("plan", "r.yaml", "--set", "model=merged", "--set", "objective.method=dpo"),
        "draws nothing": ("predict", run, "eval.jsonl", "--out", "x", "--temperature", "1"),
        "base has no score head": ("predict", run, "eval.jsonl", "--out", "x", "--base"),
    }
    for what, words in refused.items():
        said = runs.finetune(*words)
        assert said.code in (2, 4), f"{words}: {said.err}"
        assert what.strip() in said.err
        assert "Traceback" not in said.err
        assert not Path("x").exists()
    runs.write_rows(Path("chat.jsonl"), [runs.chat("What is 1 and 2?", "3")])
    said = runs.finetune("eval", merged, "--data", "chat.jsonl")
    assert said.code == 3
    assert "chat.jsonl:1" in said.err


@pytest.mark.usefixtures("work")
def test_the_plan_counts_the_head() -> None:
    furnish()
    seen = {}
    for method in ("simpo", "reward"):
        found = prepare.prepare(Path("r.yaml"), (f"objective.method={method}", *PAIRS[1:]))
        seen[method] = found
        assert isinstance(found.objective, Pairs)
    hidden, vocabulary = seen["simpo"].shape.hidden, seen["simpo"].shape.vocab
    simpo, scored = seen["simpo"].plan, seen["reward"].plan
    assert scored.trainable == simpo.trainable + hidden
    assert scored.budget.adapter == simpo.budget.adapter + 4 * hidden
    assert scored.budget.optimizer >= simpo.budget.optimizer + 8 * hidden
    heads = []
    for found in seen.values():  # of a wide vocabulary, whose head is what takes most
        wide, one = replace(found.shape, vocab=200_000), Pass(tokens=64, supervised=60, longest=64)
        parts = passing_bytes(wide, "fp32", "fp32", one, 0, offload=False, kernels=True, device="cpu")
        heads.append(parts[2])
    assert heads[0] > 0 == heads[1]
    assert scored.parameters == simpo.parameters - hidden * vocabulary + hidden  # no head over the vocabulary
    assert any("score head is trained beside the adapter" in note for note in scored.notes)
    said = runs.finetune("plan", "r.yaml", *(part for one in PAIRS for part in ("--set", one)), "--card", "24")
    assert said.code == 0, said.err


@pytest.mark.usefixtures("work")
def test_a_release_says_how_to_load_it_and_that_runs() -> None:
    furnish()
    assert runs.train(*PAIRS, "train.learning_rate=0.02").code == 0
    said = runs.finetune(
        "release", str(runs.OUTPUT), "--out", "published", "--what", "both", "--data-licence", "cc0-1.0",
        "--allow-unknown-licence",
    )  # fmt: skip
    assert said.code == 0, said.err
    assert runs.finetune("verify", "published").code == 0
    card = (Path("published") / "README.md").read_text()
    assert "AutoModelForCausalLM" not in card
    assert "| | before | after | merged |" in card
    assert "| reward accuracy | 0.500 (" in card
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    shutil.copytree("base", Path("published") / "base")
    rewards = []
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", block], cwd="published", capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        rewards.append(float(done.stdout.split()[-1]))
    assert rewards[0] == pytest.approx(rewards[1], abs=0.1)  # in bf16, one over the 4-bit base's merge
