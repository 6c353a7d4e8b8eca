"""Do two models answer alike? Any two of: a base, an adapter on its base, a merged model, a GGUF file.

Compared are whole next-token distributions at the same positions of the same rows, as a merge compares them.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune import base as bases
from finetune import certify, gguf_file, hardware, llamacpp, model, proof, source, tokenizer, trained
from finetune.base import Base
from finetune.dataset import Example
from finetune.errors import EnvironmentFault, FinetuneError, ModelError
from finetune.objectives import sft
from finetune.terminal import Progress, Terminal
from finetune.trained import Trained

BOUND = 1e-3
"""Mean KL in nats, where no other is given: what a merge must keep."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """One of the two. ``given`` of an adapter with its base; a GGUF file has no ``base``."""

    path: Path
    kind: str
    base: Base | None = None
    given: Trained | None = None


def prove(
    first: str, second: str, terminal: Terminal, *, rows: Path | None = None, bound: float = BOUND
) -> dict[str, Any]:
    """Compare two models; → the figures.

    ``first`` and ``second``: a run's folder, an adapter's, a model's (or its id on the hub, if it is on this disk), or
    a ``.gguf`` file. ``rows``: a data file to ask; else the held-out rows of a run among the two, else probes.

    Raises:
        FinetuneError: the mean KL is above ``bound``.
        ModelError: one of them is no model, or they do not read the same tokens.
        EnvironmentFault: a GGUF file, and llama-cpp-python cannot be used here.
    """
    pair = [_open(word, terminal) for word in (first, second)]
    base = next((one.base for one in pair if one.base is not None), None)
    if base is None:
        raise ModelError("two GGUF files have no tokenizer to ask with", first, "name a model's folder for one of them")
    samples = _rows(pair, base, rows)
    for one in pair:
        if base.shape.scored != (one.base is not None and one.base.shape.scored):
            what = "one of them is a reward model and the other writes text"
            raise ModelError(what, f"{first} and {second}", "compare two of a kind")
        _refuse_other_tokens(one, base, samples)
    answers = []
    for one in pair:
        terminal.say(f"asking {one.path}: {one.kind}")
        answers.append(_answers(one, pair, samples, terminal))
        gc.collect()
    width = min(found.shape[1] for found in answers)  # rows that pad a vocabulary are asked of nobody
    if width > 1:  # rewards are no distribution
        answers = [found[:, :width].log_softmax(dim=-1) for found in answers]
    found = proof.compare(answers[0], answers[1], bound)
    losses = [proof.loss(each, samples) for each in answers]
    for line in _table(pair, losses, found):
        terminal.say(line)
    result = found.to_dict() | {"losses": dict(zip((first, second), losses, strict=True))}
    if not found.holds:
        fix = "they are not the same model; --bound N allows more, as a quantised one needs it"
        raise FinetuneError(f"mean KL {found.mean_kl:.1e} nats, bound {bound:.0e}", f"{first} and {second}", fix)
    return result


def _open(word: str, terminal: Terminal) -> Model:
    path = Path(word)
    if path.suffix == ".gguf":
        if why := llamacpp.unusable():
            raise EnvironmentFault(f"a GGUF file cannot be asked: {why}", word, "pip install 'finetune-qwen[llamacpp]'")
        gguf_file.read(path)
        return Model(path=path, kind="GGUF, by llama.cpp")
    if (path / "config.json").is_file() or not path.is_dir():
        found = source.find(word, None)
        if found is None:
            raise ModelError("no model is here", word, "name a run, an adapter, a model's folder or a .gguf file")
        return Model(path=path, kind="a model", base=bases.inspect(found.folder))
    given = trained.of(path, terminal)
    held = f"{given.form.weights}, computed in {given.form.compute}"
    return Model(path=path, kind=f"an adapter on its base in {held}", base=given.base, given=given)


def _rows(pair: Sequence[Model], base: Base, file: Path | None) -> Sequence[Example]:
    ran = next((one.given for one in pair if one.given is not None and one.given.run is not None), None)
    return ran.rows if ran is not None and file is None else trained.rows_for(base, file)


def _refuse_other_tokens(one: Model, base: Base, samples: Sequence[Example]) -> None:
    """Raise ModelError where this model reads other tokens than the folder whose tokenizer asks."""
    what = "its vocabulary is not that of the other one"
    if one.base is base:
        return
    if one.base is not None:
        if tokenizer.of(one.base).get_vocab() != tokenizer.of(base).get_vocab():
            raise ModelError(what, str(one.path), f"compare it with a model that has the tokenizer of {base.folder}")
        return
    known = tokenizer.of(base).convert_ids_to_tokens(range(len(tokenizer.of(base))))
    found = gguf_file.read(one.path).values.get("tokenizer.ggml.tokens") or []
    if found[: len(known)] != known:
        raise ModelError(what, str(one.path), f"compare it with a file that was made of {base.folder}")


def _answers(one: Model, pair: Sequence[Model], samples: Sequence[Example], terminal: Terminal) -> torch.Tensor:
    """[positions, vocabulary] log-probabilities, fp32."""
    if one.base is None:
        return _of_gguf(one.path, samples, terminal)
    asking = Progress(terminal, f"asking {one.path.name}, batch")
    if one.given is not None:
        return proof.distributions(one.given.live(terminal, wide=certify.fits(one.base, certify.WIDE)), samples, asking)
    other = next((each.given for each in pair if each.given is not None), None)
    narrow = replace(certify.WIDE, weights="bf16", compute="bf16", device=hardware.detect().device)
    form = certify.proof_form(one.base, other.form if other is not None else narrow)
    fits = certify.fits(one.base, form)
    return proof.distributions((model.load_base if fits else model.stream_base)(one.base, form), samples, asking)


def _of_gguf(path: Path, samples: Sequence[Example], terminal: Terminal) -> torch.Tensor:
    """The same positions, asked of llama.cpp row by row."""
    batch = sft.collate(proof.asked(samples))
    rows = [batch.ids[0, start:end].tolist() for start, end in zip(batch.bounds[:-1], batch.bounds[1:], strict=True)]
    with tempfile.TemporaryDirectory(prefix="finetune-prove-") as scratch:
        out = Path(scratch) / "logits.npy"
        request = {
            "verb": "logits",
            "model": str(path.absolute()),
            "rows": rows,
            "at": batch.predictors.tolist(),
            "out": str(out),
        }
        llamacpp.ask(request, Path(scratch), "asking llama.cpp", terminal.say)
        return torch.from_numpy(np.load(out, allow_pickle=False)).log_softmax(dim=-1)[: proof.POSITIONS]


def _table(pair: Sequence[Model], losses: Sequence[float], found: proof.Proof) -> list[str]:
    width = max(len(str(one.path)) for one in pair) + 3
    lines = [f"{f'{found.positions} positions':<{width}}{'loss':>9}"]
    lines += [f"{one.path!s:<{width}}{loss:>9.4f}" for one, loss in zip(pair, losses, strict=True)]
    agree = f"the same best token at {found.agreement:.1%}"
    if found.apart is not None:
        agree = f"texts ranked alike {found.agreement:.1%}, rewards {found.apart:.1e} apart at most"
    return [*lines, f"mean KL {found.mean_kl:.1e} nats (at most {found.bound:.0e}), max {found.max_kl:.1e}; {agree}"]
