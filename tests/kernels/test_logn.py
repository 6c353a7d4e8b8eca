"""LogN: by its formula, position by position. That it is the original's own is shown in tests/test_convert.py."""

from __future__ import annotations

import math

import torch

from finetune.kernels import logn


def test_queries_grow_with_the_logarithm_of_their_position() -> None:
    positions = torch.tensor([[0, 3, 4, 5, 100]])
    query = torch.ones(1, 2, 5, 3, dtype=torch.float64)
    found = logn.scaled(query, positions, 5)
    wanted = [1.0, 1.0, 1.0, math.log(6) / math.log(5), math.log(101) / math.log(5)]
    for index, factor in enumerate(wanted):
        assert torch.allclose(found[0, :, index], torch.full((2, 3), factor, dtype=torch.float64), atol=1e-6)
    assert found.dtype == query.dtype
