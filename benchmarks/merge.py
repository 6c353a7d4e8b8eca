"""Folding a LoRA adapter into a 16-bit base: `finetune` against PEFT's `merge_and_unload` and `save_pretrained`.

    .venv/bin/python benchmarks/merge.py             # bases of 2.3 and 9 GB of random numbers, 3 rounds: ten minutes
    .venv/bin/python benchmarks/merge.py --quick     # a base of 0.1 GB: does it run?

Run it from the repository's root on a machine that does nothing else, with 30 GB free. See README.md here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

SIZES: dict[str, tuple[int, int, int]] = {  # hidden, intermediate, layers
    "0.1 GB": (512, 1408, 4),
    "2.3 GB": (2048, 5632, 20),
    "9 GB": (4096, 11_008, 21),
}
VOCABULARY, RANK, SEED = 32_000, 16, 20_261
PACKAGES = ("torch", "transformers", "peft", "safetensors")
OURS, PEER = "finetune", "peft"
WARM = {OURS: ("finetune.merge", "safetensors.torch"), PEER: ("peft", "transformers.models.llama.modeling_llama")}
"""What a contestant imports before its time begins: that is nobody's merit here."""


def build(folder: Path, name: str) -> None:
    """A native base of random bf16 numbers in shards of 2 GB, and an adapter on all its linears."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from finetune.headers import Tensor, header_of
    from finetune.runfolder import json_bytes
    from finetune.shards import ShardWriter

    hidden, width, layers = SIZES[name]
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    adapter.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": width, "num_hidden_layers": layers, "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 128, "vocab_size": VOCABULARY, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "hidden_act": "silu",
    }  # fmt: skip
    (base / "config.json").write_bytes(json_bytes(config))
    linears = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    linears |= {"mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width)}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(layers):
        shapes |= {f"model.layers.{layer}.{linear}.weight": shape for linear, shape in linears.items()}
        shapes |= {f"model.layers.{layer}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}
    groups: list[dict[str, Tensor]] = [{}]
    for key, shape in shapes.items():
        tensor = Tensor(shard="", dtype="BF16", shape=shape)
        if groups[-1] and sum(one.bytes for one in groups[-1].values()) + tensor.bytes > 2e9:
            groups.append({})
        groups[-1][key] = tensor
    generator, places = torch.Generator().manual_seed(SEED), {}
    for number, group in enumerate(groups, 1):
        shard = f"model-{number:05}-of-{len(groups):05}.safetensors"
        with ShardWriter(base / shard, header_of(group)) as target:
            for key in target.names:
                value = torch.empty(group[key].shape, dtype=torch.bfloat16)
                target.add(key, value.normal_(0, 0.02, generator=generator) if value.ndim > 1 else value.fill_(1))
                places[key] = shard
    (base / "model.safetensors.index.json").write_bytes(json_bytes({"metadata": {}, "weight_map": places}))
    LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=32, target_modules=[name.split(".")[1] for name in linears],
        base_model_name_or_path=str(base),
    ).save_pretrained(adapter)  # fmt: skip
    weights = {}
    for layer in range(layers):
        for linear, (out, into) in linears.items():
            key = f"base_model.model.model.layers.{layer}.{linear}"
            weights[f"{key}.lora_A.weight"] = torch.randn(RANK, into, generator=generator) * 0.02
            weights[f"{key}.lora_B.weight"] = torch.randn(out, RANK, generator=generator) * 0.02
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})


def ours(base: Path, adapter: Path, out: Path) -> None:
    """The fold of `finetune merge --base original`, without its proof: the same work as the peer's, flushed to disk."""
    from safetensors.torch import load_file

    from finetune import base as bases
    from finetune import merge
    from finetune.loading import BaseForm

    found = bases.inspect(base, weights_only=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    form = BaseForm(weights="bf16", double=False, compute="bf16", device="cpu")
    plan = merge.make_plan(found, form, weights, config, replayed=False)
    out.mkdir()
    shutil.copyfile(base / "config.json", out / "config.json")
    merge.apply(plan, found, weights, out, "native", lambda done, of: None)


def peer(base: Path, adapter: Path, out: Path) -> None:
    """As PEFT documents it; its files are left to the system's cache."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, str(adapter)).merge_and_unload().save_pretrained(out)


def measured(who: str, folder: Path) -> dict[str, float]:
    """One contestant in a process of its own: wall and processor seconds, and the most memory that was resident."""
    shutil.rmtree(folder / f"out-{who}", ignore_errors=True)
    os.sync()  # nobody waits for what another one wrote
    found: dict[str, float] = apart(who, folder)
    return found


def apart(task: str, folder: Path, name: str = "") -> Any:
    """A task's answer, from a process of its own. This one stays small: a child's peak begins at its parent's size."""
    done = subprocess.run(
        [sys.executable, __file__, "--task", task, str(folder), name], check=True, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def run(task: str, folder: Path, name: str) -> Any:
    if task == "build":
        return build(folder, name)
    return furthest(folder) if task == "furthest" else contestant(task, folder)


def contestant(who: str, folder: Path) -> dict[str, float]:
    for name in WARM[who]:
        importlib.import_module(name)
    begun, used = time.perf_counter(), time.process_time()
    {OURS: ours, PEER: peer}[who](folder / "base", folder / "adapter", folder / f"out-{who}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - used, "peak_bytes": peak}


def furthest(folder: Path) -> float:
    """The largest difference between the two results, in steps of bf16: 1 where only the rounding differs."""
    import torch
    from safetensors import safe_open

    found = 0.0
    places = [(path, safe_open(path, "pt")) for path in sorted((folder / f"out-{PEER}").glob("*.safetensors"))]
    for path in sorted((folder / f"out-{OURS}").glob("*.safetensors")):
        with safe_open(path, "pt") as mine:
            for key in mine.keys():  # noqa: SIM118 — not a mapping
                other = next(theirs.get_tensor(key) for _, theirs in places if key in theirs.keys())  # noqa: SIM118
                a, b = mine.get_tensor(key).float(), other.float()
                step = torch.maximum(a.abs(), b.abs()).clamp(min=1e-3).log2().floor().exp2() * 2**-7
                found = max(found, float(((a - b).abs() / step).max()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES))
    parser.add_argument("--work", type=Path, help="where the bases are made; default: a temporary folder")
    parser.add_argument("--task", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.task:
        print(json.dumps(run(asked.task[0], Path(asked.task[1]), asked.task[2])))
        return
    sizes = asked.sizes or (["0.1 GB"] if asked.quick else ["2.3 GB", "9 GB"])
    found: dict[str, Any] = {}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="merge-", dir=asked.work) as work:
        for name in sizes:
            folder = Path(work) / name.replace(" ", "")
            print(f"making a base of {name}", flush=True)
            apart("build", folder, name)
            rounds = []
            for number in range(asked.rounds):
                turn = [OURS, PEER] if number % 2 == 0 else [PEER, OURS]
                rounds.append({who: measured(who, folder) for who in turn})
                said = {who: f"{v['seconds']:.1f} s, {v['peak_bytes'] / 1e9:.2f} GB" for who, v in rounds[-1].items()}
                print(f"{name}  round {number + 1}/{asked.rounds}  {said}", flush=True)
            ratios = {
                key: sorted(one[OURS][key] / one[PEER][key] for one in rounds)
                for key in ("seconds", "cpu_seconds", "peak_bytes")
            }
            found[name] = {
                "rounds": rounds,
                "ratios": {key: {"min": r[0], "median": median(r), "max": r[-1]} for key, r in ratios.items()},
                "furthest_in_bf16_steps": apart("furthest", folder),
            }
            print(json.dumps(found[name]["ratios"], indent=2), flush=True)
            shutil.rmtree(folder)
    from finetune import hardware  # imports torch

    result = {
        "command": "benchmarks/merge.py " + " ".join(sys.argv[1:]), "date": datetime.now(UTC).isoformat(),
        "hardware": hardware.detect().to_dict(), "python": sys.version.split()[0], "load_before": load,
        "versions": {package: version(package) for package in PACKAGES}, "sizes": found,
    }  # fmt: skip
    if not asked.quick:
        path = ROOT / "benchmarks" / "results" / f"merge-{datetime.now(UTC):%Y-%m-%d}.json"
        path.write_text(json.dumps(result, indent=2) + "\n")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
