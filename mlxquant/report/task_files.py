"""Questions in a local file, one JSON object a line, as a task of lm-eval that fetches nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, disable_progress_bars
from lm_eval import tasks
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mlxquant.base.errors import MlxquantError


class _Line(BaseModel):
    """A question of a local file; ``like`` names the task of lm-eval that asks such questions."""

    model_config = ConfigDict(strict=True)
    like: ClassVar[str]
    given: ClassVar[dict[str, Any]] = {}  # what differs from that task's configuration

    def document(self) -> dict[str, Any]:
        """The question with the fields that this task reads."""
        return self.model_dump()


class _Chosen(_Line):
    """``answer`` is the index of the right one of several."""

    answer: int = Field(ge=0)

    @model_validator(mode="after")
    def _in_range(self) -> "_Chosen":
        (choices,) = (value for value in vars(self).values() if isinstance(value, list))
        if self.answer >= len(choices):
            raise ValueError(f"answer is {self.answer}, allowed are 0 to {len(choices) - 1}")
        return self


class _Endings(_Chosen):
    like = "hellaswag"
    given = {"doc_to_text": "{{query.removeprefix(': ')}}"}  # where there is no activity
    context: str = Field(min_length=1)
    endings: list[str] = Field(min_length=2)
    activity: str = ""

    def document(self) -> dict[str, Any]:
        return {"ctx_a": self.context, "ctx_b": "", "activity_label": self.activity,
                "endings": self.endings, "label": self.answer}


class _Choices(_Chosen):
    like = "truthfulqa_mc1"
    given = {"doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    question: str = Field(min_length=1)
    choices: list[str] = Field(min_length=2)


class _Number(_Line):
    like = "gsm8k_cot"
    question: str = Field(min_length=1)
    answer: str = Field(min_length=1)


def read(path: Path) -> Any:
    """lm-eval's task of the questions in ``path``; raises ``MlxquantError``, naming the line."""
    lines = list(_lines(path))
    form, data = type(lines[0]), Dataset.from_list([line.document() for line in lines])
    folder = Path(tasks.__file__).parent
    disable_progress_bars()
    manager = tasks.TaskManager(include_defaults=False, include_path=[
        folder / part for part in ("hellaswag", "truthfulqa", "gsm8k")])
    changed = {"task": form.like, "custom_dataset": lambda **_: {"test": data},
               "training_split": None, "validation_split": None, "test_split": "test",
               "fewshot_split": None, **form.given}
    # A task in a group is configured by its name; the entries given here replace its own.
    (task,) = manager.load([{"group": path.stem, "task": [changed]}])["tasks"].values()
    return task


def _lines(path: Path) -> Iterator[_Line]:
    form: type[_Line] | None = None
    try:
        rows = path.read_text(encoding="utf-8").split("\n")  # JSON may hold U+2028
    except (OSError, UnicodeError) as error:
        raise MlxquantError(f"cannot read {path}: {error}") from error
    for number, row in enumerate(rows, 1):
        if not row.strip():
            continue
        if form is None:
            form = next((kind for field, kind in (("endings", _Endings), ("choices", _Choices))
                         if f'"{field}"' in row), _Number)
        try:
            yield form.model_validate_json(row)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = "".join(f"{part}: " for part in first["loc"])
            raise MlxquantError(f"{path}, line {number}: {where}{first['msg']}") from error
    if form is None:
        raise MlxquantError(f"{path} holds no question")
