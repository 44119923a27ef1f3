"""The choices of a question: how a prompt lists them, and which of them an answer means."""

from __future__ import annotations

import re
from collections.abc import Sequence

from pipeline.core.class_names import named
from pipeline.core.feature_contract import Question
from pipeline.core.text_forms import canonical, literal, normalise, words

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_SAYS = r"\b(?:answer|option|choice)(?:\s+(?:is|would\s+be|should\s+be))?(?=\W)\W*"
_END = r"[^\w#%&@]*"  # "C#" is a text
_LETTER_ALONE = re.compile(rf"\W*(?:(?:the\s+)?(?:correct\s+|right\s+)?{_SAYS})?([a-z]){_END}", re.IGNORECASE)
_LETTERS_ALONE = re.compile(rf"\W*[a-z](?:\W+(?:(?:and|or)\W+)?[a-z]\b)*{_END}", re.IGNORECASE)
_LETTER_FIRST = re.compile(r"\W*([a-z])(?:\)|[.:,*]\W|\s*-\s|\W*\n)", re.IGNORECASE)
_ANSWER = re.compile(rf"{_SAYS.replace('|option|choice', '')}(?!a\s+\w)([a-z])\b(?!')", re.IGNORECASE)
_OPTION = re.compile(rf"{_SAYS.replace('answer|', '')}(?!a\s+\w)([a-z])\b(?!')", re.IGNORECASE)
_PERHAPS_AN_ARTICLE = re.compile(rf"(?i:{_SAYS})A\s")
_LETTERED = re.compile(r"\s*\(?([A-Za-z])[.):]\s*(?=\S)")  # the beginning of "A. dog", "(A) dog", "a: dog"


def prompt_text(question: Question) -> str:
    """Returns the text of the last user turn with the question's choices.

    Up to 26 choices are listed below the text, each on a line with its letter:

        Which sound is this?
        A. dog
        B. cat

    More than that are listed on one line, as in the prompts of classification: `Answer with one of these, word for
    word: dog, cat, ....`. Nothing is added to a text that names all choices itself.
    """
    listed = choice_lines(question)
    return "\n".join(filter(None, [question.question.strip(), listed])) if listed else question.question


def choice_lines(question: Question) -> str:
    """Returns what `prompt_text` adds below the text; empty if the question has no choices, or its text names them."""
    choices = choice_texts(question)
    if not any(choices) or _names_all(question.question.replace("<audio>", " "), choices):
        return ""
    if len(choices) > len(LETTERS):
        return f"Answer with one of these, word for word: {', '.join(dict.fromkeys(filter(None, choices)))}."
    return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, choices, strict=False) if text)


def choice_texts(question: Question) -> tuple[str, ...]:
    """Returns the texts of the choices, without the letters that all of them begin with in some data sets."""
    return _without_letters([choice.strip() for choice in question.choices or ()])


def letters_offered(question: Question) -> bool:
    """Returns whether the prompt gives each choice a letter: in the lines that are added, or in the text itself."""
    choices = choice_texts(question)
    if not 0 < len(choices) <= len(LETTERS):
        return False
    letters = LETTERS[: len(choices)]
    in_text = all(re.search(rf"(?:^|[\s(]){letter}[.):]", question.question) for letter in letters)
    return bool(choice_lines(question)) or in_text


def _without_letters(choices: Sequence[str]) -> tuple[str, ...]:
    letters = [_LETTERED.match(choice) for choice in choices]
    if 1 < len(choices) <= len(LETTERS) and all(
        match is not None and match[1].upper() == letter for match, letter in zip(letters, LETTERS, strict=False)
    ):
        return tuple(choice[match.end() :] for choice, match in zip(choices, letters, strict=True) if match)
    return tuple(choices)


def _names_all(text: str, choices: Sequence[str]) -> bool:
    """Returns whether a text names all choices word for word; `car alarm` does not count as `car` too."""
    form = normalise if len(set(map(normalise, choices))) == len(set(map(literal, choices))) else literal
    remaining = f" {form(text)} "
    for choice in sorted({f" {form(choice)} " for choice in choices if choice}, key=len, reverse=True):
        if choice not in remaining or not choice.strip():
            return False
        remaining = remaining.replace(choice, "  ")
    return True


def chosen(prediction: str, choices: Sequence[str], *, letters_offered: bool = False) -> int | None:
    """Returns the choice that an answer means; None where it means no choice, or several.

    Tried in this order: a letter alone (`B`, `(b)`), if letters were offered; the text of a choice; a letter alone or
    at the start (`C. A dog`); `the answer is B`; the one choice whose words occur in the answer (of two that contain
    each other, the longer one). Of a choice that stands twice, the first one is returned. Where letters were not
    offered and a choice is a letter itself, such as the name of a note, a letter is a text and no number.
    """
    prediction = canonical(prediction)
    if stated := _stated(prediction, choices, letters_offered=letters_offered):
        return stated.pop() if len(stated) == 1 else None
    number = _contained(prediction, choices)
    if number is None and (texts := _without_letters(choices)) != tuple(choices):
        number = _equal(prediction, texts)
        number = _contained(prediction, texts) if number is None else number
    if number is None and _letters_count(choices, letters_offered) and _PERHAPS_AN_ARTICLE.search(prediction):
        return 0
    return number


def right_choices(question: Question) -> set[str]:
    """Returns the choices that the reference answer means; empty if it is not among the choices.

    A reference answer that is the text of a choice and the letter of another one means the text.
    """
    text = equal_choice(question.answer, choice_texts(question))
    return meant_choices(question.answer, question) if text is None else {literal(text)}


def means_right_choices(text: str, question: Question) -> bool:
    """Returns whether an answer means the choices that the reference answer means, or is the same text."""
    right = right_choices(question)
    return bool(right) and (literal(text) == literal(question.answer) or meant_choices(text, question) == right)


def meant_choices(text: str, question: Question) -> set[str]:
    """Returns the choices that an answer to a question means, in their `literal` form; empty if it means none.

    A letter or the whole text of a choice counts first, as in `chosen`, then every choice that the answer names, as in
    classification: an answer may name several. With more choices than letters, names alone count.
    """
    choices = choice_texts(question)
    numbers: set[int] = set()
    if len(choices) <= len(LETTERS):
        numbers = _stated(canonical(text), choices, letters_offered=letters_offered(question))
    numbers = numbers or named(text, choices)
    if not numbers and len(choices) <= len(LETTERS):
        number = chosen(text, choices, letters_offered=letters_offered(question))
        numbers = set() if number is None else {number}
    return {literal(choices[number]) for number in numbers}


def equal_choice(text: str, choices: Sequence[str]) -> str | None:
    """Returns the choice with the same text, however it is spelled; None where there is none, or several."""
    number = _equal(text, choices)
    return text if text in choices else None if number is None else choices[number]


def _stated(prediction: str, choices: Sequence[str], *, letters_offered: bool) -> set[int]:
    """Returns the choices that an answer gives by their letters, or the one that is its whole text."""
    if letters_offered and (match := _LETTER_ALONE.fullmatch(prediction)) and _index(match[1]) < len(choices):
        return {_index(match[1])}
    if (number := _equal(prediction, choices)) is not None:
        return {number}
    match = _LETTER_FIRST.match(prediction)
    index = len(choices) if match is None else _index(match[1])
    if match and index < len(choices) and literal(prediction[match.end(1) + 1 :]) == literal(choices[index]):
        return {index}  # "C. B", where C is the note B
    return _letters(prediction, len(choices)) if _letters_count(choices, letters_offered) else set()


def _letters_count(choices: Sequence[str], letters_offered: bool) -> bool:
    """Returns whether a letter is the number of a choice: always where letters were offered, else if it is no text."""
    return letters_offered or not any(re.fullmatch(r"\W*[a-zA-Z]\W*", choice) for choice in choices)


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
