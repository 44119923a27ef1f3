"""A prompt lists each choice once, with its letter; an answer that means no choice is found."""

import pytest

from pipeline.core.choices import choice_lines, choice_texts, letters_offered, prompt_text
from pipeline.core.feature_contract import Question


def ask(text: str, choices: list[str] | None, answer: str = "dog") -> Question:
    return Question(question_id="q", question=text, answer=answer, choices=choices)


def test_the_place_of_a_sound_names_no_choice() -> None:
    assert choice_lines(ask("Is <audio> an image?", ["audio", "image"])) == "A. audio\nB. image"


@pytest.mark.parametrize(
    ("text", "choices", "prompt"),
    [
        ("Which?", ["dog", "cat"], "Which?\nA. dog\nB. cat"),
        ("Which? ", ["dog", "dog", " cat"], "Which?\nA. dog\nB. dog\nC. cat"),
        ("Which?", ["dog", "", "cat"], "Which?\nA. dog\nC. cat"),
        ("Which?", ["(A) dog", "(B) cat"], "Which?\nA. dog\nB. cat"),
        ("Which?", ["A: dog", "B: cat"], "Which?\nA. dog\nB. cat"),
        ("Which?", ["B. dog", "A. cat"], "Which?\nA. B. dog\nB. A. cat"),
        ("A car alarm?", ["car", "car alarm"], "A car alarm?\nA. car\nB. car alarm"),
        ("Is it A > B?", ["A > B", "A < B"], "Is it A > B?\nA. A > B\nB. A < B"),
        ("", ["dog", "cat"], "A. dog\nB. cat"),
    ],
)
def test_choices_stand_below_the_text_with_their_letters(text: str, choices: list[str], prompt: str) -> None:
    assert prompt_text(ask(text, choices)) == prompt
    assert letters_offered(ask(text, choices))


@pytest.mark.parametrize(
    ("text", "choices", "lettered"),
    [
        (" Which? ", None, False),
        ("Which?", [], False),
        ("Is it a Dog, or a cat?", ["dog", "cat"], False),
        ("Which?\nA. dog\nB. cat", ["A", "B"], True),
        ("Which?\n(A) dog (B) cat", ["(A) dog", "(B) cat"], True),
        ("A car alarm or a car?", ["car", "car alarm"], False),
    ],
)
def test_nothing_is_added_to_a_text_that_names_all_choices(text: str, choices: list[str], lettered: bool) -> None:
    assert prompt_text(ask(text, choices)) == text
    assert letters_offered(ask(text, choices)) == lettered


def test_more_choices_than_letters_stand_on_one_line() -> None:
    classes = [f"class {number}" for number in range(27)]
    question = ask("Which?", [*classes, "class 3"])
    assert prompt_text(question) == f"Which?\nAnswer with one of these, word for word: {', '.join(classes)}."
    assert not letters_offered(question)
    assert letters_offered(ask("Which?", classes[:26]))


def test_letters_that_the_choices_begin_with_are_not_their_texts() -> None:
    assert choice_texts(ask("Which?", ["A. dog", "b) cat"])) == ("dog", "cat")
    assert choice_texts(ask("Which?", ["A. Vivaldi", "J. S. Bach"])) == ("A. Vivaldi", "J. S. Bach")
