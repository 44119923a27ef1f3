"""Renders a tokenizer's chat template, or LTU's format, and splits it around the data's texts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise, takewhile
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from pipeline.core.errors import UserError

AUDIO_TOKEN = "<audio>"
_SYSTEM, _QUESTION, _ANSWER = "[[system]]", "[[question]]", "[[answer]]"
MARKERS = (AUDIO_TOKEN, _QUESTION, _ANSWER)
# Llama 3's template writes today's date, with `date_string` or the function that transformers offers to all templates,
# and Qwen 3's writes a thinking block. All are fixed, so that a prompt does not depend on the day and is the same in
# training and in generation.
_DATE = datetime(2024, 7, 26)
_TEMPLATE_OPTIONS: dict[str, Any] = {
    "date_string": _DATE.strftime("%d %b %Y"),
    "strftime_now": _DATE.strftime,
    "enable_thinking": False,
}


@dataclass(frozen=True)
class TemplateParts:
    """The fixed texts of a conversation.

    Attributes:
        start: everything up to the first user turn's content, in texts of the template (even indices) and the system
            text (odd indices).
        before_question, after_question: the user's turn around the question, up to the end of the prompt. Clips with
            which a turn begins stand in front of `before_question`.
        before_answer: white space between prompt and answer, which the model itself writes.
        after_answer: the end of the answer's turn.
    """

    start: tuple[str, ...]
    before_question: str
    after_question: str
    before_answer: str
    after_answer: str


def split_template(tokenizer: PreTrainedTokenizerBase, system_text: str | None) -> TemplateParts:
    """Renders the tokenizer's chat template and returns its fixed texts.

    Args:
        system_text: the system text. Empty: none, also where the template has a default one (Qwen2.5, SmolLM2). None:
            the template's default, which is no text in most templates.

    Raises:
        UserError: the template cannot be used, or writes its default text also where the system text is empty.
    """
    if system_text is None or system_text == "":
        parts = _split(tokenizer, "")
        return parts if system_text is None else _without_default(tokenizer, parts)
    if not system_text.strip():
        return _split(tokenizer, system_text)
    marked = _split(tokenizer, _SYSTEM)
    before, _, after = marked.start[0].partition(_SYSTEM)
    if any(marker in system_text for marker in (_SYSTEM, *MARKERS)):
        return replace(marked, start=(before, system_text.strip(), after))
    parts = _split(tokenizer, system_text)
    (start,) = parts.start
    if len(start) >= len(before) + len(after) and start.startswith(before) and start.endswith(after):
        parts = replace(parts, start=(before, start.removeprefix(before).removesuffix(after), after))
    return parts


def default_system_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns the system text that the template writes where a conversation has none; empty if it writes none.

    Raises:
        UserError: the template cannot be used.
    """
    return _default_text(tokenizer, _split(tokenizer, ""))


def describe_system_text(tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> str | None:
    """Returns what the model reads in place of a system text that a config leaves empty; None if it names one.

    Args:
        system_prompt: `data.system_prompt`.

    Raises:
        UserError: the template cannot be used.
    """
    if system_prompt is not None and system_prompt.strip():
        return None
    default = default_system_text(tokenizer)
    if system_prompt is None:
        written = f"the template writes its own system text, '{default}'" if default else "there is no system text"
        return f"data.system_prompt is null: {written}"
    replaced = f" in place of the template's own, '{default}' (null keeps that one)" if default else ""
    return f"data.system_prompt is empty: there is no system text{replaced}"


def _default_text(tokenizer: PreTrainedTokenizerBase, parts: TemplateParts) -> str:
    """Returns what begins a conversation without a system text and is no part of one with a system text."""
    try:
        before, _, after = _split(tokenizer, _SYSTEM).start[0].partition(_SYSTEM)
    except UserError:  # the template takes no system text, so what it writes is not in place of one
        return ""
    (start,) = parts.start
    head = _length_in_common(start, before)
    tail = _length_in_common(start[head:][::-1], after[::-1])
    return start[head : len(start) - tail].strip()


def _length_in_common(text: str, other: str) -> int:
    """Returns the length of the longest common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, other, strict=False)))


def _without_default(tokenizer: PreTrainedTokenizerBase, parts: TemplateParts) -> TemplateParts:
    """Replaces the template's default system text by an empty system turn; `parts` if there is no default text."""
    default = _default_text(tokenizer, parts)
    if not default:
        return parts
    prompt, conversation = (
        _apply_template(
            tokenizer, [{"role": "system", "content": ""}, *_without_system(""), *answer], prompt=not answer
        )
        for answer in ([], [{"role": "assistant", "content": _ANSWER}])
    )
    empty = _split_rendered(tokenizer, prompt, conversation)
    if default in empty.start[0]:
        fault = f"writes its own system text also where data.system_prompt is empty: '{default}'"
        raise unusable_template(
            tokenizer, fault, "set data.system_prompt to null to train with that text, or to a text of your own"
        )
    return empty


def split_next_turn(tokenizer: PreTrainedTokenizerBase, parts: TemplateParts) -> str:
    """Returns the text between the end of an answer and the content of the next user turn.

    Raises:
        UserError: the template cannot express a second exchange, or writes it unlike the first one.
    """
    if tokenizer.chat_template is None:
        return "\n\n"
    exchanges = [(f"[[question{number}]]", f"[[answer{number}]]") for number in range(3)]
    turns = [
        {"role": role, "content": content}
        for exchange in exchanges
        for role, content in zip(("user", "assistant"), exchange, strict=True)
    ]
    try:
        conversation = _apply_template(tokenizer, turns, prompt=False)
        prompt = _apply_template(tokenizer, turns[:-1], prompt=True)
    except jinja2.TemplateError as error:
        raise unusable_template(tokenizer, f"renders no second exchange ({error})") from error
    # Some templates end the whole conversation, and not each answer, with the end-of-sequence token.
    ends = (parts.after_answer, parts.after_answer.removesuffix(tokenizer.eos_token or ""))
    texts = []
    for (_, answer), (question, _) in pairwise(exchanges):
        text = conversation.partition(answer)[2].partition(question)[0]
        end = next((end for end in ends if end and text.startswith(end)), None)
        if end is None or question not in conversation:
            raise unusable_template(tokenizer, "does not end an earlier answer like the last one")
        texts.append(text.removeprefix(end))
    if texts[0] != texts[1] or not prompt.endswith(exchanges[-1][0] + parts.after_question):
        raise unusable_template(tokenizer, "writes later turns unlike the first ones")
    return texts[0].removesuffix(parts.before_question)


def _split(tokenizer: PreTrainedTokenizerBase, system_text: str) -> TemplateParts:
    has_template = tokenizer.chat_template is not None
    prompt, conversation = _render(tokenizer, system_text) if has_template else _render_ltu(tokenizer, system_text)
    return _split_rendered(tokenizer, prompt, conversation)


def _split_rendered(tokenizer: PreTrainedTokenizerBase, prompt: str, conversation: str) -> TemplateParts:
    positions = [conversation.find(marker) for marker in MARKERS]
    if any(conversation.count(marker) != 1 for marker in MARKERS) or positions != sorted(positions):
        raise unusable_template(tokenizer, "does not show audio, question and answer once each, in this order")
    start, _, user_text = prompt.partition(AUDIO_TOKEN)
    before_question, _, after_question = user_text.partition(_QUESTION)
    before_answer, _, after_answer = conversation.removeprefix(prompt).partition(_ANSWER)
    if not conversation.startswith(prompt) or before_answer.strip():
        raise unusable_template(tokenizer, "writes another prompt for generation than for training")
    # White space after the end of the turn is never generated.
    after_answer = after_answer.rstrip() or tokenizer.eos_token or ""
    if not after_answer:
        raise unusable_template(tokenizer, "does not end an answer, and the tokenizer has no end-of-sequence token")
    return TemplateParts((start,), before_question, after_question, before_answer, after_answer)


def _render(tokenizer: PreTrainedTokenizerBase, system_text: str) -> tuple[str, str]:
    """Returns the generation prompt and the whole conversation, with markers for question and answer."""
    answer = {"role": "assistant", "content": _ANSWER}
    for with_system in (_with_system_role, _with_system_in_user_turn) if system_text else (_without_system,):
        turns = with_system(system_text)
        try:
            conversation = _apply_template(tokenizer, [*turns, answer], prompt=False)
            marked = _apply_template(tokenizer, [*with_system(_SYSTEM), answer], prompt=False)
        except jinja2.TemplateError:
            continue
        if system_text.strip() in conversation and (_SYSTEM in marked or not system_text):
            return _apply_template(tokenizer, turns, prompt=True), conversation
    raise unusable_template(tokenizer, "renders no system text and question")


def _with_system_role(system_text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system_text}, *_without_system("")]


def _with_system_in_user_turn(system_text: str) -> list[dict[str, str]]:
    # Gemma's template has no system role: the system text goes to the beginning of the user's turn.
    return [{"role": "user", "content": f"{system_text}\n\n{AUDIO_TOKEN}{_QUESTION}"}]


def _without_system(_: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": AUDIO_TOKEN + _QUESTION}]


def _apply_template(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], *, prompt: bool) -> str:
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt, **_TEMPLATE_OPTIONS)
    return text


def _render_ltu(tokenizer: PreTrainedTokenizerBase, system_text: str) -> tuple[str, str]:
    start = (tokenizer.bos_token or "") + (f"{system_text}\n\n" if system_text else "")
    prompt = f"{start}{AUDIO_TOKEN}### Instruction:\n{_QUESTION}\n\n### Response:\n"
    return prompt, prompt + _ANSWER


def unusable_template(
    tokenizer: PreTrainedTokenizerBase, fault: str, remedy: str = "use a language model with another chat template"
) -> UserError:
    """Returns the error about a chat template with this fault."""
    return UserError(tokenizer.name_or_path or "the tokenizer", f"its chat template {fault}", remedy)
