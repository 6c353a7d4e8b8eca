"""llama.cpp's runtime, in the child process that ``llamacpp.ask`` starts: one request on standard input, its answer as
JSON on standard output.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def answer(request: dict[str, Any]) -> Any:
    """What ``llamacpp.ask`` says of each request."""
    import llama_cpp

    return {"probe": _probe, "quantise": _quantise, "tokens": _tokens, "greedy": _greedy, "logits": _logits}[
        request["verb"]
    ](llama_cpp, request)


def _probe(llama_cpp: Any, request: dict[str, Any]) -> Any:
    return llama_cpp.__version__


def _quantise(llama_cpp: Any, request: dict[str, Any]) -> None:
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{request['kind'].upper()}")
    paths = [request[key].encode() for key in ("model", "out")]
    if code := llama_cpp.llama_model_quantize(*paths, settings):
        raise RuntimeError(f"llama_model_quantize returned {code}")


def _tokens(llama_cpp: Any, request: dict[str, Any]) -> Any:
    opened = llama_cpp.Llama(request["model"], vocab_only=True, verbose=False)
    vocabulary = llama_cpp.llama_model_get_vocab(opened.model)
    found = [opened.tokenize(text.encode(), add_bos=False, special=True) for text in request["texts"]]
    ends = [index for index in request["ids"] if llama_cpp.llama_vocab_is_eog(vocabulary, index)]
    return {"tokens": found, "ends": ends, "adds_bos": bool(llama_cpp.llama_vocab_get_add_bos(vocabulary))}


def _greedy(llama_cpp: Any, request: dict[str, Any]) -> Any:
    opened = _opened(llama_cpp, request, max(map(len, request["prompts"])) + request["count"] + 8)
    answers = []
    for prompt in request["prompts"]:
        opened.reset()
        following = opened.generate(prompt, temp=0.0, repeat_penalty=1.0)
        answers.append([int(next(following)) for _ in range(request["count"])])
    return answers


def _logits(llama_cpp: Any, request: dict[str, Any]) -> None:
    import numpy as np

    opened = _opened(llama_cpp, request, max(map(len, request["rows"])) + 8, logits_all=True)
    found, before, wanted = [], 0, request["at"]
    for row in request["rows"]:
        places = [place - before for place in wanted if before <= place < before + len(row)]
        opened.reset()
        opened.eval(row)
        found.append(opened.scores[places].astype(np.float32))
        before += len(row)
    np.save(request["out"], np.concatenate(found), allow_pickle=False)


def _opened(llama_cpp: Any, request: dict[str, Any], room: int, **more: Any) -> Any:
    single = llama_cpp.GGML_TYPE_F32  # keys and values are kept in half precision otherwise
    return llama_cpp.Llama(
        request["model"], lora_path=request.get("adapter"), n_ctx=room, n_batch=room, type_k=single, type_v=single,
        verbose=False, **more,
    )  # fmt: skip


if __name__ == "__main__":
    print(json.dumps({"answer": answer(json.load(sys.stdin))}))
