"""[task] of a job: the paper's tasks and your own data, one section each. What every key means, with its default.

In: nothing but pydantic. Out: `Task`; a mix holds several.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, PositiveFloat, PositiveInt, ValidationInfo, field_validator, model_validator

from pipeline.job.section import Section, Seed, Text


class TaskSection(Section):
    data: Text | None = None
    """Folder or file. Absent: the hub's copy, where the task has one."""
    separator: str | None = None
    """Text between prompt and completion, or two texts judged together. Absent: the task's own; with an encoder, its tokenizer's."""
    too_long: Literal["refuse", "truncate", "drop"] = "refuse"
    """Of an example longer than `train.max_tokens`. Truncation cuts a prompt's left, other texts' right; of two, the longer."""
    train_examples: PositiveInt | None = None
    """Learn from so many of the training examples only, as in the paper's low-data study. A smaller draw is part of a larger one."""
    train_examples_seed: Seed = 1
    """Of that draw."""
    title: Annotated[str, Field(pattern=r"^[\w.-]+$")] | None = None
    """In a mix: what its scores are named after. Absent: its kind."""
    weight: PositiveFloat = 1.0
    """In a mix: how often each of its examples comes in an epoch. 0.5: a half of them in one epoch, the other half in the next."""


class E2E(TaskSection):
    """E2E NLG challenge (Novikova et al. 2017): the official CSV files or the paper's tokenised text."""

    kind: Literal["e2e"]


class WebNlg(TaskSection):
    """WebNLG challenge 2017 (Gardent et al. 2017): the official XML folders or the paper's JSON files."""

    kind: Literal["webnlg"]
    texts: Literal["good", "all"] = "good"
    """Those that the annotators marked good, as the paper's code takes them, or all."""
    test_categories: Literal["all", "seen", "unseen"] = "all"
    """Of the test split: all, or those that are, or are not, in the training split."""


class Dart(TaskSection):
    """DART v1.1.1 (Nan et al. 2021): the official JSON or XML files."""

    kind: Literal["dart"]
    empty_texts: Literal["refuse", "drop"] = "refuse"
    """What to do with an empty text among a set's texts; the official test file has one."""


class SamSum(TaskSection):
    """SAMSum dialogues and summaries (Gliwa et al. 2019): the official JSON files, or JSON lines."""

    kind: Literal["samsum"]


class WikiSql(TaskSection):
    """WikiSQL questions and queries (Zhong et al. 2017): the official JSON lines of questions and of tables."""

    kind: Literal["wikisql"]


class Glue(TaskSection):
    """GLUE, general language understanding (Wang et al. 2019): the official files; `data` may also be the folder that holds all tasks'."""

    kind: Literal["glue"]
    name: Literal["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"]
    """Which of the tasks."""
    section: Literal["matched", "mismatched", "both"] = "matched"
    """Of MNLI's valid and test splits: the training split's genres, others, or both, as the paper scores RoBERTa and DeBERTa."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """What to do with a row that cannot be used: refuse the file, or leave the row out and count it. QQP's first release has torn rows."""

    form: Literal["label", "text"] = "label"
    """How a label is learnt: by a head on the base, or as text that follows the texts, as the paper does with GPT-3."""

    @field_validator("form")
    @classmethod
    def _of_classes(cls, form: str, others: ValidationInfo) -> str:
        if form == "text" and others.data.get("name") == "stsb":
            raise ValueError('"text": stsb has scores, not classes. Leave the key out.')
        return form

    @field_validator("section")
    @classmethod
    def _of_mnli(cls, section: str, others: ValidationInfo) -> str:
        if section != "matched" and others.data.get("name", "mnli") != "mnli":
            raise ValueError(f'"{section}": {others.data["name"]} has no sections, only mnli has. Leave the key out.')
        return section


class OwnData(TaskSection):
    """Your own files: JSON lines, CSV, TSV, Parquet or plain text, told apart by their names' ends."""

    kind: str
    data: Text
    """Folder with train.*, valid.* and test.* (files, or folders of files), or the training file alone."""
    valid: Text | None = None
    """File or folder of the validation split, where `data` is a file."""
    test: Text | None = None
    """File or folder of the test split, where `data` is a file."""
    dev_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Hold this share of the training examples back as the validation split. Those with the same prompt stay together."""
    dev_seed: Seed = 1
    """Of the choice of those held back."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """What to do with a row that cannot be used: refuse the file, or leave the row out and count it."""


class Pairs(OwnData):
    """Your own prompts and completions. Rows with the same prompt are references of one prompt."""

    kind: Literal["jsonl", "csv", "parquet"]
    """The files' format; csv includes tab-separated .tsv."""
    prompt: Text = "prompt"
    """The column of the prompt."""
    completion: Text = "completion"
    """The column of what should follow."""


class Conversations(OwnData):
    """Your own conversations: rows with a list of {"role", "content"}, in the base's chat template; the assistant's turns are learnt."""

    kind: Literal["chat"]
    messages: Text = "messages"
    """The column of the list."""

    @field_validator("separator")
    @classmethod
    def _none(cls, separator: str | None) -> None:
        if separator is not None:
            raise ValueError(f'"{separator}": the base\'s chat template says what stands between turns. Leave the key out.')


class Classification(OwnData):
    """Your own texts and their classes, learnt by a head on the base."""

    kind: Literal["classification"]
    text: Text = "text"
    """The column of the text."""
    text_pair: Text | None = None
    """The column of a second text that is judged together with the first."""
    label: Text = "label"
    """The column of the class."""
    labels: Annotated[tuple[Text, ...], Field(strict=False)]
    """The classes, as the column has them. Their order is that of the head's outputs."""

    @field_validator("labels")
    @classmethod
    def _classes(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(labels)) < max(2, len(labels)):
            raise ValueError(f"{', '.join(labels) or 'empty'}. Name at least two classes, each once.")
        return labels


class Regression(OwnData):
    """Your own texts and a number for each, learnt by a head on the base."""

    kind: Literal["regression"]
    text: Text = "text"
    """The column of the text."""
    text_pair: Text | None = None
    """The column of a second text that is judged together with the first."""
    label: Text = "label"
    """The column of the number."""


class PlainText(OwnData):
    """Your own running text, all of which is learnt: documents end to end, in blocks of `train.max_tokens`."""

    kind: Literal["text"]
    text: Text = "text"
    """The column of the text, where the files have columns."""
    document: Literal["file", "paragraph", "line"] = "file"
    """What is one document of a plain text file; blank lines part paragraphs."""

    @field_validator("separator")
    @classmethod
    def _none(cls, separator: str | None) -> None:
        if separator is not None:
            raise ValueError(f'"{separator}": an end token stands between documents. Leave the key out.')


_Single: TypeAlias = E2E | WebNlg | Dart | SamSum | WikiSql | Glue | Pairs | Conversations | Classification | Regression | PlainText
SingleTask = Annotated[_Single, Field(discriminator="kind")]


class Mix(Section):
    """Several sources trained on together, each scored by itself."""

    kind: Literal["mix"]
    sources: Annotated[tuple[SingleTask, ...], Field(min_length=1, strict=False)]
    """[[task.sources]], each as a [task] of its own."""

    @model_validator(mode="after")
    def _told_apart(self) -> Mix:
        titles = [titled(source) for source in self.sources]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(f'two sources are called "{title}". Give each a title of its own.')
        return self


Task = Annotated[_Single | Mix, Field(discriminator="kind")]


def titled(task: SingleTask) -> str:
    """What a task's scores are named after in a mix."""
    return task.title or (task.name if isinstance(task, Glue) else task.kind)
