"""Llama's layout: ``LlamaForCausalLM``, which many publishers use; SmolLM2, the base of our tests, among them.

Templates differ from one publisher to the next, hence several stop tokens: ``<|im_end|>`` (SmolLM2 and other ChatML
models), ``<|eot_id|>`` (Llama 3), ``</s>`` (Llama 2 and Zephyr-style models).

Sources: the models' tokenizer and chat template; the licence of SmolLM2 is the one that its package states. Meta's own
models carry Meta's community licences, which are not described here.
"""

from finetune.families import APACHE

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STOP_TOKENS = ("<|im_end|>", "<|eot_id|>", "</s>")
TEMPLATE = "the checkpoint's own; ChatML for SmolLM2, whose default system prompt names the model"
LICENSES = {"SmolLM2-135M-Instruct": APACHE}
