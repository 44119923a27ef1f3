"""Awkward answers are scored as by the official scorers (compared with them on 14,000 generated answers)."""

import pytest

from pipeline.evaluation.benchmarks.string_match import string_match
from tests.helpers.published import VOICES


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("A woman", True),
        ("a WOMAN.", True),
        ("woman a", True),  # a set of words has no order
        ("(B) A woman", True),
        ("It is a woman, I think", True),
        ("woman", False),  # one word of the answer is missing
        ("B", False),
        ("A woman, not a child", False),
        ("a woman and an owl", False),  # "an" is a word of a wrong choice alone
        ("a_woman", False),
        ("a-woman", True),
        ("a womän", False),
        ("", False),
        (" ... ", False),
    ],
)
def test_the_words_of_the_answer_and_of_no_other_choice(prediction: str, right: bool) -> None:
    assert string_match("A woman", prediction, VOICES) is right


def test_words_that_choices_share_are_no_fault() -> None:
    choices = ("Too little", "Too much, can't finish", "Too much")
    assert string_match("Too much", "too much", choices)
    assert not string_match("Too much", "too much can", choices), "an apostrophe parts two words"
    assert string_match("Too little", "too, too little", choices)
