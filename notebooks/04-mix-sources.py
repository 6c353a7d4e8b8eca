# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Mix sources, and judge the mixture by each source's loss
#
# You train one base on three mixtures of the same two sources, read the held-out loss *of each source*, and see which
# mixture wins where. One number over all rows would hide it.
#
# The sources are the committed dates (Unicode CLDR, Unicode License v3) and paragraphs of the Python language reference
# that CPython carries in `pydoc_data.topics` (PSF License Version 2). The base is a tiny random one that is made here,
# so all of it takes a minute on a CPU. It shows the method: for figures that mean something put a real base's folder or
# id into `model:` and train longer.

# %%
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command sets it: read when torch loads

import io
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from pydoc_data.topics import topics

import matplotlib.pyplot as plt
import numpy as np

from finetune import pipeline, scores
from finetune.terminal import Terminal

warnings.filterwarnings("ignore", message="IProgress not found")  # progress bars of libraries, not ours
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# %% [markdown]
# Everything is written into a folder that is removed at the end; rows as ids are kept there too, not in your own cache.

# %%
root = next(folder for folder in (Path.cwd(), Path.cwd().parent) if (folder / "recipes").is_dir())
plt.style.use(root / "notebooks/plain.mplstyle")
place = tempfile.TemporaryDirectory(prefix="finetune-notebook-")
os.chdir(place.name)
os.environ["XDG_CACHE_HOME"] = place.name
command = [sys.executable, root / "data/make_tiny_base.py", "--into", "base"]
print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())

# %% [markdown]
# ## Two sources
#
# Each paragraph once, white space and case aside: copies of a training row among the held-out ones would flatter it
# ([01](01-from-raw-files-to-a-checked-data-set.ipynb)).

# %%
dates = (root / "data/dates/train.jsonl").read_text(encoding="utf-8").splitlines()[:800]
Path("dates.jsonl").write_text("\n".join(dates) + "\n", encoding="utf-8")
parts = [part for text in topics.values() for part in text.split("\n\n") if 120 < len(part) < 400]
pieces = {" ".join(part.split()).casefold(): part for part in parts}
Path("reference.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in pieces.values()) + "\n")
print(len(dates), "dates,", len(pieces), "paragraphs")

# %% [markdown]
# ## One recipe, three mixtures
#
# A share is of the *tokens*. Every mixture trains the same number of steps on the same number of tokens, from the same
# start; `eval_fraction` holds the same rows of each source out, because the draw hangs on the seed alone.

# %%
Path("recipe.yaml").write_text("""\
model: base
quantize: {weights: fp32, compute: fp32}
adapter: {method: lora, r: 16, lora_alpha: 32}
data:
  sources:
    - path: dates.jsonl
      share: 0.5
    - path: reference.jsonl
      share: 0.5
  eval_fraction: 0.05
train:
  steps: 40
  tokens_per_step: 1024
  micro_batch_tokens: 1024
  max_length: 512
  learning_rate: 0.01
  warmup: 5
  seed: 7
evaluate: {metrics: [loss]}
tracker: none
output: run
""")
sources = "data.sources=[{{path: dates.jsonl, share: {}}}, {{path: reference.jsonl, share: {}}}]"
mixtures = {f"{percent}% dates": sources.format(percent / 100, (100 - percent) / 100) for percent in (10, 50, 90)}
print(*mixtures.values(), sep="\n")

# %% [markdown]
# ## Train them
#
# `pipeline.train` is what `finetune train recipe.yaml --set …` calls. What a mixture amounts to is said before anything
# is paid for: how much of the tokens each source gives, and how often it is gone through.

# %%
found = {}
for number, (name, change) in enumerate(mixtures.items()):
    said = io.StringIO()
    (run,) = pipeline.train(Path("recipe.yaml"), [change, f"output=runs/{number}"], Terminal(out=said))
    found[name] = scores.read(run)
    print(name, *(line for line in said.getvalue().splitlines() if "of the tokens" in line), sep="\n")

# %% [markdown]
# ## Which mixture wins where
#
# `scores.json` of a run has the loss before and after, and for several sources the loss of each.

# %%
names = ["dates.jsonl", "reference.jsonl"]
before = [next(iter(found.values()))["before"]["loss_by_source"][name] for name in names]
after = np.array([[one["after"]["loss_by_source"][name] for name in names] for one in found.values()])
print(f"{'':<12}{names[0]:>16}{names[1]:>18}{'mean of both':>14}{'all rows':>10}")
print(f"{'untrained':<12}{before[0]:>16.3f}{before[1]:>18.3f}{np.mean(before):>14.3f}")
for mixture, losses in zip(found, after, strict=True):
    print(
        f"{mixture:<12}{losses[0]:>16.3f}{losses[1]:>18.3f}{losses.mean():>14.3f}{found[mixture]['after']['loss']:>10.3f}"
    )

# %%
best = after.argmin(axis=0)
fig, ax = plt.subplots()
for name, losses, mark, place_of_best in zip(names, after.T, "os", best, strict=True):
    ax.plot(list(found), losses, f"{mark}-", label=name)
    ax.annotate("best", (place_of_best, losses.min()), (0, -14), textcoords="offset points", ha="center")
ax.set(xlabel="share of the tokens", ylabel="held-out loss (nats per token)")
ax.margins(0.1, 0.2)
ax.set_title(f"Dates are learned best from {list(found)[best[0]]}, the reference from {list(found)[best[1]]}")
ax.legend()
plt.show()

# %% [markdown]
# ## What each gives up
#
# A mixture is a bargain. How far is each from the one that wins on a source?

# %%
cost = after - after.min(axis=0)
fig, ax = plt.subplots()
for column, name in enumerate(names):
    ax.bar(np.arange(len(found)) + 0.35 * (column - 0.5), cost[:, column], 0.35, label=name)
ax.set_xticks(range(len(found)), list(found))
ax.set(xlabel="share of the tokens", ylabel="loss above the best (nats per token)")
least = list(found)[cost.max(axis=1).argmin()]
ax.set_title(f"{least}: at most {cost.max(axis=1).min():.2f} above the best on either source")
ax.legend()
plt.show()

# %% [markdown]
# The column "all rows" of the table is the mean over all held-out tokens. Few of those are the dates', whose answers
# are short, so that it hardly moves when they are learned. Decide what each source is worth first, and then read its
# own loss.

# %%
os.chdir(root)
place.cleanup()
