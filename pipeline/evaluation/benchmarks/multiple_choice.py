"""Multiple-choice benchmarks: reading their files, and finding the choice that an answer means."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError
from pipeline.evaluation.benchmarks.base import Benchmark, Item, read_text
from pipeline.evaluation.text_forms import canonical, literal, normalise, words

_SAYS = r"\b(?:answer|option|choice)(?:\s+(?:is|would\s+be|should\s+be))?(?=\W)\W*"
_END = r"[^\w#%&@]*"  # "C#" is a text
_LETTER_ALONE = re.compile(rf"\W*(?:(?:the\s+)?(?:correct\s+|right\s+)?{_SAYS})?([a-z]){_END}", re.IGNORECASE)
_LETTERS_ALONE = re.compile(rf"\W*[a-z](?:\W+(?:(?:and|or)\W+)?[a-z]\b)*{_END}", re.IGNORECASE)
_LETTER_FIRST = re.compile(r"\W*([a-z])(?:\)|[.:,*]\W|\s*-\s|\W*\n)", re.IGNORECASE)
_ANSWER = re.compile(rf"{_SAYS.replace('|option|choice', '')}(?!a\s+\w)([a-z])\b(?!')", re.IGNORECASE)
_OPTION = re.compile(rf"{_SAYS.replace('answer|', '')}(?!a\s+\w)([a-z])\b(?!')", re.IGNORECASE)
_PERHAPS_AN_ARTICLE = re.compile(rf"(?i:{_SAYS})A\s")


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


def chosen(prediction: str, choices: Sequence[str], *, letters_offered: bool = False) -> int | None:
    """Returns the choice that an answer means; None where it means no choice, or several.

    Tried in this order: a letter alone (`B`, `(b)`), if letters were offered; the text of a choice; a letter alone or
    at the start (`C. A dog`); `the answer is B`; the one choice whose words occur in the answer (of two that contain
    each other, the longer one). Of a choice that stands twice, the first one is returned. Where letters were not
    offered and a choice is a letter itself, such as the name of a note, a letter is a text and no number.
    """
    prediction = canonical(prediction)
    if letters_offered and (match := _LETTER_ALONE.fullmatch(prediction)) and _index(match[1]) < len(choices):
        return _index(match[1])
    if (number := _equal(prediction, choices)) is not None:
        return number
    letters_count = letters_offered or not any(re.fullmatch(r"\W*[a-zA-Z]\W*", choice) for choice in choices)
    if letters_count and (letters := _letters(prediction, len(choices))):
        return letters.pop() if len(letters) == 1 else None
    number = _contained(prediction, choices)
    if number is None and letters_count and _PERHAPS_AN_ARTICLE.search(prediction):
        return 0
    return number


def equal_choice(text: str, choices: Sequence[str]) -> str | None:
    """Returns the choice with the same text, however it is spelled; None where there is none, or several."""
    number = _equal(text, choices)
    return None if number is None else choices[number]


def _index(letter: str) -> int:
    return ord(letter.upper()) - ord("A")


def _letters(prediction: str, count: int) -> set[int]:
    """Returns the choices, out of `count`, whose letters an answer gives."""
    letters = _LETTERS_ALONE.fullmatch(prediction)
    if letters is not None:
        return {_index(letter) for letter in re.findall(r"\b[a-z]\b", prediction, re.IGNORECASE)} & set(range(count))
    if (match := _LETTER_FIRST.match(prediction)) is not None and _index(match[1]) < count:
        return {_index(match[1])}
    for pattern in (_ANSWER, _OPTION):
        given = {_index(match[1]) for match in pattern.finditer(prediction)} & set(range(count))
        if given:
            return given
    return set()


def _equal(prediction: str, choices: Sequence[str]) -> int | None:
    """Returns the choice that equals an answer in the strictest form in which any does."""
    for form in (literal, normalise, _joined_words):
        text = form(prediction)
        numbers = [number for number, choice in enumerate(choices) if text and form(choice) == text]
        if numbers:
            return _one(numbers, choices)
    return None


def _contained(prediction: str, choices: Sequence[str]) -> int | None:
    """Returns the one choice whose words occur in an answer."""
    for form in (normalise, _joined_words):
        padded = [f" {form(choice)} " for choice in choices]
        numbers = [number for number, text in enumerate(padded) if text.strip() and text in f" {form(prediction)} "]
        texts = {padded[number] for number in numbers}
        longest = {text for text in texts if not any(text != other and text in other for other in texts)}
        if len(longest) == 1:
            return _one([number for number in numbers if padded[number] in longest], choices)
        if longest:
            return None
    return None


def _one(numbers: Sequence[int], choices: Sequence[str]) -> int | None:
    """Returns the first of these choices if they are one text, however often it stands."""
    return numbers[0] if len({literal(choices[number]) for number in numbers}) == 1 else None


def _joined_words(text: str) -> str:
    return " ".join(words(text))
