"""The errors about conversations that exceed a bound, in the same words wherever a model reads one."""

from __future__ import annotations

from pipeline.core.errors import UserError


def too_many_text_tokens(where: str, tokens: int, limit: int) -> UserError:
    """Returns the error about a conversation that is longer than `data.max_text_tokens`.

    Args:
        where: names the conversation.
    """
    return UserError(
        where,
        f"is {tokens} text tokens long, data.max_text_tokens is {limit}",
        "raise data.max_text_tokens or leave this question out",
    )


def too_many_positions(where: str, positions: int, limit: int) -> UserError:
    """Returns the error about a conversation that takes, with its audio, more positions than the language model has.

    Args:
        where: names the conversation.
    """
    return UserError(
        where,
        f"takes {positions} positions with its audio, more than the {limit} of the language model",
        "shorten the audio or the text, leave it out, or use a language model with more positions",
    )


def prompt_too_long(where: str, tokens: int, limit: int) -> UserError:
    """Returns the error about a prompt whose text alone has more tokens than the language model has positions.

    Args:
        where: names the conversation.
    """
    fault = f"is {tokens} text tokens long, more than the {limit} positions of the language model"
    return UserError(where, fault, "shorten it, or use a language model with more positions")
