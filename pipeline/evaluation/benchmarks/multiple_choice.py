"""Multiple-choice benchmarks: reading their files, and finding the choice that an answer means."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.core.choices import chosen, equal_choice
from pipeline.core.errors import UserError
from pipeline.core.text_forms import literal
from pipeline.evaluation.benchmarks.base import Benchmark, Item, read_text


class MultipleChoice(Benchmark):
    """A benchmark with choices, in a JSON file.

    Attributes:
        audio_key: key of the audio path in a row.
        as_list: whether the official scorer reads a JSON list instead of JSON lines.
        prediction_keys: keys at which the official scorer expects the prediction.

    Raises:
        UserError: as `Benchmark`; or an answer that is not among the choices.
    """

    audio_key: str
    as_list = False
    prediction_keys: Sequence[str]

    def _read(self) -> list[Item]:
        items = []
        uses = Counter[str]()  # an id that several questions share gets a number
        for number, row in enumerate(read_rows(self.file), start=1):
            where = f"{self.file}, question {number}"
            try:
                item = self._item(row)
            except KeyError as error:
                raise UserError(
                    where, f"has no {error.args[0]}", f"give the file of {self.name} as published"
                ) from error
            except TypeError as error:
                raise UserError(where, str(error), f"give the file of {self.name} as published") from error
            if item.answer:
                right = equal_choice(item.answer, item.choices)
                if right is None:
                    raise UserError(
                        where, f"'{item.answer}' is not among its choices", "correct or remove the question"
                    )
                item = replace(item, answer=right)
            uses[item.question_id] += 1
            if uses[item.question_id] > 1:
                item = replace(item, question_id=f"{item.question_id}#{uses[item.question_id]}")
            items.append(item)
        return items

    @abstractmethod
    def _item(self, row: Mapping[str, Any]) -> Item:
        """Returns the item of one row; raises KeyError with the name of a missing key."""

    def predictions_file(self, predictions: Mapping[str, str]) -> tuple[str, str]:
        """Returns the published rows with predictions."""
        rows = [
            {**item.row, **dict.fromkeys(self.prediction_keys, predictions[item.question_id])}
            for item in self.items
            if item.question_id in predictions
        ]
        if self.as_list:
            return f"{self.name}.json", json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
        return f"{self.name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Reads the rows of a JSON list, or of JSON lines.

    Raises:
        UserError: the file is neither.
    """
    text = read_text(file)
    try:
        if text.lstrip().startswith("["):
            rows: list[dict[str, Any]] = json.loads(text)
        else:  # a text may hold other characters that end a line, such as U+2028
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise UserError(file, f"is neither a JSON list nor JSON lines ({error})", "download the file again") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise UserError(f"{file}, question {number}", "is no JSON object", "download the file again")
    return rows


def text_of(row: Mapping[str, Any], key: str) -> str:
    """Returns the text or number at a key; raises KeyError where there is none, TypeError for another kind of value."""
    return _text(row[key], key)


def texts_of(row: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Returns the list of texts at a key; raises as `text_of`."""
    if not isinstance(row[key], list):
        raise TypeError(f"has no list of texts at '{key}'")
    return tuple(_text(value, key) for value in row[key])


def _text(value: Any, key: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TypeError(f"has no text at '{key}'")
    return str(value)


def means_answer(prediction: str, item: Item, *, letters_offered: bool = False) -> bool:
    """Returns whether a prediction means the right choice of an item. A choice that stands twice is one choice."""
    number = chosen(prediction, item.choices, letters_offered=letters_offered)
    return number is not None and literal(item.choices[number]) == literal(item.answer)
