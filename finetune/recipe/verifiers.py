"""What judges an answer, as a recipe writes it: a command in a cage, and a metric as a reward."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from finetune.recipe.section import Section


class UnitTest(Section):
    """A command that tries out each answer by itself, in a cage."""

    command: Annotated[list[str], Field(min_length=1)] = Field(
        description="the command, word by word: it is given prompt, completion and reference as JSON, and ends with "
        "code 0 where the completion is right, or prints a number"
    )
    seconds: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)] = Field(
        default=10.0, description="seconds that one answer may take, of a clock and of a processor"
    )
    memory: Annotated[float, Field(ge=0.03, le=1024, allow_inf_nan=False)] = Field(
        default=1.0, description="GB of address space of each of its processes"
    )
    processes: Annotated[int, Field(ge=1, le=4096)] = Field(
        default=32, description="processes and threads that it may have at once"
    )


class Reward(Section):
    """A metric of answers as a reward, with what that metric needs under its own name, as in evaluate:."""

    metric: Literal["exact_match", "contains", "regex", "json_schema", "command", "unit_test"] = Field(
        description="what judges a completion, see docs/evaluating.md"
    )
    weight: Annotated[float, Field(ge=-1000, le=1000, allow_inf_nan=False)] = Field(
        default=1.0, description="what its verdict is multiplied by"
    )
    regex: str | None = Field(default=None, description="regex: the pattern, as in evaluate.regex")
    json_schema: str | None = Field(default=None, description="json_schema: a file with the schema")
    command: list[str] | None = Field(default=None, description="command: as in evaluate.command")
    command_timeout: Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)] | None = Field(
        default=None, description="command: seconds for all completions of a step; null means 300"
    )
    unit_test: UnitTest | None = Field(default=None, description="unit_test: the command, and what it may use")

    @model_serializer(mode="wrap")
    def _given(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in plain(self).items() if value is not None}

    def asked(self) -> Any:
        """What the metric needs besides the rows."""
        return needs(self, self.command_timeout or 300.0).get(self.metric)

    def files(self) -> list[Path]:
        """The files that its verdict hangs on, as far as they are named: a schema, a command's scripts."""
        command = self.unit_test.command if self.unit_test else self.command or []
        words = [*([self.json_schema] if self.json_schema else []), *command]
        return [Path(word) for word in words if len(word) < 4096 and Path(word).is_file()]


def needs(section: Any, command_seconds: float) -> dict[str, Any]:
    """What metrics of answers need, by their names, as they take it."""
    command, test = section.command, section.unit_test
    return {
        "regex": section.regex, "json_schema": section.json_schema,
        "command": None if command is None else (tuple(command), command_seconds),
        "unit_test": None if test is None else (tuple(test.command), test.seconds, test.memory, test.processes),
    }  # fmt: skip
