"""The whole road at Qwen-14B's true widths, without its weights: random numbers in the original format.

    python benchmarks/rehearsal_14b.py all runs/rehearsal                # what make rehearsal-14b runs
    python benchmarks/rehearsal_14b.py build runs/rehearsal --layers 40  # or phase by phase, each in ten minutes
    python benchmarks/rehearsal_14b.py train runs/rehearsal

Phases: build, plan, train (stopped after its first checkpoint, then resumed), merge (into the original layout, proven).
A phase that is done is passed over, one that was cut off goes on. Each adds predicted and measured peak memory, tokens
per second and time to ``benchmarks/results/rehearsal-14b-<date>.json``. ``sparse`` writes the same checkpoint as files
of zeros that take no room on the disk: for tests of the converter.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

HIDDEN, WIDTH, VOCABULARY = 5120, 13696, 152_064
FINETUNE = (sys.executable, "-c", "from finetune.cli import main; main()")
SHARD_BYTES = 2_000_000_000
CONFIG = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * WIDTH,
    "num_attention_heads": 40,
    "kv_channels": 128,
    "vocab_size": VOCABULARY,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "no_bias": True,
    "seq_length": 2048,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "initializer_range": 0.02,
}
RECIPE = """\
model: {base}
quantize:
  weights: nf4
adapter:
  method: lora
  r: 16
  lora_alpha: 32
trainable_tokens: none
data:
  train_path: {rows}
  eval_path: {held}
train:
  steps: 20
  examples_per_step: {examples}
  learning_rate: 1e-4
  max_length: {length}
  save_every: 10
  seed: 1
evaluate:
  metrics: [loss]
tracker: none
output: {output}
"""


def shapes(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor in the order of the published index."""
    yield "transformer.wte.weight", (VOCABULARY, HIDDEN)
    for index in range(layers):
        layer = f"transformer.h.{index}"
        yield f"{layer}.ln_1.weight", (HIDDEN,)
        yield f"{layer}.attn.c_attn.weight", (3 * HIDDEN, HIDDEN)
        yield f"{layer}.attn.c_attn.bias", (3 * HIDDEN,)
        yield f"{layer}.attn.c_proj.weight", (HIDDEN, HIDDEN)
        yield f"{layer}.ln_2.weight", (HIDDEN,)
        yield f"{layer}.mlp.w1.weight", (WIDTH, HIDDEN)
        yield f"{layer}.mlp.w2.weight", (WIDTH, HIDDEN)
        yield f"{layer}.mlp.c_proj.weight", (HIDDEN, WIDTH)
    yield "transformer.ln_f.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def checkpoint(folder: Path, layers: int, *, sparse: bool) -> None:
    """Write the checkpoint shard by shard; a shard that is there whole is kept."""
    from finetune.headers import Tensor
    from finetune.runfolder import json_bytes

    groups: list[dict[str, Tensor]] = [{}]
    for name, shape in shapes(layers):
        tensor = Tensor(shard="", dtype="BF16", shape=shape)
        if groups[-1] and sum(one.bytes for one in groups[-1].values()) + tensor.bytes > SHARD_BYTES:
            groups.append({})
        groups[-1][name] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    for number, (name, group) in enumerate(zip(names, groups, strict=True)):
        print(f"shard {number + 1}/{len(groups)}", flush=True)
        if not (folder / name).is_file():
            _shard(folder / name, group, number, sparse=sparse)
    places = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
    (folder / "model.safetensors.index.json").write_bytes(json_bytes({"metadata": {}, "weight_map": places}))
    (folder / "config.json").write_bytes(json_bytes(CONFIG | {"num_hidden_layers": layers}))
    (folder / "generation_config.json").write_bytes(json_bytes({"chat_format": "raw"}))


def _shard(path: Path, group: dict[str, Any], seed: int, *, sparse: bool) -> None:
    import struct

    import torch

    from finetune.headers import header_of
    from finetune.shards import ShardWriter

    header = header_of(group)
    if sparse:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + sum(tensor.bytes for tensor in group.values()))
        return
    generator = torch.Generator().manual_seed(seed)
    part = path.with_suffix(".part")
    with ShardWriter(part, header) as shard:
        for name in shard.names:
            shape = group[name].shape
            value = torch.empty(shape, dtype=torch.bfloat16)
            if len(shape) == 1:
                value.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                value.normal_(0.0, 0.02, generator=generator)
            shard.add(name, value)
    part.rename(path)


def build(work: Path, layers: int, length: int) -> None:
    """The base with a small tokenizer of its own (Qwen's vocabulary file is not ours to ship), rows and the recipe."""
    import importlib.util

    base = work / "base"
    checkpoint(base, layers, sparse=False)
    spec = importlib.util.spec_from_file_location("make_tiny_base", ROOT / "data" / "make_tiny_base.py")
    assert spec is not None
    assert spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    tiny.write_tokenizer(base, "qwen2")
    rows = [f"{number:04} " + "the date is of " * ((length - 60) // 5) for number in range(64)]
    for name, chosen in (("rows", rows[:48]), ("held", rows[48:])):
        lines = [json.dumps({"prompt": row, "completion": "2019-02-15"}) + "\n" for row in chosen]
        (work / f"{name}.jsonl").write_text("".join(lines))
    recipe = RECIPE.format(
        base=base, rows=work / "rows.jsonl", held=work / "held.jsonl", output=work / "run", length=length, examples=4
    )
    (work / "recipe.yaml").write_text(recipe)


def command(work: Path, *arguments: str, stop_after: Path | None = None) -> dict[str, Any]:
    """One finetune command as a process: exit code, seconds, peak memory in bytes. ``stop_after``: SIGTERM once that
    path is there."""
    began = time.time()
    process = subprocess.Popen([*FINETUNE, *arguments], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    if stop_after is not None:

        def watch() -> None:
            while process.poll() is None and not stop_after.exists():
                time.sleep(0.2)
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)

        threading.Thread(target=watch, daemon=True).start()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "command": " ".join(["finetune", *(str(one).replace(str(work), "WORK") for one in arguments)]),
        "exit": process.returncode,
        "seconds": round(time.time() - began, 1),
        "peak_rss": usage.ru_maxrss * 1024,
    }


def plan(work: Path) -> dict[str, Any]:
    done = subprocess.run(
        [*FINETUNE, "plan", str(work / "recipe.yaml"), "--json"],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    keys = ("device_name", "parameters", "memory", "micro_batch_tokens", "recompute", "steps", "tokens")
    return {key: found[key] for key in keys} | {"budget": found["budget"], "training_seconds": found["seconds"]}


def train(work: Path) -> dict[str, Any]:
    """20 steps, stopped after the checkpoint at step 10, then the same command."""
    arguments = ("train", str(work / "recipe.yaml"))
    stopped = command(work, *arguments, stop_after=work / "run" / "checkpoints" / "step-00000010")
    resumed = command(work, *arguments) if stopped["exit"] == 6 else stopped
    lines = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    speeds = sorted(line["tokens_per_second"] for line in lines[1:])
    return {
        "stopped": stopped,
        "resumed": resumed,
        "steps": len(lines),
        "tokens_per_second": speeds[len(speeds) // 2],
        "peak_memory": max(line["memory"] for line in lines),
        "loss": [lines[0]["loss"], lines[-1]["loss"]],
    }


def merge(work: Path) -> dict[str, Any]:
    out = work / "merged"
    done = command(work, "merge", str(work / "run"), "--out", str(out), "--layout", "original")
    note = json.loads((out / "finetune.json").read_text()) if done["exit"] == 0 else {}
    return done | {"proof": note.get("proof"), "bytes": sum(path.stat().st_size for path in out.rglob("*"))}


def run(work: Path, phases: list[str], layers: int, length: int) -> None:
    work.mkdir(parents=True, exist_ok=True)
    record = work / "record.json"
    found: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {}
    for phase in phases:
        if phase in found:
            print(f"{phase}: done already")
            continue
        began = time.time()
        result = build(work, layers, length) if phase == "build" else PHASES[phase](work)
        found[phase] = {**(result or {}), "seconds": round(time.time() - began, 1)}
        record.write_text(json.dumps(found, indent=2))
    save(found, layers, length)


def save(found: dict[str, Any], layers: int, length: int) -> None:
    """The record with date, versions and machine, and a table on the screen."""
    from importlib.metadata import version

    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    result = {
        "date": datetime.date.today().isoformat(),
        "layers": layers,
        "length": length,
        "device": card or found.get("plan", {}).get("device_name"),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        "phases": found,
    }
    target = ROOT / "benchmarks" / "results" / f"rehearsal-14b-{result['date']}{'-gpu' if card else ''}.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    for phase, figures in found.items():
        peak = figures.get("peak_memory") or figures.get("peak_rss")
        print(f"{phase:<8}{figures['seconds']:>8} s{f'   peak {peak / 1e9:.1f} GB' if peak else ''}")
    if "plan" in found and "train" in found:
        print(f"memory: {found['plan']['memory'] / 1e9:.1f} GB predicted, {found['train']['peak_memory'] / 1e9:.1f} GB")
        print(f"speed: {found['train']['tokens_per_second']:.0f} tokens/s")
    print(f"written: {target.relative_to(ROOT)}")


PHASES = {"plan": plan, "train": train, "merge": merge}


def main() -> int:
    parser = argparse.ArgumentParser(description="The whole road at Qwen-14B's true widths, without its weights.")
    parser.add_argument("phase", choices=["all", "sparse", "build", *PHASES])
    parser.add_argument("work", type=Path, help="the folder for everything that is made")
    parser.add_argument(
        "--layers", type=int, default=None, help="depth; 40, the real one, where there is a card, else 2"
    )
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if options.phase == "sparse":
        checkpoint(options.work, options.layers or 40, sparse=True)
        return 0
    import torch

    options.layers = options.layers or (40 if torch.cuda.is_available() else 2)
    phases = ["build", *PHASES] if options.phase == "all" else [options.phase]
    run(options.work, phases, options.layers, options.length)
    return 0


if __name__ == "__main__":
    sys.exit(main())
