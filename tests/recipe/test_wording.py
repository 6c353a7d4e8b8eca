"""Every known way of getting a recipe wrong is refused with file, line, column and key."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.recipe.text import BASE, faults_of


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with data files, in which a recipe's relative paths start."""
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "eval.jsonl"):
        (tmp_path / name).write_text(f'{{"{name}": 1}}\n')
    return tmp_path


def metric(name: str, more: str = "") -> Callable[[str], str]:
    """The recipe with one metric, and one more line below ``evaluate:``."""
    return swap("[loss, exact_match]", f"[{name}]" + (f"\n  {more}" if more else ""))


def swap(old: str, new: str) -> Callable[[str], str]:
    def edit(text: str) -> str:
        assert text.count(old) == 1, old
        return text.replace(old, new)

    return edit


def _loss_alone(text: str) -> str:
    return swap("[loss, exact_match]", "[loss]")(text)


HEX40 = "0123456789abcdef0123456789abcdef01234567"

# name → edit of BASE, where the fault must point, words it must hold
CATALOGUE: dict[str, tuple[Callable[[str], str], str, str]] = {
    "1 unknown key": (
        swap("learning_rate", "learning_rte"),
        "r.yaml:15:3: train.learning_rte",
        "mean 'learning_rate'?",
    ),
    "2 synonym of a key": (swap("  r: 8", "  lora_rank: 8"), "r.yaml:7:3: adapter.lora_rank", "did you mean 'r'?"),
    "2 synonym lr": (swap("learning_rate", "lr"), "r.yaml:15:3: train.lr", "did you mean 'learning_rate'?"),
    "3 rate in quotes": (swap("2e-3", "'1e-4'"), "r.yaml:15:3: train.learning_rate", "write it without quotes"),
    "4 rate fast": (
        swap("2e-3", "fast"),
        "r.yaml:15:3: train.learning_rate",
        "a number, above 0, at most 1; found 'fast'",
    ),
    "5 rate NaN": (swap("2e-3", ".nan"), "r.yaml:15:18: train.learning_rate", "not a finite number"),
    "6 rate negative": (swap("2e-3", "-2e-3"), "r.yaml:15:3: train.learning_rate", "found -0.002"),
    "7 rate 1e9": (swap("2e-3", "1e9"), "r.yaml:15:3: train.learning_rate", "at most 1"),
    "8 batch 0": (swap("step: 8", "step: 0"), "r.yaml:14:3: train.examples_per_step", "at least 1"),
    "9 accumulation": (
        swap("  seed: 7", "  gradient_accumulation_steps: -2"),
        "r.yaml:19:3: train.gradient_accumulation_steps",
        "unknown key",
    ),
    "9 trackio's folder": (
        lambda text: re.sub(r"output: .*", "output: runs/trackio", text),
        "r.yaml:23:1: output",
        "the tracker trackio keeps what it records",
    ),
    "10 length 1": (swap("length: 256", "length: 1"), "r.yaml:18:3: train.max_length", "at least 8"),
    "11 rank 0": (swap("r: 8\n  lora", "r: 0\n  lora"), "r.yaml:7:3: adapter.r", "from 1"),
    "12 all targets misspelt": (
        swap("  r: 8", "  target_modules: [qproj]\n  r: 8"),
        "r.yaml:7:20: adapter.target_modules[0]",
        "did you mean 'q_proj'?",
    ),
    "13 half the targets misspelt": (
        swap("  r: 8", "  target_modules:\n  - q_proj\n  - v_porj\n  r: 8"),
        "r.yaml:9:5: adapter.target_modules[1]",
        "did you mean 'v_proj'?",
    ),
    "14 dropout 2": (swap("  r: 8", "  lora_dropout: 2.0\n  r: 8"), "r.yaml:7:3: adapter.lora_dropout", "below 1"),
    "15 batch 2.5": (swap("step: 8", "step: 2.5"), "r.yaml:14:3: train.examples_per_step", "found 2.5"),
    "16 two weight formats": (
        swap("nf4\n", "[nf4, int8]\n"),
        "r.yaml:3:3: quantize.weights",
        "one of nf4, fp4, int8, torchao_int8, gptq, awq, bf16, fp16, fp32; found a list",
    ),
    "17 4-bit option without 4 bits": (
        swap("nf4\n  double: true", "bf16\n  double: false"),
        "r.yaml:4:3: quantize.double",
        "no meaning with 'bf16'",
    ),
    "18 optimizer": (swap("  seed: 7", "  optimizer: adamv"), "r.yaml:19:3: train.optimizer", "did you mean 'adamw'?"),
    "18 LoRA+ below 1": (
        swap("  seed: 7", "  lora_plus_ratio: 0.5"),
        "r.yaml:19:3: train.lora_plus_ratio",
        "at least 1",
    ),
    "18 LoRA+ where A is frozen": (
        swap("  seed: 7", "  optimizer: lora_fa\n  lora_plus_ratio: 16"),
        "r.yaml:20:3: train.lora_plus_ratio",
        "no meaning with lora_fa",
    ),
    "18 LoRA+ beside its better": (
        swap("  seed: 7", "  optimizer: riemannian\n  lora_plus_ratio: 16"),
        "r.yaml:20:3: train.lora_plus_ratio",
        "no meaning with riemannian",
    ),
    "18 DoRA preconditioned": (
        lambda text: swap("  seed: 7", "  optimizer: riemannian")(swap("  r: 8", "  r: 8\n  use_dora: true")(text)),
        "r.yaml:20:3: train.optimizer",
        "DoRA normalises",
    ),
    "18 DoRA projected": (
        lambda text: swap("  seed: 7", "  optimizer: lora_fa")(swap("  r: 8", "  r: 8\n  use_dora: true")(text)),
        "r.yaml:20:3: train.optimizer",
        "DoRA normalises",
    ),
    "18 schedule typo": (swap(": linear", ": cosin"), "r.yaml:16:3: train.schedule", "did you mean 'cosine'?"),
    "18 weights typo": (swap(": nf4", ": nf5"), "r.yaml:3:3: quantize.weights", "did you mean 'nf4'?"),
    "18 key typo": (swap("schedule", "sechdule"), "r.yaml:16:3: train.sechdule", "did you mean 'schedule'?"),
    "19 data type typo": (swap("data:\n", "data:\n  format: chta\n"), "r.yaml:10:3: data.format", "mean 'chat'?"),
    "19 data path missing": (swap("train.jsonl", "tain.jsonl"), "r.yaml:10:3: data.train_path", "mean 'train.jsonl'?"),
    "20 fraction 2": (
        swap("eval_path: eval.jsonl", "eval_fraction: 2.0"),
        "r.yaml:11:3: data.eval_fraction",
        "above 0, below 1",
    ),
    "21 yes as bool": (swap("double: true", 'double: "yes"'), "r.yaml:4:3: quantize.double", "true or false"),
    "22 duplicate key": (swap("  seed: 7", "  seed: 7\n  warmup: 3"), "r.yaml:20:3: train.warmup", "first on line 17"),
    "23 tab": (swap("  seed: 7", "\tseed: 7"), "r.yaml:19:1", "tab character"),
    "24 no": (swap("double: true", "double: no"), "r.yaml:4:3: quantize.double", "found 'no'"),
    "24 010": (swap("steps: 12", "steps: 010"), "r.yaml:13:10: train.steps", "octal"),
    "24 1:30": (swap("steps: 12", "steps: 1:30"), "r.yaml:13:3: train.steps", "found '1:30'"),
    "24 date": (swap("steps: 12", "steps: 2026-11-24"), "r.yaml:13:3: train.steps", "found '2026-11-24'"),
    "25 alias bomb": (
        lambda text: f"a: &a [x, x]\nb: &b [{', '.join(['*a'] * 9)}]\nc: [{', '.join(['*b'] * 9)}]\n" + text,
        "r.yaml:1:4: a",
        "anchor",
    ),
    "26 recursive alias": (swap("[loss, exact_match]", "&x [*x]"), "r.yaml:21:12: evaluate.metrics", "anchor"),
    "27 object tag": (swap("seed: 7", "seed: !!python/object:os.x 7"), "r.yaml:19:9: train.seed", "tag"),
    "28 NBSP": (lambda text: text.replace(" ", "\u00a0"), "r.yaml:1:7", "U+00A0"),
    "29 empty file": (lambda text: "", "r.yaml:1:1", "empty"),
    "29 list at root": (lambda text: "- a\n", "r.yaml:1:1", "mapping"),
    "30 two documents": (lambda text: f"{text}---\n{text}", "r.yaml:24:1", "second document"),
    "31 secret": (swap(": none", ": hf_ABCDEFGHIJKLMNOPQRSTUVWX"), "r.yaml:22:10", "shaped like a secret"),
    "31 secret in a comment": (swap(": none", f": none # {HEX40}"), "r.yaml:22:17", "shaped like a secret"),
    "32 parent folder": (swap("runs/tiny", "../tiny"), "r.yaml:23:1: output", "must not contain .."),
    "32 URL as output": (swap("runs/tiny", "s3://b/tiny"), "r.yaml:23:1: output", "URL"),
    "32 URL as model": (swap("Qwen/Qwen2.5-14B", "https://a.b/c"), "r.yaml:1:1: model", "URL"),
    "32 URL as data": (swap("train.jsonl", "hf://a/b.jsonl"), "r.yaml:10:3: data.train_path", "URL"),
    "33 ${VAR}": (swap("runs/tiny", "${HOME}/tiny"), "r.yaml:23:1: output", ""),
    "33 $VAR": (swap("train.jsonl", "$DATA/train.jsonl"), "r.yaml:10:3: data.train_path", ""),
}


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("name", CATALOGUE)
def test_catalogue_of_bad_recipes(name: str) -> None:
    edit, where, words = CATALOGUE[name]
    found = faults_of(edit(BASE))
    matching = [fault for fault in found if fault.startswith(f"{where}: ") and words in fault]
    assert matching, "\n".join(found)
    if not name.startswith("31"):
        # one mistake, one line: no echo of it elsewhere
        assert len(found) == 1 or name.startswith(("25", "26")), "\n".join(found)


def aimed(keys: str, more: Callable[[str], str] = lambda text: text) -> Callable[[str], str]:
    """The recipe with an objective as its first section."""
    return lambda text: f"objective: {{{keys}}}\n{more(text)}"


MORE: dict[str, tuple[Callable[[str], str], str, str]] = {
    "objective typo": (aimed("method: dop"), "r.yaml:1:13: objective.method", "mean 'dpo'?"),
    "key of another objective": (aimed("method: orpo, gamma: 1.0"), "r.yaml:1:27: objective.gamma", "no meaning with"),
    "smoothing without effect": (
        aimed("method: dpo, loss: ipo, label_smoothing: 0.1"),
        "r.yaml:1:37: objective.label_smoothing",
        "no meaning with the loss ipo",
    ),
    "robust against nothing": (
        aimed("method: dpo, loss: robust"),
        "r.yaml:1:1: objective.label_smoothing",
        "share of swapped pairs",
    ),
    "distillation without a teacher": (
        aimed("method: distill"),
        "r.yaml:1:1: objective.teacher",
        "learns from a teacher",
    ),
    "a mixture without effect": (
        aimed("method: distill, teacher: t, beta: 0.5"),
        "r.yaml:1:42: objective.beta",
        "no meaning with forward_kl",
    ),
    "a mixture of one": (
        aimed("method: distill, teacher: t, divergence: jsd, beta: 1.0"),
        "r.yaml:1:59: objective.beta",
        "1 is divergence: reverse_kl",
    ),
    "a divergence typo": (
        aimed("method: distill, teacher: t, divergence: forward"),
        "r.yaml:1:42: objective.divergence",
        "mean 'forward_kl'?",
    ),
    "a teacher of preferences": (
        aimed("method: orpo, teacher: t"),
        "r.yaml:1:27: objective.teacher",
        "no meaning with",
    ),
    "taught by the output": (
        aimed("method: distill, teacher: runs/tiny"),
        "r.yaml:1:30: objective.teacher",
        "the run's own output",
    ),
    "a loss of another objective": (
        aimed("method: grpo, rewards: [{metric: contains}], max_new_tokens: 8, loss: ipo"),
        "r.yaml:1:77: objective.loss",
        "is no loss of grpo; use grpo or dr_grpo or dapo",
    ),
    "nothing of dpo": (aimed("method: dpo, beta: 0"), "r.yaml:1:26: objective.beta", "which leaves nothing of dpo"),
    "too hot": (
        aimed("method: grpo, rewards: [{metric: contains}], max_new_tokens: 8, temperature: 9.0"),
        "r.yaml:1:77: objective.temperature",
        "give 0.01 to 2.0",
    ),
    "no rewards": (
        aimed("method: grpo, max_new_tokens: 8"),
        "r.yaml:1:1: objective.rewards",
        "grpo learns from what its answers earn",
    ),
    "a reward without what it needs": (
        aimed("method: grpo, rewards: [{metric: regex}], max_new_tokens: 8"),
        "r.yaml:1:37: objective.rewards[0]",
        "regex needs regex:",
    ),
    "a reward with what another needs": (
        aimed("method: grpo, rewards: [{metric: contains, regex: a}], max_new_tokens: 8"),
        "r.yaml:1:56: objective.rewards[0].regex",
        "has no meaning with contains",
    ),
    "a test that is not there": (
        aimed(
            "method: grpo, rewards: [{metric: unit_test, unit_test: {command: [nowhere-at-all]}}], max_new_tokens: 8"
        ),
        "r.yaml:1:57: objective.rewards[0].unit_test",
        "no such command: 'nowhere-at-all'",
    ),
    "an answer longer than all": (
        aimed("method: grpo, rewards: [{metric: contains}], max_new_tokens: 4096"),
        "r.yaml:1:58: objective.max_new_tokens",
        "a prompt and its answer must fit",
    ),
    "pairs from a format without": (
        aimed("method: dpo", swap("data:\n", "data:\n  format: chat\n")),
        "r.yaml:11:3: data.format",
        "dpo trains on pairs, which chat rows are not",
    ),
    "labels of a pair": (
        aimed("method: kto", lambda text: swap("data:\n", "data:\n  format: preference\n")(_loss_alone(text))),
        "r.yaml:11:3: data.format",
        "kto trains on labels",
    ),
    "answers from a format of pairs": (
        swap("data:\n", "data:\n  format: preference\n"),
        "r.yaml:10:3: data.format",
        "sft trains on answers",
    ),
    "prompts in a pair's loss": (
        aimed("method: dpo", swap("data:\n", "data:\n  train_on: all\n")),
        "r.yaml:11:3: data.train_on",
        "dpo judges answers",
    ),
    "half a pair cut": (
        aimed("method: simpo", swap("data:\n", "data:\n  over_length: split\n")),
        "r.yaml:11:3: data.over_length",
        "whole answers",
    ),
    "no room for a pair": (
        aimed("method: dpo", swap("  seed: 7", "  micro_batch_tokens: 300")),
        "r.yaml:20:3: train.micro_batch_tokens",
        "both texts of a pair",
    ),
    "a zero point of one answer": (
        aimed("method: kto", lambda text: swap("step: 8", "step: 1")(_loss_alone(text))),
        "r.yaml:15:3: train.examples_per_step",
        "the other answers of a step",
    ),
    "words of a reward model": (aimed("method: reward"), "r.yaml:22:19: evaluate.metrics[1]", "writes none"),
    "a score head beside another method": (
        aimed(
            "method: reward",
            lambda text: swap("  method: lora\n  r: 8\n  lora_alpha: 16", "  method: loha\n  r: 8")(_loss_alone(text)),
        ),
        "r.yaml:7:3: adapter.method",
        "beside lora only",
    ),
    "a score head from a run without one": (
        aimed("method: reward", lambda text: swap("  r: 8", "  start_from: x\n  r: 8")(_loss_alone(text))),
        "r.yaml:8:3: adapter.start_from",
        "no score head",
    ),
    "nothing learned from labels": (
        aimed("method: kto, desirable_weight: 0, undesirable_weight: 0", swap("[loss, exact_match]", "[loss]")),
        "r.yaml:1:47: objective.undesirable_weight",
        "both weights are 0: nothing is learned",
    ),
    "rewards of nothing": (
        aimed("method: grpo, max_new_tokens: 8, rewards: [{metric: exact_match, weight: 0}]"),
        "r.yaml:1:46: objective.rewards",
        "every weight is 0: no answer earns anything",
    ),
    "exact match with an unwanted answer": (aimed("method: kto"), "r.yaml:22:19: evaluate.metrics[1]", "an unwanted"),
    "begin from the output": (
        swap("  r: 8", "  start_from: runs/tiny\n  r: 8"),
        "r.yaml:7:3: adapter.start_from",
        "the run's own output",
    ),
    "begin from a URL": (
        swap("  r: 8", "  start_from: hf://a/b\n  r: 8"),
        "r.yaml:7:3: adapter.start_from",
        "a URL is not accepted",
    ),
    "steps and epochs": (swap("  seed: 7", "  epochs: 1"), "r.yaml:19:3: train.epochs", "together with steps"),
    "neither": (swap("  steps: 12\n", ""), "r.yaml:12:1: train.steps", "steps or epochs must be given"),
    "two batch sizes": (
        swap("  seed: 7", "  tokens_per_step: 512"),
        "r.yaml:19:3: train.tokens_per_step",
        "together with examples_per_step",
    ),
    "two eval sources": (
        swap("eval.jsonl\n", "eval.jsonl\n  eval_fraction: 0.1\n"),
        "r.yaml:12:3: data.eval_fraction",
        "together with eval_path",
    ),
    "a number in a list of words": (
        metric("command", "command: [sleep, 100]"),
        "r.yaml:22:20: evaluate.command[1]",
        "must be text; found 100",
    ),
    "a number where true was meant": (
        swap("  seed: 7", "  compile: 1"),
        "r.yaml:19:3: train.compile",
        "must be true or false or auto; found 1",
    ),
    "compile without kernels": (
        swap("  seed: 7", "  kernels: off\n  compile: true"),
        "r.yaml:20:3: train.compile",
        "kernels, which are off",
    ),
    "warmup": (swap("warmup: 2", "warmup: 13"), "r.yaml:17:3: train.warmup", "must not exceed steps (12)"),
    "tokens below length": (
        swap("examples_per_step: 8", "tokens_per_step: 255"),
        "r.yaml:14:3: train.tokens_per_step",
        "max_length (256)",
    ),
    "micro batch": (
        swap("  seed: 7", "  micro_batch_tokens: 255"),
        "r.yaml:19:3: train.micro_batch_tokens",
        "max_length (256)",
    ),
    "micro batch word": (
        swap("  seed: 7", "  micro_batch_tokens: atuo"),
        "r.yaml:19:3: train.micro_batch_tokens",
        "did you mean 'auto'?",
    ),
    "many steps": (swap("steps: 12", "steps: 10000001"), "r.yaml:13:3: train.steps", "at most 10000000"),
    "bool for int": (swap("seed: 7", "seed: true"), "r.yaml:19:3: train.seed", "found true"),
    "bool for float": (swap("2e-3", "true"), "r.yaml:15:3: train.learning_rate", "found true"),
    "whole float for int": (swap("steps: 12", "steps: 12.0"), "r.yaml:13:3: train.steps", "a whole number"),
    "decay": (swap("seed: 7", "weight_decay: 1.5"), "r.yaml:19:3: train.weight_decay", "at most 1"),
    "clip 0": (swap("seed: 7", "max_grad_norm: 0"), "r.yaml:19:3: train.max_grad_norm", "above 0"),
    "new tokens 0": (
        swap("evaluate:\n", "evaluate:\n  max_new_tokens: 0\n"),
        "r.yaml:21:3: evaluate.max_new_tokens",
        "at least 1",
    ),
    "metric typo": (swap("exact_match", "exact_mach"), "r.yaml:21:19: evaluate.metrics[1]", "mean 'exact_match'?"),
    "metric without rows": (
        swap("  eval_path: eval.jsonl\n", ""),
        "r.yaml:20:19: evaluate.metrics[1]",
        "needs held-out rows",
    ),
    "every without rows": (
        lambda text: text.replace("  eval_path: eval.jsonl\n", "").replace("[loss, exact_match]", "[loss]\n  every: 5"),
        "r.yaml:21:3: evaluate.every",
        "no held-out rows",
    ),
    "keep best, never judged": (
        swap("evaluate:\n", "evaluate:\n  keep: best\n"),
        "r.yaml:21:3: evaluate.keep",
        "evaluate.every is 0",
    ),
    "patience, never judged": (
        swap("evaluate:\n", "evaluate:\n  early_stopping_patience: 2\n"),
        "r.yaml:21:3: evaluate.early_stopping_patience",
        "set it to the steps between evaluations",
    ),
    "judged at the end alone": (
        swap("evaluate:\n", "evaluate:\n  keep: best\n  every: 90\n"),
        "r.yaml:21:3: evaluate.keep",
        "is 90, train.steps",
    ),
    "best by what is not measured": (
        swap("evaluate:\n", "evaluate:\n  keep: best\n  every: 5\n  best_by: accuracy\n"),
        "r.yaml:23:3: evaluate.best_by",
        "'accuracy' is not measured; name one that is (loss, exact_match)",
    ),
    "metric twice": (swap("[loss, exact_match]", "[loss, loss]"), "r.yaml:21:19: evaluate.metrics[1]", "given twice"),
    "metric without its own": (metric("regex"), "r.yaml:21:13: evaluate.metrics[0]", "regex needs evaluate.regex"),
    "its own without the metric": (metric("loss", "regex: x"), "r.yaml:22:3: evaluate.regex", "does not name regex"),
    "pattern": (metric("regex", "regex: '('"), "r.yaml:22:3: evaluate.regex", "cannot be read: missing )"),
    "schema gone": (metric("json_schema", "json_schema: s.json"), "r.yaml:22:3: evaluate.json_schema", "no such file"),
    "schema none": (metric("json_schema", "json_schema: r.yaml"), "r.yaml:22:3: evaluate.json_schema", "is not JSON"),
    "one option": (metric("multiple_choice", "multiple_choice: [a]"), "r.yaml:22:3", "one option is no choice"),
    "option twice": (metric("multiple_choice", "multiple_choice: [a, 'a ']"), "r.yaml:22:3", "comes twice"),
    "command gone": (
        metric("command", "command: [no-such-judge, x]"),
        "r.yaml:22:3",
        "no such command: 'no-such-judge'",
    ),
    "command a text": (metric("command", "command: python3 judge.py"), "r.yaml:22:3: evaluate.command", "a list"),
    "command empty": (metric("command", "command: []"), "r.yaml:22:3: evaluate.command", "the command is empty"),
    "empty metrics": (swap("[loss, exact_match]", "[]"), "r.yaml:21:3: evaluate.metrics", "a list"),
    "section missing": (lambda text: text[: text.index("evaluate")], "r.yaml:1:1: output", "missing"),
    "key missing": (swap("  max_length: 256\n", ""), "r.yaml:12:1: train.max_length", "missing"),
    "adapter missing": (
        swap("adapter:\n  method: lora\n  r: 8\n  lora_alpha: 16\n", ""),
        "r.yaml:1:1: adapter",
        "missing",
    ),
    "empty section": (
        swap("quantize:\n  weights: nf4\n  double: true\n", "quantize:\n"),
        "r.yaml:2:1: quantize",
        "a section of 'key: value' lines; found nothing",
    ),
    "list for a section": (
        swap("adapter:\n  method: lora\n  r: 8\n  lora_alpha: 16\n", "adapter: [lora]\n"),
        "r.yaml:5:1: adapter",
        "a section",
    ),
    "key in the wrong section": (
        swap("evaluate:\n", "evaluate:\n  schedule: wsd\n"),
        "r.yaml:21:3: evaluate.schedule",
        "move it under 'train:'",
    ),
    "root key in a section": (swap("  seed: 7", "  tracker: none"), "r.yaml:19:3: train.tracker", "left margin"),
    "nearest key is elsewhere": (
        swap("  seed: 7", "  max_new_token: 7"),
        "r.yaml:19:3: train.max_new_token",
        "did you mean 'objective.max_new_tokens'?",
    ),
    "same data": (
        swap(": eval.jsonl", ": ./train.jsonl"),
        "r.yaml:11:3: data.eval_path",
        "is the file that is trained on",
    ),
    "data in home": (swap(": train.jsonl", ": ~/t"), "r.yaml:10:3: data.train_path", "~ is not expanded"),
    "data empty": (swap(": train.jsonl", ": ''"), "r.yaml:10:3: data.train_path", "empty"),
    "data too long": (swap(": train.jsonl", f": {'a' * 5000}"), "r.yaml:10:3: data.train_path", "no such file"),
    "data NUL": (swap(": train.jsonl", ': "a\\0b"'), "r.yaml:10:3: data.train_path", "control character"),
    "output empty": (swap("runs/tiny", "''"), "r.yaml:23:1: output", "empty"),
    "output home": (swap("runs/tiny", "~/tiny"), "r.yaml:23:1: output", "usable folder name"),
    "output newline": (swap("runs/tiny", '"runs/a\\nb"'), "r.yaml:23:1: output", "usable folder name"),
    "output space": (swap("runs/tiny", "runs/a b"), "r.yaml:23:1: output", "usable folder name"),
    "output long": (swap("runs/tiny", f"runs/{'a' * 97}"), "r.yaml:23:1: output", "usable folder name"),
    "output here": (swap("runs/tiny", "."), "r.yaml:23:1: output", "folder of its own"),
    "output root": (swap("runs/tiny", "/"), "r.yaml:23:1: output", "folder of its own"),
    "copy to a folder": (swap("  seed: 7", "  copy_to: runs/copies"), "r.yaml:19:3: train.copy_to", "s3://bucket/runs"),
    "shards of int8": (
        lambda text: swap("weights: nf4\n  double: true", "weights: int8")(swap("  seed: 7", "  shard: fsdp")(text)),
        "r.yaml:18:3: train.shard",
        "int8 weights are not put in shards; take quantize.weights: nf4",
    ),
    "shards under another method": (
        lambda text: swap("method: lora\n  r: 8\n  lora_alpha: 16", "method: ia3")(
            swap("  seed: 7", "  shard: fsdp")(text)
        ),
        "r.yaml:17:3: train.shard",
        "'ia3' looks at whole layers",
    ),
    "shards under DoRA": (
        lambda text: swap("  lora_alpha: 16", "  lora_alpha: 16\n  use_dora: true")(
            swap("  seed: 7", "  shard: fsdp")(text)
        ),
        "r.yaml:20:3: train.shard",
        "DoRA looks at whole layers",
    ),
    "shards under a start off the base": (
        lambda text: swap("  lora_alpha: 16", "  lora_alpha: 16\n  init_lora_weights: pissa")(
            swap("  seed: 7", "  shard: fsdp")(text)
        ),
        "r.yaml:20:3: train.shard",
        "init_lora_weights: pissa looks at whole layers",
    ),
    "shards of a module that is trained whole": (
        lambda text: swap("  lora_alpha: 16", "  lora_alpha: 16\n  modules_to_save: [norm]")(
            swap("  seed: 7", "  shard: fsdp")(text)
        ),
        "r.yaml:20:3: train.shard",
        "modules_to_save: 'norm' is in the layers",
    ),
    "copy with a password": (
        swap("  seed: 7", "  copy_to: sftp://me:geheim@host/runs"),
        "r.yaml:19:3: train.copy_to",
        "password",
    ),
    "copy with a signature": (
        swap("  seed: 7", "  copy_to: https://host/runs?sig=abc"),
        "r.yaml:19:3: train.copy_to",
        "a signature",
    ),
    "copy through a cache": (
        swap("  seed: 7", "  copy_to: simplecache::s3://bucket/runs"),
        "r.yaml:19:3: train.copy_to",
        "not the URL of a folder",
    ),
    "model unknown": (swap("Qwen/Qwen2.5-14B", "Qwen/Qwen2.5-14"), "r.yaml:1:1: model", "mean 'Qwen/Qwen2.5-14B'?"),
    "model is a file": (swap("Qwen/Qwen2.5-14B", "train.jsonl"), "r.yaml:1:1: model", "neither a folder"),
    "model empty": (swap("Qwen/Qwen2.5-14B", "''"), "r.yaml:1:1: model", "neither a folder"),
    "what the matrix refuses": (
        swap("  method: lora\n  r: 8\n  lora_alpha: 16", "  method: glora\n  r: 8"),
        "r.yaml:6:3: adapter.method",
        "glora on nf4: ",
    ),
    "method key typo": (swap("method: lora", "mehtod: lora"), "r.yaml:6:3: adapter.mehtod", "did you mean 'method'?"),
    "method missing": (swap("  method: lora\n", ""), "r.yaml:5:1: adapter.method", "missing"),
    "other PEFT method": (swap("method: lora", "method: xlora"), "r.yaml:6:3: adapter.method", "mixes adapters"),
    "LoRA's key in another method": (
        swap("method: lora", "method: loha"),
        "r.yaml:8:3: adapter.lora_alpha",
        "not a field of the installed PEFT's loha; did you mean 'alpha'?",
    ),
}


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("name", MORE)
def test_more_bad_recipes(name: str) -> None:
    edit, where, words = MORE[name]
    found = faults_of(edit(BASE))
    assert len(found) == 1, "\n".join(found)
    assert found[0].startswith(f"{where}: ")
    assert words in found[0]


@pytest.mark.usefixtures("work")
def test_all_faults_come_at_once_in_file_order() -> None:
    text = BASE.replace("nf4", "nf5").replace("steps: 12", "stpes: 12").replace("warmup: 2", "warmup: -1")
    text = text.replace("r: 8\n", "r: 0\n").replace("train.jsonl", "tain.jsonl").replace("runs/tiny", "$HOME/x")
    found = faults_of(text, "train.sede=3", "tracker=wandbb")
    assert [fault.split(": ")[0] for fault in found if not fault.startswith("--set")] == [
        "r.yaml:3:3",
        "r.yaml:7:3",
        "r.yaml:10:3",
        "r.yaml:13:3",
        "r.yaml:17:3",
        "r.yaml:23:1",
    ]
    assert [fault for fault in found if fault.startswith("--set")] == [
        "--set tracker: must be one of trackio, wandb, tensorboard, mlflow, none; found 'wandbb'; "
        "did you mean 'wandb'?",
        "--set train.sede: unknown key; did you mean 'seed'?",
    ]


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize(
    "secret",
    [
        "hf_AbCdEfGhIjKlMnOpQrStUvWx",
        "sk-proj-abcdefghij0123456789",
        "ghp_abcdefghijABCDEFGHIJ0123",
        "AKIAABCDEFGHIJKLMNOP",
        HEX40,
    ],
)
def test_a_secret_is_refused_and_never_echoed(secret: str) -> None:
    for text in (
        BASE.replace("runs/tiny", f"runs/{secret}" if secret != HEX40 else secret),
        BASE.replace("seed: 7", f"seed: {secret}"),
        BASE.replace("seed: 7", f"{secret}: 7"),
        BASE.replace("model: Qwen/Qwen2.5-14B", f"model: '{secret}'"),
        f"# {secret}\n{BASE}",
        BASE.replace("seed: 7", f"seed: 7\n  {secret}: 1\n  {secret}: 1"),
    ):
        found = "\n".join(faults_of(text))
        assert secret not in found
    assert secret not in "\n".join(faults_of(BASE, f"train.seed={secret}"))
    assert "shaped like a secret" in "\n".join(faults_of(BASE, f"train.seed={secret}"))
    assert secret not in "\n".join(faults_of(BASE, secret))
