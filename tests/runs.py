"""A workplace for whole runs: a tiny base, a little data and a recipe in one folder, and the command in this process.

Everything in it is named by relative paths, so that a copy of the folder is as good as the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import cli, dataset
from finetune.dataset import Reader, Row, Source

ROOT = Path(__file__).resolve().parents[1]

RECIPE = """\
model: base
quantize:
  weights: nf4
  compute: fp32
adapter:
  method: lora
  r: 4
  lora_alpha: 8
data:
  train_path: train.jsonl
  eval_path: eval.jsonl
train:
  steps: 6
  examples_per_step: 4
  learning_rate: 0.005
  schedule: constant
  max_length: 128
  micro_batch_tokens: 256
  save_every: 2
  seed: 3
evaluate:
  metrics: [loss, exact_match]
  max_new_tokens: 4
tracker: none
output: runs/one
"""
OUTPUT = Path("runs/one")


def read_rows(path: Path, format_name: str = "auto", special_tokens: Sequence[str] = ()) -> list[Row]:
    """The rows of one file."""
    return dataset.read_rows(Reader(Source(path=str(path), format=format_name), special_tokens))


MERGED = Path("merged")


@dataclass(frozen=True)
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str


def finetune(*arguments: str, stdin: str = "") -> Said:
    """One command line, run in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.stdin
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.stdin = io.StringIO(stdin)
        try:
            code = cli.main_in_process(arguments)
        finally:
            sys.stdin = before
    return Said(code, out.getvalue(), err.getvalue())


def train(*overrides: str, options: Iterable[str] = ()) -> Said:
    """``finetune train r.yaml`` with ``--set`` for each override."""
    return finetune("train", "r.yaml", *options, *(part for override in overrides for part in ("--set", override)))


def train_in_two(*overrides: str, out: Path) -> None:
    """The run into another folder, ended after four steps and taken up again."""
    from finetune import pipeline
    from finetune.terminal import Terminal

    terminal = Terminal(out=io.StringIO(), quiet=True, silent=True)
    sets = (*overrides, f"output={out}")
    pipeline.train(Path("r.yaml"), sets, terminal, until=4)
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4]
    pipeline.train(Path("r.yaml"), sets, terminal)


def chat(*turns: str, system: str = "") -> dict[str, Any]:
    """A row: user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[index % 2], "content": turn} for index, turn in enumerate(turns)]
    return {"messages": [*([{"role": "system", "content": system}] if system else []), *messages]}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def furnish(folder: Path, recipe: str = RECIPE) -> None:
    """The recipe and its data; the base comes from elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(folder / "train.jsonl", [chat(f"What is {n} and {n + 1}?", f"{2 * n + 1}") for n in range(20)])
    write_rows(folder / "eval.jsonl", [chat(f"What is {n} and {n + 2}?", f"{2 * n + 2}") for n in range(4)])
    (folder / "r.yaml").write_text(recipe)


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file below a folder: digest and time of change."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def adapter_digest(folder: Path = OUTPUT) -> str:
    return hashlib.sha256((folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def metrics(folder: Path = OUTPUT) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path = OUTPUT) -> list[tuple[Any, ...]]:
    """What a step computed, without what it took."""
    keys = ("step", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "samples")
    return [tuple(line[key] for key in keys) for line in metrics(folder)]


def merge_run(*options: str, out: Path = MERGED, run: Path = OUTPUT) -> Said:
    return finetune("merge", str(run), "--out", str(out), *options)


def awake(adapter: Path) -> None:
    """Give a barely trained adapter weights that matter, all of them, and a manifest that holds."""
    import torch
    from safetensors.torch import load_file, save_file

    from finetune import manifest

    weights = load_file(adapter / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(11)
    for name in sorted(weights):
        noise = torch.randn(weights[name].shape, generator=generator)
        if "lora_B" in name:
            weights[name] = noise * 0.05
        elif "lora_A" not in name:  # DoRA's lengths, whole modules
            weights[name] = weights[name] * (1 + 0.1 * noise)
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    manifest.write(adapter, manifest.digests(adapter))


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def process(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a fresh interpreter, in the working folder."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=ENVIRONMENT | environment, capture_output=True, text=True
    )
