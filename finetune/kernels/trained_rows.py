"""A few rows of embedding and head that are trained while the rest stays frozen (PEFT's trainable tokens).

PEFT copies the whole matrix into a changed one at each forward, 1.5 GB each for a 152k vocabulary of width 5120. Here
only what the trained rows touch is computed anew: the places of their tokens in the embedding's output, their columns
in the head's. The rows are fp32 masters, as LoRA's matrices are.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer


def reference(weight: torch.Tensor, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The matrix by its definition. weight: [vocabulary, hidden], rows: [n, hidden], ids: [n] → as ``weight``."""
    return weight.index_copy(0, ids, rows.to(weight.dtype))


class TrainedRows(TrainableTokensLayer):  # type: ignore[misc]
    """PEFT's parameters, names and switches with this module's arithmetic."""

    def forward_adapters(self, x: torch.Tensor, active_adapters: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        known = isinstance(self.base_layer, (torch.nn.Embedding, torch.nn.Linear))
        if self.disable_adapters or self.merged or len(active_adapters) != 1 or not known:
            return super().forward_adapters(x, active_adapters, *args, **kwargs)  # type: ignore[no-any-return]
        name = active_adapters[0]
        rows = self.trainable_tokens_delta[name]
        ids = torch.tensor(self.token_indices[name], device=x.device)
        y: torch.Tensor = self.base_layer(x)
        if isinstance(self.base_layer, torch.nn.Linear):
            return y.index_copy(-1, ids, x @ rows.to(x.dtype).T)
        hits: torch.Tensor = x[..., None] == ids
        values = rows.to(y.dtype)[hits.int().argmax(dim=-1)]
        return torch.where(hits.any(dim=-1, keepdim=True), values, y)


def settle(model: torch.nn.Module) -> None:
    """Give every such layer of a PEFT model this arithmetic and fp32 masters, in place."""
    layers: list[Any] = [module for module in model.modules() if type(module) is TrainableTokensLayer]
    for layer in layers:
        layer.__class__ = TrainedRows
        for rows in layer.trainable_tokens_delta.values():
            rows.data = rows.data.float()
