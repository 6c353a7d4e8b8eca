"""A tiny random base from a seed, offline: a folder that every step treats like a downloaded model.

It keeps what matters of the real ones: grouped key-value heads, q/k/v biases (Qwen2) or q/k norms (Qwen3), a byte-level
BPE with Qwen's split pattern and fused newlines, ChatML with a default system prompt, two stop tokens, and embedding
rows beyond the tokenizer's last id. Weights are drawn wide enough that attention decides the logits; the usual
initial scale (0.02) would leave them nearly uniform and hide errors of masks and positions.

The split pattern is not a matter of taste: for ``model_type: qwen2`` and ``qwen3`` AutoTokenizer rebuilds the tokenizer
with Qwen's own pattern and NFC, whatever tokenizer.json says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FAMILIES = ("qwen2", "qwen3", "llama")
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Single digits; the same pattern as Qwen2Tokenizer's.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
# In the byte alphabet "Ċ" is a newline and "Ġ" a blank. Role names are single tokens and newlines fuse, as in Qwen.
# "20" is never reached while digits are split one by one: it shows at once when a tokenizer has lost that split.
MERGES = (
    "Ċ Ċ|Ġ Ġ|Ġ t|h e|Ġt he|i n|e r|o n|a n|r e|Ġ a|Ġ d|Ġ f|Ġ i|Ġi s|Ġ o|Ġo f|a t|Ġd at|Ġdat e|u s|us er|"
    "s y|s t|e m|sy st|syst em|a s|as s|i st|ass ist|an t|assist ant|2 0"
)
TEMPLATE = """\
{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def write_tokenizer(folder: Path, family: str) -> int:
    """Write the tokenizer's three files; how many ids it has."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in MERGES.split("|"))]
    pieces += [left + right for left, right in pairs]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=pairs))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False)
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast" if family == "llama" else "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return int(tokenizer.get_vocab_size())


def config_of(family: str, ids: int, overrides: dict[str, Any]) -> Any:
    """The family's configuration with tiny sizes; ``overrides`` are its own field names."""
    from transformers import LlamaConfig, Qwen2Config, Qwen3Config

    fields = {
        "vocab_size": 64 * (ids // 64 + 1),  # always some rows that no token uses
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": ids - 1,
        "pad_token_id": ids - 3,
    }
    kinds = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
    return kinds[family](**(fields | overrides))


def draw_weights(model: Any, seed: int) -> None:
    """Fill every weight in the order of its name, so that the result hangs on the seed and the shapes alone."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:  # norms around one, biases around zero
                weight.copy_(noise * 0.1 + (1.0 if "norm" in name else 0.0))
            elif "embed" in name or "lm_head" in name:
                weight.copy_(noise * 0.25)  # logits of about two units, tied or not
            else:
                weight.copy_(noise * 1.5 / weight.shape[1] ** 0.5)


def build(
    folder: Path,
    seed: int = 0,
    *,
    family: str = "qwen2",
    dtype: str = "bfloat16",
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write a tiny base into ``folder`` (made if need be) and return it.

    ``overrides`` are fields of the family's configuration, such as ``tie_word_embeddings=True`` or
    ``num_hidden_layers=4``; ``max_shard_size="100KB"`` makes several shards.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is not one of {', '.join(FAMILIES)}")
    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    ids = write_tokenizer(folder, family)
    model = AutoModelForCausalLM.from_config(config_of(family, ids, overrides), dtype=torch.float32)
    draw_weights(model, seed)
    model = model.to(getattr(torch, dtype))
    model.generation_config = GenerationConfig(eos_token_id=[ids - 1, ids - 3], pad_token_id=ids - 3)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder
