"""The model card: everything in it comes from the run's own files, and its code is executed by a test."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from finetune import scores
from finetune.terms import Terms

Facts = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card is made of. ``scores``: name → numbers; ``provenance``: the manifest's; ``parts``: what is in it;
    ``end``: what is to be said of the run's end where evaluations chose it;
    ``vllm_rank``: the adapter's, 0 where vLLM cannot load it as it is."""

    name: str
    terms: Terms
    parts: tuple[str, ...]
    recipe: str
    scores: dict[str, Facts]
    provenance: Facts
    chat: bool
    thinking: str
    vllm_rank: int = 0
    score: tuple[str, int] | None = None
    """Of a reward model: the token that its texts end with, and the id that pads them."""
    end: tuple[str, ...] = ()

    def text(self) -> str:
        """README.md: the header that the hub reads, then facts for people."""
        return "\n".join([self._header(), *self._body()]) + "\n"

    def _header(self) -> str:
        from huggingface_hub import ModelCardData

        licence = self.terms.licence
        known = bool(licence and licence.on_hub)
        more: Facts = {} if known else {"license_name": licence.id if licence else "unknown"}
        if not known and (self.terms.texts or (licence and licence.text)):
            more["license_link"] = "LICENSE"
        merged = "merged" in self.parts
        if self.terms.base_on_hub:
            more |= {"base_model": self.terms.base, "base_model_relation": "finetune" if merged else "adapter"}
        data = ModelCardData(
            license=licence.id if licence and known else "other", library_name="transformers" if merged else "peft",
            tags=["lora", "finetune", *(["reward-model"] if self.score else [])], **more,
        )  # fmt: skip
        return f"---\n{data.to_yaml()}\n---"

    def _body(self) -> list[str]:
        made = self.provenance
        base = made["base"]
        at = f" at commit `{base['commit']}`" if base.get("commit") else ""
        if not self.terms.base_on_hub:
            at = " (a folder of whoever made it; the digests of its files are in `manifest.json`)"
        lines = ["", f"# {self.name}", "", f"A LoRA derivative of `{base['name']}`{at}, made by one recipe."]
        lines += self._learning()
        lines += self._limits()
        lines += ["", "## How to load it", *self._loading()]
        lines += ["", "## Scores", "", *self._scores()]
        lines += ["", "## Data", "", "| source | licence | sha-256 or commit |", "|---|---|---|"]
        lines += [
            f"| `{one.source}` | {one.licence} | {_digests(made['data'], one.source)} |" for one in self.terms.data
        ]
        lines += ["", "## Recipe", "", "```yaml", self.recipe.rstrip(), "```"]
        lines += ["", "## Terms", "", *self._terms()]
        lines += ["", "## Check it", "", *_CHECK]
        return lines

    def _learning(self) -> list[str]:
        """What judged answers and another adapter had to do with it."""
        flat, lines = self.provenance["recipe"], list[str]()
        method, begun = flat.get("objective.method", "sft"), self.provenance.get("begun_from")
        if method != "sft":
            what = _LEARNED_FROM.get(method)
            lines += ["", f"It learned {f'from {what}, ' if what else ''}by the objective `{method}`."]
        if begun:
            digests = ", ".join(f"`{digest[:16]}…`" for digest in begun.values())
            lines += ["", f"It began from an adapter that was trained before (sha-256 of its weights: {digests})."]
            lines += ["Its change is in these weights too; **what it was trained on is not listed below**."]
        return lines

    def _limits(self) -> list[str]:
        proof = self.provenance.get("merge", {}).get("proof")
        lines = ["", "It was judged only as the scores below say: nothing is known beyond them."]
        if proof:
            lines.append(
                f"The merged weights were read back from the disk and compared with the model as it trained: mean KL "
                f"{proof['mean_kl']:.1e} nats over {proof['positions']} positions (bound {proof['bound']:.0e})."
            )
        if rope := self.provenance.get("rope"):
            lines.append(f"Beyond the base's trained length it was trained and exported with `rope: {rope}`.")
        return lines

    def _loading(self) -> list[str]:
        more = ", enable_thinking=False" if self.thinking == "strip" else ""
        if self.score:
            return self._scoring()
        ask = _CHAT.format(more=more) if self.chat else _PLAIN
        lines = []
        if "merged" in self.parts:
            lines += ["", "With transformers, from this folder (or give the repository's id instead of `.`):", ""]
            lines += ["```python", _MERGED + ask, "```", "", "With vLLM: `vllm serve .`"]
            lines += ["", *_OLLAMA] if self.provenance.get("merge", {}).get("layout") != "original" else []
        if "adapter" in self.parts:
            place = "." if self.parts == ("adapter",) else "adapter"
            base = self.provenance["base"]["name"]
            lines += ["", f"The adapter alone, on its base `{base}`, with PEFT:", ""]
            lines += ["```python", _ADAPTER.format(base=base, place=place) + ask, "```"]
            if self.vllm_rank:
                more = f"--enable-lora --max-lora-rank {self.vllm_rank} --lora-modules adapter={place}"
                lines += ["", f"With vLLM: `vllm serve {base} {more}`"]
        return lines

    def _scoring(self) -> list[str]:
        """How a reward model is loaded, and where its reward is read."""
        assert self.score is not None
        stop, pad = self.score
        base = self.provenance["base"]["name"]
        ask, lines = _SCORE.format(stop=stop), [""]
        lines += [
            "It scores a whole conversation: one number, read at the token that ends the last answer. More is better;",
            "only differences between answers to one question mean something.",
        ]
        if "merged" in self.parts:
            lines += ["", "With transformers, from this folder (or give the repository's id instead of `.`):", ""]
            lines += ["```python", _SCORER + ask, "```"]
        if "adapter" in self.parts:
            place = "." if self.parts == ("adapter",) else "adapter"
            lines += ["", f"The adapter with its score head, on its base `{base}`, with PEFT:", ""]
            lines += ["```python", _SCORING_ADAPTER.format(base=base, place=place, pad=pad) + ask, "```"]
        return lines

    def _scores(self) -> list[str]:
        if not self.scores:
            return ["This run had no held-out rows."]
        judged = list(self.scores.values())
        lines = [f"| | {' | '.join(map(_cell, self.scores))} |", f"|---|{'---|' * len(judged)}"]
        rows = [(scores.label(one), [_score(found, one) for found in judged]) for one in scores.metrics(self.scores)]
        rows.append(("loss", [f"{found['loss']:.4f}" if "loss" in found else "–" for found in judged]))
        by_part = [dict(scores.parts(found)) for found in judged]
        rows += [
            (f"loss, {part}", [f"{one[part]:.4f}" if part in one else "–" for one in by_part])
            for part in dict.fromkeys(part for one in by_part for part in one)
        ]
        rows.append(("rows", [str(found.get("rows", "–")) for found in judged]))
        lines += [f"| {_cell(name)} | {' | '.join(values)} |" for name, values in rows]
        return [*lines, "", "In brackets: 95 % confidence intervals.", *self._end()]

    def _end(self) -> list[str]:
        """Where training stopped early, and whose step's adapter this is."""
        return ["", *(f"{one[0].upper()}{one[1:]}." for one in self.end)] if self.end else []

    def _terms(self) -> list[str]:
        licence = self.terms.licence
        lines = [f"The base is under the {licence.name}: {licence.duties}."] if licence else []
        notice = licence.notice_file if licence else "NOTICE"
        lines += [f"**Not known**: {what}." for what in self.terms.missing()]
        return [*lines, f"What was changed and what it was trained on stands in `{notice}`."]


def _score(found: Facts, metric: str) -> str:
    """A metric's value, with its interval where it has one."""
    if not isinstance(found.get(metric), int | float):
        return "–"
    span = scores.interval(found, metric)
    return f"{found[metric]:.3f}" + (f" ({span[0]:.3f} – {span[1]:.3f})" if span else "")


def _cell(text: str) -> str:
    """Somebody's words in a table's cell, where they mean nothing to Markdown."""
    return re.sub(r"([\\`*_\[\]<>|~&#!])", r"\\\1", " ".join(text.split()))


def _digests(data: dict[str, str], source: str) -> str:
    own = [digest for name, digest in data.items() if name == source or name.startswith(f"{source}/")]
    return ", ".join(f"`{digest[:16]}…`" for digest in own[:4]) or "–"


_PAIRS = "pairs of a better and a worse answer"
_LEARNED_FROM = {"dpo": _PAIRS, "orpo": _PAIRS, "simpo": _PAIRS, "reward": _PAIRS, "kto": "labelled answers"}
_SCORER = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForSequenceClassification.from_pretrained(".", dtype="auto")
"""
_SCORING_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{base}")
base = AutoModelForSequenceClassification.from_pretrained("{base}", num_labels=1, pad_token_id={pad}, dtype="auto")
model = PeftModel.from_pretrained(base, "{place}")
"""
_SCORE = """\
talk = [{{"role": "user", "content": "Hello"}}, {{"role": "assistant", "content": "Hello! How can I help?"}}]
ids = tokenizer.apply_chat_template(talk, return_dict=True, return_tensors="pt")["input_ids"]
stop = (ids[0] == tokenizer.convert_tokens_to_ids("{stop}")).nonzero()[-1]  # what the template writes behind it goes
print(model.eval()(ids[:, : stop + 1]).logits.item())"""
_MERGED = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")
"""
_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{base}")
base = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")
model = PeftModel.from_pretrained(base, "{place}")
"""
_CHAT = """\
asked = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "Hello"}}], add_generation_prompt=True, return_dict=True, return_tensors="pt"{more}
)
answer = model.generate(**asked, max_new_tokens=32)[0, asked["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
_PLAIN = """\
asked = tokenizer("Hello", return_tensors="pt")
answer = model.generate(**asked, max_new_tokens=32)[0, asked["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))"""
_OLLAMA = [
    "Ollama and llama.cpp read GGUF: llama.cpp's `convert_hf_to_gguf.py . --outfile model.gguf` makes one of this",
    "folder, `finetune export . --to ollama --out DIR` one with a Modelfile that renders as this tokenizer's template.",
]
_CHECK = [
    "Every file's digest stands in `SHA256SUMS`; `manifest.json` says of which base, data, recipe and versions it was",
    "made. Without any package of ours:",
    "",
    "```bash",
    "sha256sum -c SHA256SUMS",
    "```",
]
