"""How far a model's distributions of the next token are from a teacher's, in chunks, with the gradient made on the way.

As in ``cross_entropy``, only supervised positions pass a head, a chunk at a time, the model's and the teacher's side by
side; each chunk's gradient is formed at once, and the logits of both are dropped. With p the teacher's distribution, q
the model's, both of logits divided by the temperature, and m = (1 - beta) q + beta p:

    forward_kl   KL(p || q)
    reverse_kl   KL(q || p)
    jsd          beta KL(p || m) + (1 - beta) KL(q || m)

the generalised Jensen-Shannon divergence of R. Agarwal et al., *On-Policy Distillation of Language Models*, 2024,
equation 1; forward is what G. Hinton et al., *Distilling the Knowledge in a Neural Network*, 2015, minimise. There is
no factor of temperature squared. Two heads of different heights (vocabularies are padded to round numbers) are compared
over the rows that both have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy, linear, pad

from finetune.kernels.cross_entropy import chunk_rows, wide

_SHARE = 4
"""Both models' distributions, their difference and its gradient are there at once: a quarter of the rows takes the
memory of cross-entropy's."""


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What is minimised: alpha times the cross-entropy of the answers, and 1 - alpha times the divergence."""

    divergence: str
    beta: float | None
    temperature: float
    alpha: float


@dataclass(frozen=True, kw_only=True)
class Whole:
    """A teacher's last hidden states at the predictors, and its head. hidden: [n, its width]."""

    hidden: torch.Tensor
    head: torch.nn.Module

    def at(self, part: slice) -> Whole:
        return Whole(hidden=self.hidden[part], head=self.head)


@dataclass(frozen=True, kw_only=True)
class Top:
    """A teacher's likeliest tokens at a temperature. ids, log_probs: [n, k]; rest: [n], the log-probability of all
    others together; all of them among the first ``width`` tokens of the vocabulary.
    """

    ids: torch.Tensor
    log_probs: torch.Tensor
    rest: torch.Tensor
    width: int

    def at(self, part: slice) -> Top:
        return Top(ids=self.ids[part], log_probs=self.log_probs[part], rest=self.rest[part], width=self.width)

    def to(self, device: torch.device) -> Top:
        ids, log_probs, rest = (one.to(device) for one in (self.ids, self.log_probs, self.rest))
        return Top(ids=ids, log_probs=log_probs, rest=rest, width=self.width)


Told = Whole | Top


def joined(parts: Sequence[Top]) -> Top:
    """What was told one after the other."""
    ids, log_probs, rest = (torch.cat([getattr(one, name) for one in parts]) for name in ("ids", "log_probs", "rest"))
    return Top(ids=ids, log_probs=log_probs, rest=rest, width=parts[0].width)


class Found(NamedTuple):
    """Of each position: what is minimised, with a graph; cross-entropy and divergence, without. [n] each."""

    mixed: torch.Tensor
    cross_entropy: torch.Tensor
    divergence: torch.Tensor


def between(log_q: torch.Tensor, log_p: torch.Tensor, aim: Aim) -> tuple[torch.Tensor, torch.Tensor]:
    """(divergence [n], its slope with respect to what log_q is the log-softmax of [n, outcomes])."""
    q, p = log_q.exp(), log_p.exp()
    if aim.divergence == "forward_kl":
        return (p * (log_p - log_q)).sum(-1), q - p
    if aim.divergence == "reverse_kl":
        gain = log_q - log_p
        found = (q * gain).sum(-1)
        return found, q.mul_(gain.sub_(found[:, None]))
    beta = aim.beta if aim.beta is not None else 0.5
    log_m = torch.logaddexp(log_q + math.log1p(-beta), log_p + math.log(beta))
    gain = (log_q - log_m).mul_(1 - beta)
    ours = (q * gain).sum(-1)
    return beta * (p * (log_p - log_m)).sum(-1) + ours, q * (gain - ours[:, None])


def _outcomes(logits: torch.Tensor, told: Told, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(log q, log p) [n, outcomes] over what is told apart: every token, or the likeliest and all others as one."""
    if isinstance(told, Whole):
        with torch.no_grad():
            theirs = wide(told.head(told.hidden))
            width = min(theirs.shape[1], logits.shape[1])
            log_p = (theirs[:, :width] / temperature).log_softmax(-1).to(logits.dtype)
        return (logits[:, :width] / temperature).log_softmax(-1), log_p
    width = min(told.width, logits.shape[1])
    scaled = logits[:, :width] / temperature
    picked, total = scaled.gather(1, told.ids), scaled.logsumexp(-1, keepdim=True)
    if told.ids.shape[1] == width:
        return picked - total, told.log_probs.to(logits.dtype)
    others = scaled.scatter(1, told.ids, -math.inf).logsumexp(-1, keepdim=True)
    log_q = torch.cat([picked, others], dim=1) - total
    return log_q, torch.cat([told.log_probs, told.rest[:, None]], dim=1).to(logits.dtype)


def _by_token(logits: torch.Tensor, told: Told, slope: torch.Tensor, t: float) -> torch.Tensor:
    """A slope over outcomes as one over the logits. → [n, vocabulary]"""
    if isinstance(told, Whole):
        return pad(slope / t, (0, logits.shape[1] - slope.shape[1]))
    width = min(told.width, logits.shape[1])
    count = told.ids.shape[1]
    if count == width:
        found = torch.zeros_like(logits[:, :width])
    else:  # what moves the others together moves each by its share in them
        scaled = (logits[:, :width] / t).scatter(1, told.ids, -math.inf)
        found = scaled.softmax(-1).mul_(slope[:, count:])
    return pad(found.scatter_(1, told.ids, slope[:, :count]).div_(t), (0, logits.shape[1] - width))


class _FrozenHead(torch.autograd.Function):
    """``losses`` through a head that is not trained."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, told: Told, aim: Aim
    ) -> tuple[torch.Tensor, ...]:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        entropies = torch.empty(len(targets), dtype=wide(hidden[:1]).dtype, device=hidden.device)
        divergences = torch.empty_like(entropies)
        rows = _rows(len(weight), hidden.device.type)
        for low in range(0, len(targets), rows):
            part = slice(low, low + rows)
            narrow = linear(hidden[part], weight)
            logits, theirs, wanted = wide(narrow), told.at(part), targets[part, None]
            total = logits.logsumexp(-1, keepdim=True)
            entropies[part] = (total - logits.gather(1, wanted)).squeeze(1)
            log_q, log_p = _outcomes(logits, theirs, aim.temperature)
            divergences[part], slope = between(log_q, log_p, aim)
            if gradient is not None:
                slope = _by_token(logits, theirs, slope, aim.temperature).mul_(1 - aim.alpha)
                if aim.alpha:  # d(-log p)/d logits = softmax - onehot
                    slope.add_((logits - total).exp_(), alpha=aim.alpha)
                    slope.scatter_add_(1, wanted, slope.new_full((1, 1), -aim.alpha).expand_as(wanted))
                gradient[part] = slope.to(narrow.dtype) @ weight
            del narrow, logits, log_q, log_p, slope  # before the next chunk has its own
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(entropies, divergences)
        return aim.alpha * entropies + (1 - aim.alpha) * divergences, entropies, divergences

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        if gradient is None:
            return None, None, None, None, None
        return (gradient * grad_output[:, None]).to(gradient.dtype), None, None, None, None


def losses(hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, told: Told, aim: Aim) -> Found:
    """What is minimised at each position, in fp32 or wider.

    hidden: [n, hidden], targets: [n]. A head that is trained, adapted or has a bias goes through the module itself,
    chunk by chunk with recomputation.
    """
    if type(head) is torch.nn.Linear and getattr(head, "bias", None) is None and not head.weight.requires_grad:
        return Found(*_FrozenHead.apply(hidden, head.weight, targets, told, aim))  # type: ignore[no-untyped-call]
    rows = _rows(int(getattr(head, "out_features", 1 << 17)), hidden.device.type)
    parts = [
        torch.utils.checkpoint.checkpoint(plain, hidden[part], head, targets[part], told.at(part), aim,
                                          use_reentrant=False)
        for part in (slice(low, low + rows) for low in range(0, len(targets), rows))
    ]  # fmt: skip
    return Found(*(torch.cat([part[place] for part in parts]) for place in range(3)))


def plain(hidden: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, told: Told, aim: Aim) -> Found:
    """``losses`` with all logits at once and torch's own gradient."""
    logits = wide(head(hidden))
    entropy = cross_entropy(logits, targets, reduction="none")
    log_q, log_p = _outcomes(logits, told, aim.temperature)
    q, p = log_q.exp(), log_p.exp()
    if aim.divergence == "forward_kl":
        found = (p * (log_p - log_q)).sum(-1)
    elif aim.divergence == "reverse_kl":
        found = (q * (log_q - log_p)).sum(-1)
    else:
        beta = aim.beta if aim.beta is not None else 0.5
        log_m = ((1 - beta) * q + beta * p).log()
        found = beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)
    return Found(aim.alpha * entropy + (1 - aim.alpha) * found, entropy.detach(), found.detach())


def top(told: Told, count: int, temperature: float, width: int) -> Top:
    """The ``count`` likeliest tokens of what a teacher tells, among the first ``width`` of its vocabulary, at a
    temperature; what is such a list already stays it. On the CPU, without a graph."""
    if isinstance(told, Top):
        return told.to(torch.device("cpu"))
    parts = []
    rows = _rows(int(getattr(told.head, "out_features", 1 << 17)), told.hidden.device.type)
    with torch.no_grad():
        for low in range(0, len(told.hidden), rows):
            scaled = wide(told.head(told.hidden[low : low + rows]))[:, :width] / temperature
            total = scaled.logsumexp(-1, keepdim=True)
            picked, ids = scaled.topk(min(count, scaled.shape[1]), dim=-1)
            others = scaled.scatter_(1, ids, -math.inf).logsumexp(-1, keepdim=True)
            parts.append((ids, picked - total, (others - total).squeeze(1)))
    ids, log_probs, rest = (torch.cat(one).cpu() for one in zip(*parts, strict=True))
    return Top(ids=ids, log_probs=log_probs, rest=rest, width=width)


def kl(hidden: torch.Tensor, head: torch.nn.Module, told: Top, temperature: float) -> torch.Tensor:
    """KL(p || q) at each position over what ``told`` tells apart, without a graph. hidden: [n, hidden] → [n], fp64."""
    aim, found = Aim(divergence="forward_kl", beta=None, temperature=temperature, alpha=0.0), []
    rows = _rows(int(getattr(head, "out_features", 1 << 17)), hidden.device.type)
    with torch.no_grad():
        for low in range(0, len(hidden), rows):
            part = slice(low, low + rows)
            found.append(between(*_outcomes(wide(head(hidden[part])), told.at(part), aim.temperature), aim)[0].double())
    return torch.cat(found)


def _rows(vocab: int, device: str) -> int:
    """Positions whose logits are formed at once."""
    return max(16, chunk_rows(vocab, device) // _SHARE)
