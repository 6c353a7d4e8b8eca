"""Has the base learned the tokens that its template writes? Seen in the weights, before anything is trained.

A base model that never saw ChatML has rows for ``<|im_start|>`` and ``<|im_end|>`` that nobody trained: a LoRA on the
linears cannot mend them, the model never ends its answers, and training wte and lm_head whole costs 1.557 billion
parameters. Training those very rows costs 20,480.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from finetune.errors import RecipeError
from finetune.shards import Reader

if TYPE_CHECKING:
    from finetune.base import Base
    from finetune.recipe import Located
    from finetune.renderer import Renderer

_MATRICES = ("model.embed_tokens.weight", "lm_head.weight")
_SAMPLE = 256
_SHORT = 0.4
"""Share of the ordinary rows' median length below which a row was hardly ever touched."""
_ALIKE = 0.9
"""Cosine from which a row is one of those that no token ever used: they are pushed about together."""


@dataclass(frozen=True, kw_only=True)
class ControlTokens:
    """Tokens whose rows are trained beside the adapter, by id, and what to say of it."""

    ids: dict[str, int]
    notes: tuple[str, ...] = ()

    def fields(self, own_head: bool) -> dict[str, list[int]]:
        """PEFT's ``trainable_token_indices``. A bare list would reach the embedding alone: an untied head is named."""
        if not self.ids:
            return {}
        ids = sorted(self.ids.values())
        return {"embed_tokens": ids} | ({"lm_head": ids} if own_head else {})


def resolve(located: Located, base: Base, renderer: Renderer, met: Collection[int] = ()) -> ControlTokens:
    """The recipe's ``trainable_tokens``: those it names, or under ``auto`` those of the template that look untrained.

    ``met``: ids of added tokens that the samples hold; a template writes more of them around tools and thinking.

    Raises:
        RecipeError: a name that is no token, or rows that the adapter trains already.
    """
    wanted, where = located.recipe.trainable_tokens, located.where("trainable_tokens")
    taken, method = _trained_whole(located), located.recipe.adapter.method
    if method != "lora":
        if isinstance(wanted, list) and wanted:
            raise RecipeError(f"PEFT trains no rows beside {method}", where, "remove trainable_tokens, or take lora")
        found = untrained(base, template_tokens(renderer, met), _unused(base, renderer)) if not taken else {}
        note = (
            f"{', '.join(found)} look untrained in this base, and {method} cannot train rows: the model may never end"
        )
        return ControlTokens(ids={}, notes=(note,) if found else ())
    if isinstance(wanted, list):
        if taken and wanted:
            raise RecipeError(f"{taken} is trained by the adapter already", where, "remove trainable_tokens")
        return ControlTokens(ids={name: _id_of(name, renderer, where) for name in wanted})
    if taken:
        return ControlTokens(ids={})
    found = untrained(base, template_tokens(renderer, met), _unused(base, renderer))
    if not found:
        return ControlTokens(ids={})
    names = ", ".join(found)
    if wanted == "none":
        note = f"{names} look untrained in this base, and trainable_tokens is none: the model may never end an answer"
        return ControlTokens(ids={}, notes=(note,))
    size = len(found) * base.shape.hidden * (2 if base.shape.own_head else 1)
    note = (
        f"{names} look untrained in this base: their rows are trained too ({size:,} parameters), as "
        f"trainable_tokens: [{names}] says"
    )
    return ControlTokens(ids=found, notes=(note,))


def _trained_whole(located: Located) -> str:
    fields = located.recipe.adapter.fields
    named = [*(fields.get("modules_to_save") or ()), *_listed(fields.get("target_modules"))]
    return next((name for name in named if name in ("lm_head", "embed_tokens")), "")


def _listed(value: object) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else ["lm_head"] if "lm_head" in str(value) else []


def _id_of(name: str, renderer: Renderer, where: str) -> int:
    ids = renderer.encode(name)
    if len(ids) != 1:
        raise RecipeError(f"{name!r} is not one token of this model but {len(ids)}", where, "name single tokens")
    return ids[0]


def template_tokens(renderer: Renderer, met: Collection[int] = ()) -> dict[str, int]:
    """The control tokens that a conversation is framed with, and those ``met`` in samples, by name."""
    from finetune.conversation import Conversation, Turn

    special = renderer.tokenizer.added_tokens_decoder
    frame = renderer.prompt(Conversation((Turn(role="user", content="x"),))) + renderer.encode(renderer.stop_token)
    return {special[token].content: token for token in dict.fromkeys([*frame, *sorted(met)]) if token in special}


def _unused(base: Base, renderer: Renderer) -> list[int]:
    """Rows that no text has ever reached: beyond the tokenizer's ids, and the spare tokens of the Qwen family."""
    spare = [token for token, entry in renderer.tokenizer.added_tokens_decoder.items() if "extra_" in entry.content]
    return [*spare, *range(len(renderer.tokenizer), base.shape.vocab)][-_SAMPLE:]


def untrained(base: Base, tokens: dict[str, int], unused: Sequence[int]) -> dict[str, int]:
    """Those of ``tokens`` whose row in the embedding or the head looks as if no training had ever met it."""
    first = min([*tokens.values(), *unused, base.shape.vocab])
    ordinary = [index * first // _SAMPLE for index in range(min(_SAMPLE, first))]
    found: dict[str, int] = {}
    with Reader(base) as reader:
        for matrix in _MATRICES[: 2 if base.shape.own_head else 1]:
            usual = reader.rows(matrix, ordinary).float().norm(dim=1).median()
            spare = reader.rows(matrix, unused).float() if unused else torch.zeros(0, base.shape.hidden)
            rows = reader.rows(matrix, list(tokens.values())).float()
            for (name, token), row in zip(tokens.items(), rows, strict=True):
                if bool(row.norm() < _SHORT * usual) or _is_one_of(row, spare):
                    found[name] = token
    return found


def _is_one_of(row: torch.Tensor, spare: torch.Tensor) -> bool:
    """Whether a row points where the unused rows point, when these point one way at all."""
    if len(spare) < 2:
        return False
    middle = torch.nn.functional.normalize(spare, dim=1).mean(dim=0)
    if middle.norm() < _ALIKE:  # they point anywhere: nothing has pushed them about
        return False
    return bool(torch.cosine_similarity(row, middle, dim=0) > _ALIKE)
