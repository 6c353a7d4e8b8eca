"""LogN attention: beyond the length it was trained at, a query is scaled by the logarithm of its position.

The original Qwen does this in evaluation only (modeling_qwen.py, logn_tensor); a recipe with ``rope: …+logn`` does it
in training too, so that both see one model. Plain transformers has no place for it.
"""

from __future__ import annotations

import math
from typing import Any

import torch

NAME = "finetune_logn"


def scaled(query: torch.Tensor, positions: torch.Tensor, start: int) -> torch.Tensor:
    """Multiply the query at position p (counted from 1) by ln p / ln start where p > start.

    Args:
        query: [batch, heads, tokens, head_dim]; positions: [batch or 1, tokens], counted from 0.
    """
    place = (positions + 1).clamp(min=start).to(torch.float32)
    factor = place.log() / math.log(start)
    return query * factor[:, None, :, None].to(query.dtype)


def _dense(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' own dense attention on scaled queries: for generation with its cache."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    query = scaled(query, position_ids, module.config.logn_from)
    found: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, position_ids=position_ids, **arguments
    )
    return found


def register() -> str:
    """Make the attention known to transformers under the returned name, with the masks that its own dense one gets."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, _dense)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME
