"""The tensors of a Qwen- or Llama-style decoder, by arithmetic on its config: no weights and no torch needed.

``plan`` uses it to check a folder, to list what an adapter will touch and to predict memory; a family's file says
which of the optional parts (query/key/value bias, query/key norm) its layers have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune.known_models import KnownModel

_NUMBERS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
)
_LARGEST, _MOST = 100_000_000, {"num_hidden_layers": 1000}
"""Beyond these a number is a damaged file's, and listing the tensors would take for ever."""
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCORE = "score.weight"
"""A score head's only tensor: [1, hidden]."""
_SCORED = "ForSequenceClassification"


@dataclass(frozen=True, kw_only=True)
class Packing:
    """How a folder's linears lie in 4 bits. ``kind``: of ``forms``; ``group``: inputs that share a scale and a zero, 0
    for all of a row; ``biased_zeros``: each zero is stored less one."""

    kind: str
    group: int
    biased_zeros: bool

    def groups(self, inside: int) -> int:
        """How many there are in a row of so many inputs."""
        return -(-inside // self.group) if self.group else 1


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """The numbers of a decoder that decide its tensors and its cost. ``packing``: of its folder, where it has one."""

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    max_positions: int
    biased: tuple[str, ...]
    qk_norm: bool
    packing: Packing | None = None
    scored: bool = False
    """Whether it has a score head in place of a head over the vocabulary: a reward model."""

    @property
    def own_head(self) -> bool:
        """Whether it has a head over the vocabulary that is not the embedding."""
        return not (self.tied or self.scored)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DecoderShape:
        """Read the numbers of a ``config.json``.

        Raises KeyError for one that is missing, TypeError for one that is no positive whole number.
        """
        for key in _NUMBERS:
            if type(config[key]) is not int or not 0 < config[key] <= _MOST.get(key, _LARGEST):
                raise TypeError(f"{key} is {config[key]!r}")
        family = config["model_type"]
        heads = config["num_attention_heads"]
        return cls(
            family=family,
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", False)),
            max_positions=config["max_position_embeddings"],
            biased=_biased(config),
            qk_norm=family == "qwen3",
            scored=is_scored(config.get("architectures")),
        )

    @classmethod
    def from_known(cls, known: KnownModel) -> DecoderShape:
        """The shape of a model that is not on the disk, from the committed table."""
        config = known._asdict() | {"model_type": known.family}
        return cls.from_config(config)

    def linear(self, kind: str) -> tuple[int, int]:
        """(out, in) features of one of the seven linears of a layer."""
        query, key_value = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (query, self.hidden),
            "k_proj": (key_value, self.hidden),
            "v_proj": (key_value, self.hidden),
            "o_proj": (self.hidden, query),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }[kind]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor name of the checkpoint with its shape; a tied head has none of its own."""
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            found |= {f"model.layers.{layer}.{name}": shape for name, shape in self._layer().items()}
        found["model.norm.weight"] = (self.hidden,)
        if self.own_head:
            found["lm_head.weight"] = (self.vocab, self.hidden)
        if self.scored:
            found[SCORE] = (1, self.hidden)
        return found

    def _layer(self) -> dict[str, tuple[int, ...]]:
        tensors: dict[str, tuple[int, ...]] = {}
        for kind in LINEARS:
            block = "mlp" if kind in LINEARS[4:] else "self_attn"
            tensors[f"{block}.{kind}.weight"] = self.linear(kind)
            if kind in self.biased:
                tensors[f"{block}.{kind}.bias"] = self.linear(kind)[:1]
        if self.qk_norm:
            tensors |= {"self_attn.q_norm.weight": (self.head_dim,), "self_attn.k_norm.weight": (self.head_dim,)}
        return tensors | {"input_layernorm.weight": (self.hidden,), "post_attention_layernorm.weight": (self.hidden,)}

    def linear_parameters(self) -> int:
        """Parameters in the seven linears of all layers: what is quantised, and what a token's FLOPs run over."""
        return self.layers * sum(out * inside for out, inside in map(self.linear, LINEARS))

    def parameters(self) -> int:
        total = 0
        for shape in self.tensors().values():
            size = 1
            for side in shape:
                size *= side
            total += size
        return total


def is_scored(architectures: Any) -> bool:
    """Whether a config's ``architectures`` name a model with a score head."""
    return isinstance(architectures, list) and any(str(name).endswith(_SCORED) for name in architectures)


def _biased(config: dict[str, Any]) -> tuple[str, ...]:
    """The linears with a bias: q, k, v in every Qwen2; all of a block where the other families' switches say so."""
    if config["model_type"] == "qwen2":
        return LINEARS[:3]
    attention = LINEARS[:4] if config.get("attention_bias") else ()
    return attention + (LINEARS[4:] if config.get("mlp_bias") else ())
