"""Renders a tokenizer's chat template, or LTU's format, and splits it around audio, question and answer."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from pipeline.core.errors import UserError

AUDIO_TOKEN = "<audio>"
_QUESTION, _ANSWER = "[[question]]", "[[answer]]"
_MARKERS = (AUDIO_TOKEN, _QUESTION, _ANSWER)
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
        prefix: everything up to and including the placeholder.
        before_question, after_question: the user's turn around the question, up to the end of the prompt.
        before_answer: white space between prompt and answer, which the model itself writes.
        after_answer: the end of the answer's turn.
    """

    prefix: str
    before_question: str
    after_question: str
    before_answer: str
    after_answer: str


def split_template(tokenizer: PreTrainedTokenizerBase, system_prompt: str) -> TemplateParts:
    """Renders the tokenizer's chat template once and returns its fixed texts.

    Raises:
        UserError: the template cannot be used, or the system prompt contains a marker.
    """
    for marker in _MARKERS:
        if marker in system_prompt:
            remedy = "remove it: the pipeline places the audio, the question and the answer"
            raise UserError("data.system_prompt", f"contains {marker}", remedy)
    has_template = tokenizer.chat_template is not None
    prompt, conversation = _render(tokenizer, system_prompt) if has_template else _render_ltu(tokenizer, system_prompt)
    positions = [conversation.find(marker) for marker in _MARKERS]
    if any(conversation.count(marker) != 1 for marker in _MARKERS) or positions != sorted(positions):
        raise unusable_template(tokenizer, "does not show audio, question and answer once each, in this order")
    before_audio, _, user_text = prompt.partition(AUDIO_TOKEN)
    before_question, _, after_question = user_text.partition(_QUESTION)
    before_answer, _, after_answer = conversation.removeprefix(prompt).partition(_ANSWER)
    if not conversation.startswith(prompt) or before_answer.strip():
        raise unusable_template(tokenizer, "writes another prompt for generation than for training")
    # White space after the end of the turn is never generated.
    after_answer = after_answer.rstrip() or tokenizer.eos_token or ""
    if not after_answer:
        raise unusable_template(tokenizer, "does not end an answer, and the tokenizer has no end-of-sequence token")
    return TemplateParts(before_audio + AUDIO_TOKEN, before_question, after_question, before_answer, after_answer)


def _render(tokenizer: PreTrainedTokenizerBase, system_prompt: str) -> tuple[str, str]:
    """Returns the generation prompt and the whole conversation, with markers for question and answer."""
    user = AUDIO_TOKEN + _QUESTION
    candidates = [[{"role": "system", "content": system_prompt}, {"role": "user", "content": user}]]
    # Gemma's template has no system role: the system text goes to the beginning of the user's turn.
    candidates.append([{"role": "user", "content": f"{system_prompt}\n\n{user}"}])
    if not system_prompt:
        candidates = [[{"role": "user", "content": user}]]
    for turns in candidates:
        try:
            conversation = _apply_template(tokenizer, [*turns, {"role": "assistant", "content": _ANSWER}], prompt=False)
        except jinja2.TemplateError:
            continue
        if system_prompt.strip() in conversation:
            return _apply_template(tokenizer, turns, prompt=True), conversation
    raise unusable_template(tokenizer, "renders no system text and question")


def _apply_template(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], *, prompt: bool) -> str:
    text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt, **_TEMPLATE_OPTIONS)
    return text


def _render_ltu(tokenizer: PreTrainedTokenizerBase, system_prompt: str) -> tuple[str, str]:
    start = (tokenizer.bos_token or "") + (f"{system_prompt}\n\n" if system_prompt else "")
    prompt = f"{start}{AUDIO_TOKEN}### Instruction:\n{_QUESTION}\n\n### Response:\n"
    return prompt, prompt + _ANSWER


def unusable_template(tokenizer: PreTrainedTokenizerBase, fault: str) -> UserError:
    """Returns the error about a chat template with this fault."""
    remedy = "use a language model with another chat template"
    return UserError(tokenizer.name_or_path or "the tokenizer", f"its chat template {fault}", remedy)
