"""Qwen1.5, Qwen2 and Qwen2.5: ``Qwen2ForCausalLM``, with biases on q, k and v and none elsewhere.

Sources: the models' config.json and generation_config.json for layers and stop tokens; for licences the models' cards
and the README of the Qwen2.5 repository (all Apache-2.0 but 3B and 72B). Qwen1.5-14B's card links terms in the style
of the first Qwen's; its own text was not seen, so its duties here are the cautious reading.
"""

from finetune.families import APACHE, TONGYI, Licence

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STOP_TOKENS = ("<|im_end|>",)
TEMPLATE = "ChatML: <|im_start|>role, newline, content, <|im_end|>, newline; a default system prompt when none is given"

_RESEARCH = Licence(
    "qwen-research",
    "Qwen Research licence agreement",
    "research and other non-commercial use only; pass the agreement on and show 'Built with Qwen' or 'Improved using "
    "Qwen'",
)
_QWEN = Licence(
    "qwen",
    "Qwen licence agreement",
    "pass the agreement on, show 'Built with Qwen' or 'Improved using Qwen'; ask for a licence above 100 million users "
    "a month",
)
LICENSES = {
    "Qwen1.5-14B": TONGYI,
    "Qwen1.5-14B-Chat": TONGYI,
    "Qwen2.5-3B": _RESEARCH,
    "Qwen2.5-3B-Instruct": _RESEARCH,
    "Qwen2.5-72B": _QWEN,
    "Qwen2.5-72B-Instruct": _QWEN,
} | {f"Qwen2.5-{size}{kind}": APACHE for size in ("0.5B", "1.5B", "7B", "14B", "32B") for kind in ("", "-Instruct")}
