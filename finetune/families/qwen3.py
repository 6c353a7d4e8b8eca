"""Qwen3 (dense): ``Qwen3ForCausalLM``, with norms on q and k and no biases.

Sources: the models' config.json and generation_config.json; the README of the Qwen3 repository says that all of its
open-weight models are Apache-2.0.
"""

from finetune.families import APACHE

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STOP_TOKENS = ("<|im_end|>",)
TEMPLATE = "ChatML without a default system prompt; answers may open with a <think> block"
LICENSES = {f"Qwen3-{size}{kind}": APACHE for size in ("0.6B", "1.7B", "4B", "8B", "14B") for kind in ("", "-Base")} | {
    "Qwen3-32B": APACHE
}
