"""What must hold between keys of a recipe, and for every text in it, that a schema cannot say.

Works on the merged tree of plain values, not on the validated models: a type fault elsewhere must not hide these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from finetune.recipe import adapter_methods, judging, keeping, objective_keys, paths
from finetune.recipe.words import Finding, shown
from finetune.recipe.yamlfile import KeyPath

_VARIABLE = re.compile(r"\$(\{|\(|[A-Za-z_])")
_ROUNDING = 1e-6
_FOUR_BIT = ("nf4", "fp4")
_WHOLE = ("int8", "torchao_int8", "gptq", "awq")
"""Forms of which no process holds a part."""
_PRECONDITIONED = ("lora_fa", "riemannian")


def check(tree: dict[str, Any]) -> Iterator[Finding]:
    """Every fault between keys; a key of the wrong type is skipped here, the models report it."""
    yield from _variables(tree, ())  # first: only one fault of a key is shown, and a path with $HOME is not "missing"
    yield from _data(tree)
    yield from _one_of(tree, "train", ("steps", "epochs"))
    yield from _one_of(tree, "train", ("examples_per_step", "tokens_per_step"))
    yield from _train(tree)
    yield from _kernels(tree)
    yield from _shard(tree)
    yield from _quantize(tree)
    yield from _start(tree)
    yield from judging.check(tree)
    yield from judging.rewards(tree)
    yield from keeping.check(tree)
    yield from objective_keys.check(tree)
    yield from paths.check(tree)


def _one_of(tree: dict[str, Any], section: str, keys: tuple[str, str]) -> Iterator[Finding]:
    content = tree.get(section)
    if not isinstance(content, dict):
        return
    written = [key for key in keys if content.get(key) is not None]
    if not written:
        yield Finding((section, keys[0]), f"missing: {keys[0]} or {keys[1]} must be given", f"add '{keys[0]}:'")
    elif len(written) == 2:
        yield Finding((section, keys[1]), f"cannot be given together with {keys[0]}", "keep one; null switches one off")


def _data(tree: dict[str, Any]) -> Iterator[Finding]:
    data = tree.get("data")
    if not isinstance(data, dict):
        return
    sources = data.get("sources")
    several = sources if isinstance(sources, list) else []
    if data.get("train_path") is None and not several:
        yield Finding(("data", "train_path"), "missing: train_path or sources must be given", "add 'train_path:'")
    elif data.get("train_path") is not None and several:
        yield Finding(("data", "sources"), "cannot be given together with train_path", "keep one")
    for key in ("format", "columns") if several else ():
        if data.get(key) not in (None, "auto", {}) and data.get("eval_path") is None:
            yield Finding(("data", key), "has no meaning beside sources", f"give each source its own {key}")
    yield from _shares([source for source in several if isinstance(source, dict)])


def _shares(sources: list[dict[str, Any]]) -> Iterator[Finding]:
    """All sources have a share of the tokens, which together are 1, or none has."""
    shares = [source.get("share") for source in sources]
    given = [share for share in shares if isinstance(share, int | float) and not isinstance(share, bool)]
    if given and len(given) < len(shares):
        missing = next(index for index, share in enumerate(shares) if share is None or share not in given)
        yield Finding(("data", "sources", missing, "share"), "missing: the other sources have one", "add it")
    elif given and abs(sum(given) - 1) > _ROUNDING:
        what = f"the shares add to {sum(given):g}, not to 1"
        yield Finding(("data", "sources", len(given) - 1, "share"), what, "mend them")


def _train(tree: dict[str, Any]) -> Iterator[Finding]:
    steps, warmup = _number(tree, "train", "steps"), _number(tree, "train", "warmup")
    if steps is not None and warmup is not None and warmup > steps:
        yield Finding(("train", "warmup"), f"must not exceed steps ({steps}); found {warmup}", "lower it")
    length = _number(tree, "train", "max_length")
    for key in ("tokens_per_step", "micro_batch_tokens"):
        tokens = _number(tree, "train", key)
        if tokens is not None and length is not None and tokens < length:
            yield Finding(("train", key), f"must hold one example of max_length ({length}); found {tokens}", "raise it")
    yield from _optimizer(tree)


def _kernels(tree: dict[str, Any]) -> Iterator[Finding]:
    if _value(tree, "train", "kernels") == "off" and _value(tree, "train", "compile") is True:
        yield Finding(("train", "compile"), "compiles parts of the kernels, which are off", "remove one of the two")


def _shard(tree: dict[str, Any]) -> Iterator[Finding]:
    """Of a layer in shards nothing can be looked at while the adapter is put on."""
    if _value(tree, "train", "shard") != "fsdp":
        return
    at, adapter = ("train", "shard"), tree.get("adapter")
    fields = adapter if isinstance(adapter, dict) else {}
    if tree.get("adapters") is not None:
        yield Finding(at, "several adapters are trained by one process, which holds the whole base", "remove one")
    if (word := _value(tree, "quantize", "weights")) in _WHOLE:
        yield Finding(at, f"{word} weights are not put in shards", "take quantize.weights: nf4, or bf16")
    if fields.get("method", "lora") != "lora":
        yield Finding(at, f"{shown(fields['method'])} looks at whole layers", "take adapter.method: lora")
    if fields.get("use_dora") is True:
        yield Finding(at, "DoRA looks at whole layers", "take use_dora: false")
    if (word := adapter_methods.start_of(fields)) in (*adapter_methods.OFF_BASE, "eva", "mica"):
        yield Finding(at, f"init_lora_weights: {word} looks at whole layers", "take true, gaussian or orthogonal")
    whole = fields.get("modules_to_save")
    inside = [name for name in whole if name not in ("embed_tokens", "lm_head")] if isinstance(whole, list) else []
    if inside:
        yield Finding(
            at, f"modules_to_save: {shown(inside[0])} is in the layers", "take embed_tokens and lm_head alone"
        )


def _optimizer(tree: dict[str, Any]) -> Iterator[Finding]:
    kind, method = _value(tree, "train", "optimizer"), _value(tree, "adapter", "method")
    if isinstance(method, str) and method != "lora":
        if kind in _PRECONDITIONED:
            yield Finding(("train", "optimizer"), f"{kind} moves LoRA's A and B, which {method} has not", "take adamw")
        if _value(tree, "train", "lora_plus_ratio") is not None:
            yield Finding(("train", "lora_plus_ratio"), f"is the rate of LoRA's B, which {method} has not", "remove it")
    if kind not in _PRECONDITIONED:
        return
    if _value(tree, "train", "lora_plus_ratio") is not None:
        why = "B has its only rate there" if kind == "lora_fa" else "it evens out the rates of A and B itself"
        yield Finding(("train", "lora_plus_ratio"), f"has no meaning with {kind}: {why}", "remove it, or take adamw")
    if _value(tree, "adapter", "use_dora") is True:
        what = f"{kind} is derived for the update s B A, which DoRA normalises"
        yield Finding(("train", "optimizer"), what, "take adamw, or use_dora: false")


def _start(tree: dict[str, Any]) -> Iterator[Finding]:
    """Going on with an adapter's weights leaves nothing to begin otherwise."""
    adapter = tree.get("adapter")
    if not isinstance(adapter, dict) or adapter.get("start_from") is None:
        return
    if adapter.get("method", "lora") != "lora":
        yield Finding(("adapter", "start_from"), "only a LoRA can be gone on with", "remove it, or take method: lora")
    elif (word := adapter_methods.start_of(adapter)) in (*adapter_methods.OFF_BASE, "eva"):
        what = f"{word} has no meaning with start_from, whose weights the adapter begins with"
        yield Finding(("adapter", "init_lora_weights"), what, "remove one of the two")


def _quantize(tree: dict[str, Any]) -> Iterator[Finding]:
    weights = _value(tree, "quantize", "weights")
    if _value(tree, "quantize", "double") is False and isinstance(weights, str) and weights not in _FOUR_BIT:
        yield Finding(("quantize", "double"), f"has no meaning with {shown(weights)} weights", "remove it")
    adapter, method = tree.get("adapter"), _value(tree, "adapter", "method")
    if isinstance(adapter, dict) and isinstance(method, str) and isinstance(weights, str):
        for key, reason in adapter_methods.refusals(method, adapter, weights):
            yield Finding(
                ("adapter", key), f"{reason} (docs/capabilities.md)", "take another method or quantize.weights"
            )


def _variables(node: Any, at: KeyPath) -> Iterator[Finding]:
    """A recipe means the same on every machine: nothing in it comes from the environment."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _variables(value, (*at, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _variables(value, (*at, index))
    elif isinstance(node, str) and _VARIABLE.search(node):
        yield Finding(at, "environment variables are not expanded in a recipe", "write the value, or use --set")


def _value(tree: dict[str, Any], section: str, key: str) -> Any:
    content = tree.get(section)
    return content.get(key) if isinstance(content, dict) else None


def _number(tree: dict[str, Any], section: str, key: str) -> int | float | None:
    value = _value(tree, section, key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
