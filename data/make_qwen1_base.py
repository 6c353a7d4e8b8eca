"""Write a base in the layout of the original Qwen of 2023, so that real and tiny weights can travel its road.

    python data/make_qwen1_base.py data/bases/smollm2-135m-instruct data/bases/smollm2-135m-qwen1

The same numbers in another layout: key-value heads are repeated until every head has its own, a tied head is written
out, missing q/k/v biases are zeros, q, k and v are fused. What it computes stays the same to 1e-5. The tokenizer stays
the source's own (Qwen's vocabulary does not fit other weights), its template too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

KEPT = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE", "NOTICE")


def original_config(config: dict[str, Any]) -> dict[str, Any]:
    """The original's config of a Llama- or Qwen2-style one."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    if heads * width != config["hidden_size"]:
        raise ValueError("the original layout needs heads × head width = hidden size")
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    code = {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}
    return {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": code,
        "model_type": "qwen",
        "hidden_size": config["hidden_size"],
        "intermediate_size": 2 * config["intermediate_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": heads,
        "kv_channels": width,
        "vocab_size": config["vocab_size"],
        "layer_norm_epsilon": config["rms_norm_eps"],
        "rotary_emb_base": rope["rope_theta"],
        "rotary_pct": 1.0,
        "no_bias": True,
        "seq_length": 2048,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "use_flash_attn": "auto",
        "initializer_range": 0.02,
        "bf16": False,
        "fp16": False,
        "fp32": False,
    }


def original_tensors(weights: dict[str, torch.Tensor], config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, value) in the original's names and order."""
    import torch

    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    repeat = heads // (config.get("num_key_value_heads") or heads)

    def projected(layer: str, kind: str, part: str) -> torch.Tensor:
        name = f"{layer}.self_attn.{kind}_proj.{part}"
        if name not in weights:
            return torch.zeros(hidden, dtype=weights["model.norm.weight"].dtype)
        value = weights[name]
        if kind == "q" or repeat == 1:
            return value
        return value.unflatten(0, (heads // repeat, -1)).repeat_interleave(repeat, dim=0).flatten(0, 1)

    yield "transformer.wte.weight", weights["model.embed_tokens.weight"]
    for index in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{index}", f"transformer.h.{index}"
        yield f"{new}.ln_1.weight", weights[f"{old}.input_layernorm.weight"]
        for part in ("weight", "bias"):
            yield f"{new}.attn.c_attn.{part}", torch.cat([projected(old, kind, part) for kind in "qkv"])
        yield f"{new}.attn.c_proj.weight", weights[f"{old}.self_attn.o_proj.weight"]
        yield f"{new}.ln_2.weight", weights[f"{old}.post_attention_layernorm.weight"]
        for name, source in (("w1", "up"), ("w2", "gate"), ("c_proj", "down")):
            yield f"{new}.mlp.{name}.weight", weights[f"{old}.mlp.{source}_proj.weight"]
    yield "transformer.ln_f.weight", weights["model.norm.weight"]
    yield "lm_head.weight", weights.get("lm_head.weight", weights["model.embed_tokens.weight"]).clone()


def build(source: Path, folder: Path, *, shard_bytes: int = 100_000_000) -> Path:
    """Write ``source`` in the original layout into ``folder`` (made if need be) and return it."""
    from safetensors.torch import load_file, save_file

    config = json.loads((source / "config.json").read_bytes())
    weights = {name: value for path in sorted(source.glob("*.safetensors")) for name, value in load_file(path).items()}
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, value in original_tensors(weights, config):
        if shards[-1] and sum(one.nbytes for one in shards[-1].values()) + value.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = value.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / name, {"format": "pt"})
    total = sum(value.nbytes for tensors in shards for value in tensors.values())
    places = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    files = {
        "model.safetensors.index.json": {"metadata": {"total_size": total}, "weight_map": places},
        "config.json": original_config(config),
        "generation_config.json": {"chat_format": "chatml", "do_sample": False, "max_window_size": 6144},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in KEPT:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    return folder


def main(argv: Sequence[str] | None = None) -> int:
    """Build into a scratch folder, then rename, so that the target is never half-written."""
    parser = argparse.ArgumentParser(description="Write a base in the layout of the original Qwen.")
    parser.add_argument("source", type=Path, help="a Llama- or Qwen2-style model folder")
    parser.add_argument("target", type=Path, help="the folder to write, replaced if it is there")
    options = parser.parse_args(argv)
    target: Path = options.target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".qwen1-", dir=target.parent) as scratch:
        folder = build(options.source, Path(scratch) / "base")
        if target.exists():
            shutil.move(target, Path(scratch) / "old")
        folder.rename(target)
    print(f"{target.name}: written in the original Qwen layout")
    return 0


if __name__ == "__main__":
    sys.exit(main())
