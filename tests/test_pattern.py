from __future__ import annotations

import time

import pytest

from finetune import pattern


def test_a_search_ends() -> None:
    wanted = pattern.compiled(r"^(?:a|aa)+$")
    assert pattern.search(wanted, "aaa")
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        pattern.search(wanted, "a" * 60 + "!")
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("bad", ["(", "[a", "(?P<x>a)(?P<x", "a{3,2}", "*"])
def test_a_pattern_that_is_none(bad: str) -> None:
    with pytest.raises(ValueError, match="position"):
        pattern.compiled(bad)
