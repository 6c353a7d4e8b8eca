"""The sections of a recipe: every key with its type, its default and the sentence that editors show."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from finetune.recipe.objective_keys import DEFAULTS, ROWS, SCORED
from finetune.recipe.section import Count, Positive, Section
from finetune.recipe.verifiers import Reward, UnitTest, needs


class Quantize(Section):
    """How the frozen base weights are held while training."""

    weights: Literal["nf4", "fp4", "int8", "torchao_int8", "gptq", "awq", "bf16", "fp16", "fp32"] = Field(
        description="number format of the frozen base weights; gptq and awq: as they lie in the folder"
    )
    double: bool = Field(
        default=True, description="nf4/fp4: store the block scales in 8 bits too (about 0.4 bits a weight less)"
    )
    compute: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto", description="number format of the matrix products"
    )


class Objective(Section):
    """What is minimised, and that method's own keys; those of other methods are None."""

    method: Literal["sft", "dpo", "orpo", "simpo", "kto", "reward", "distill", "grpo"] = Field(
        default="sft",
        description="what is learned from: answers, pairs of a better and a worse one, labels, a teacher's "
        "distributions, or rewards of what the model answers itself",
    )
    loss: Literal["sigmoid", "ipo", "hinge", "robust", "grpo", "dr_grpo", "dapo"] | None = Field(
        default=None, description="dpo: what becomes of a pair's margin; grpo: over what the loss of tokens is averaged"
    )
    beta: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] | None = Field(
        default=None,
        description="dpo, kto: how dear it is to leave the reference; simpo: the reward's scale; orpo: the weight of "
        "the odds ratio; distill with jsd: the teacher's share of the mixture; grpo: the weight of the KL divergence "
        "from the reference, 0 without",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5, allow_inf_nan=False)] | None = Field(
        default=None, description="dpo: share of the pairs that are believed to be swapped"
    )
    length_normalised: bool | None = Field(
        default=None, description="dpo: a text counts by its mean per token, not by its sum; ipo is defined so"
    )
    gamma: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] | None = Field(
        default=None, description="simpo: the margin that is wanted between the rewards"
    )
    desirable_weight: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] | None = Field(
        default=None, description="kto: weight of wanted answers in the loss"
    )
    undesirable_weight: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] | None = Field(
        default=None, description="kto: weight of unwanted answers in the loss"
    )
    margin: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] | None = Field(
        default=None, description="reward: by how much the chosen text's reward is to be more"
    )
    centre_rewards_coefficient: Annotated[float, Field(ge=0, le=1000, allow_inf_nan=False)] | None = Field(
        default=None, description="reward: weight of the squared sum of a pair's rewards, which keeps them around zero"
    )
    teacher: str | None = Field(
        default=None,
        description="distill: a finished run or adapter, a model's folder, or what finetune teach wrote",
    )
    teacher_weights: Literal["auto", "nf4", "fp4", "int8", "bf16", "fp16", "fp32"] | None = Field(
        default=None,
        description="distill: number format of a teacher's own base; auto: the run's base where it is the same, else "
        "as the teacher was trained, or quantize.weights",
    )
    temperature: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = Field(
        default=None,
        description="distill: what both models' logits are divided by in the divergence; grpo: in sampling and loss",
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] | None = Field(
        default=None, description="distill: KL(teacher || model), KL(model || teacher), or generalised Jensen-Shannon"
    )
    alpha: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] | None = Field(
        default=None, description="distill: weight of the answers' cross-entropy; the divergence has the rest"
    )
    rewards: Annotated[list[Reward], Field(min_length=1, max_length=64)] | None = Field(
        default=None, description="grpo: what a completion earns, the sum of these"
    )
    completions: Annotated[int, Field(ge=2, le=1024)] | None = Field(
        default=None, description="grpo: answers sampled to each prompt, which are compared with one another"
    )
    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)] | None = Field(
        default=None, description="grpo: longest sampled answer, in tokens, its stop token counted"
    )
    epsilon: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = Field(
        default=None, description="grpo: how far below 1 the ratio to the sampling policy still counts"
    )
    epsilon_high: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = Field(
        default=None, description="grpo: how far above 1; null means epsilon"
    )
    scale_rewards: Literal["group", "batch", "none"] | None = Field(
        default=None, description="grpo: the standard deviation that a reward's distance from its group is divided by"
    )
    iterations: Annotated[int, Field(ge=1, le=64)] | None = Field(
        default=None, description="grpo: updates from the same completions in one step"
    )
    mask_truncated_completions: bool | None = Field(
        default=None, description="grpo: answers cut off at max_new_tokens are left out of the loss"
    )
    use_bias_correction_kl: bool | None = Field(
        default=None, description="grpo: the KL divergence is weighted by the ratio, so that its gradient is unbiased"
    )
    batch_rows: Annotated[int, Field(ge=1, le=100_000)] | None = Field(
        default=None, description="grpo: answers sampled at once"
    )

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, given: Any) -> Any:
        """What the method has and the recipe leaves out."""
        if not isinstance(given, dict):
            return given
        method = given.get("method", "sft")
        defaults = dict(DEFAULTS.get(method, {})) if isinstance(method, str) else {}
        if given.get("loss") == "ipo":
            defaults["length_normalised"] = True
        if given.get("divergence") == "jsd":
            defaults["beta"] = 0.5
        return defaults | {key: value for key, value in given.items() if value is not None}

    def settings(self) -> dict[str, Any]:
        """The method's own keys."""
        plain = self.model_dump()
        return {key: plain[key] for key in DEFAULTS[self.method]}

    @property
    def rows(self) -> str:
        """What it trains on: answers, pairs, labels or prompts."""
        return ROWS[self.method]

    @property
    def scored(self) -> bool:
        """Whether it trains a score head, in place of the head over the vocabulary."""
        return self.method in SCORED


class Adapter(Section):
    """A PEFT method and that method's own fields, PEFT's defaults filled in."""

    method: str = Field(description="PEFT method")
    start_from: str | None = Field(default=None, description="the finished run or adapter whose weights it begins with")
    fields: dict[str, Any] = Field(description="the method's own PEFT field names")


Format = Literal["auto", "alpaca", "chat", "completion", "kto", "preference", "sharegpt", "text"]


class DataSource(Section):
    """One of several places that rows come from."""

    path: str = Field(description="a file, a folder, or a data set's id on the hub")
    share: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = Field(
        default=None, description="share of the trained tokens that come from here; all shares together are 1"
    )
    format: Format = Field(default="auto", description="layout of a row; auto looks at the columns")
    columns: dict[str, str] = Field(default={}, description="the format's column name → the one used here")
    split: str = Field(default="train", description="split of a folder or of a data set on the hub")
    subset: str | None = Field(default=None, description="configuration of a data set on the hub")
    revision: str | None = Field(default=None, description="branch, tag or commit of a data set on the hub")


class Data(Section):
    """Where the rows come from, and what of them is trained."""

    train_path: str | None = Field(
        default=None, description="rows to train on: a file, a folder, or a data set's id on the hub; or use sources"
    )
    sources: list[DataSource] = Field(default=[], description="several places with rows to train on; or use train_path")
    eval_path: str | None = Field(
        default=None, description="rows to judge on: a file, a folder, or a data set's id; or use eval_fraction"
    )
    eval_split: str = Field(default="test", description="split of eval_path, where that is a folder or on the hub")
    eval_fraction: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = Field(
        default=None,
        description="share of the training rows to hold out and judge on, between 0 and 1; or use eval_path",
    )
    format: Format = Field(default="auto", description="layout of a row; auto looks at the columns")
    columns: dict[str, str] = Field(default={}, description="the format's column name → the one used in the files")
    train_on: Literal["assistant", "last", "all"] = Field(
        default="assistant",
        description="what is in the loss: every assistant turn, the last one of a row, or every token of it",
    )
    thinking: Literal["keep", "strip", "mask"] = Field(
        default="keep",
        description="reasoning in answers: as the template renders it, taken out, or read but not in the loss",
    )
    literal_tokens: list[str] = Field(
        default=[], description="special tokens that may stand in a content as text; there they control nothing"
    )
    over_length: Literal["error", "drop", "truncate_turns", "split"] = Field(
        default="error",
        description="rows longer than train.max_length: refused, left out, cut by whole turns from the front, or split",
    )


Metric = Literal["loss", "exact_match", "contains", "regex", "json_schema", "multiple_choice", "command", "unit_test"]


class Evaluate(Section):
    """How the result is judged."""

    metrics: Annotated[list[Metric], Field(min_length=1)] = Field(
        default=["loss"], description="what is measured on the held-out rows, see docs/evaluating.md"
    )
    every: Count = Field(default=0, description="steps between evaluations; 0 means only at the start and the end")
    keep: Literal["last", "best"] = Field(
        default="last", description="whose adapter the run ends with: the last step's, or the best evaluated one's"
    )
    best_by: str = Field(default="loss", description="the metric that says which evaluation is better")
    early_stopping_patience: Positive | None = Field(
        default=None, description="evaluations without improvement after which the run ends; null: it never does"
    )
    early_stopping_threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0.0, description="what an evaluation must be better by to count as an improvement"
    )
    rows: Positive | None = Field(default=None, description="held-out rows used, from the first; null means all")
    max_new_tokens: Annotated[int, Field(ge=1, le=1_048_576)] = Field(
        default=64, description="longest generated answer, in tokens"
    )
    batch_rows: Annotated[int, Field(ge=1, le=100_000)] = Field(default=32, description="rows judged at once")
    regex: str | None = Field(
        default=None,
        description="the metric regex: what an answer must match; its groups must catch the same as in "
        "the right answer",
    )
    json_schema: str | None = Field(
        default=None, description="the metric json_schema: a file with the schema that an answer must fit"
    )
    multiple_choice: list[str] | str | None = Field(
        default=None,
        description="the metric multiple_choice: the options of every row, or the column that holds a row's own",
    )
    command: list[str] | None = Field(
        default=None,
        description="the metric command: a console command, word by word, that is given the rows as JSON "
        "lines and prints a number for each",
    )
    command_timeout: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] = Field(
        default=300.0, description="seconds that the command may take for all rows"
    )
    unit_test: UnitTest | None = Field(
        default=None, description="the metric unit_test: a command that tries out each answer by itself, in a cage"
    )

    def asked(self) -> dict[str, Any]:
        """What the metrics need besides the rows, by their names."""
        found = needs(self, self.command_timeout) | {"multiple_choice": self.multiple_choice}
        return {name: value for name, value in found.items() if name in self.metrics}
