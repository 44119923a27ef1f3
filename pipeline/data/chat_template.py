"""Renders questions about a clip into token ids and labels with the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import jinja2
import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.config import DataConfig
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import Question
from pipeline.core.labels import IGNORE_INDEX

AUDIO_TOKEN = "<audio>"
_CACHED_CONVERSATIONS = 100_000
_TOKENISED_AT_ONCE = 10_000
_QUESTION, _ANSWER = "[[question]]", "[[answer]]"
# Llama 3's template writes today's date and Qwen 3's writes a thinking block. Both are fixed, so that a prompt does not
# depend on the day and is the same in training and in generation.
_TEMPLATE_OPTIONS = {"date_string": "26 Jul 2024", "enable_thinking": False}


def load_tokenizer(language_model: str | Path) -> PreTrainedTokenizerBase:
    """Loads the language model's tokenizer, without running remote code, and adds `<audio>` as one special token.

    The token's id may lie beyond the embedding matrix, since the placeholder is never embedded.

    Args:
        language_model: a Hugging Face folder or Hub name.

    Raises:
        UserError: there is no usable tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(language_model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fault = f"has no usable tokenizer ({str(error).splitlines()[0]})"
        raise UserError(language_model, fault, "name a Hugging Face folder or a model on the Hub") from error
    tokenizer.add_tokens([AddedToken(AUDIO_TOKEN, special=True, normalized=False)], special_tokens=True)
    return tokenizer


@dataclass(frozen=True)
class Row:
    """One sequence before padding: three int64 arrays of equal length, in the form the model reads."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    segment_ids: NDArray[np.int64]


@dataclass(frozen=True)
class _TemplateParts:
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


class ChatTemplate:
    """Renders conversations: system text, a user turn with the clip's placeholder and the question, then the answer.

    The tokenizer's template is rendered once, with markers in place of question and answer, which gives its fixed
    parts: everything up to and including `<audio>` (shared by all questions of a clip), the text between question and
    answer, and the end of the answer. Labels are built from these parts and not from `{% generation %}` marks, which
    the templates of Llama and Qwen lack. A tokenizer without a template gets LTU's format (arXiv 2305.10790), with the
    audio in front: `### Instruction:\\n{question}\\n\\n### Response:\\n{answer}`.

    Args:
        tokenizer: a tokenizer from `load_tokenizer`.
        system_prompt: text before the audio; empty for none.
        max_text_tokens: a longer conversation is an error and never truncated.
        loss_on: `answer` (with its end of turn), or `all_text`, which adds the question and the template around it. The
            system text never has a loss, nor has the first token after the audio, whose predecessor depends on the
            integration.

    Attributes:
        audio_token_id: token id of the placeholder.
        pad_token_id: token id that pads rows.
        end_token_id: token id that ends an answer and stops generation.
        prefix: token ids up to and including the placeholder.

    Raises:
        UserError: the tokenizer's template cannot be used.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str,
        *,
        max_text_tokens: int,
        loss_on: Literal["answer", "all_text"] = "answer",
    ) -> None:
        self._tokenizer = tokenizer
        self._name = tokenizer.name_or_path or "the tokenizer"
        self._max_text_tokens = max_text_tokens
        self._loss_on = loss_on
        self._cache: dict[tuple[str, str], tuple[list[int], int]] = {}
        if AUDIO_TOKEN in system_prompt:
            raise UserError("data.system_prompt", f"contains {AUDIO_TOKEN}", "remove it: the pipeline places the audio")
        self.audio_token_id: int = tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
        self._parts = self._split(system_prompt)
        self.prefix = self._encode(self._parts.prefix)
        self.end_token_id = self._encode(self._parts.after_answer)[-1]
        self.pad_token_id: int = self.end_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._check()

    def row(self, questions: Sequence[Question], *, audio: bool = True) -> Row:
        """Returns one sequence about one clip.

        Several questions are packed: the prefix is segment 0, what follows it in each conversation is segment 1, 2, ...
        A sequence with a single question is all segment 0.

        Args:
            audio: False omits the placeholder, for questions about no clip.

        Raises:
            UserError: a conversation is longer than max_text_tokens, or contains the placeholder.
        """
        ids = list(self.prefix) if audio else self.prefix[:-1]
        labels, segments = [IGNORE_INDEX] * len(ids), [0] * len(ids)
        for number, question in enumerate(questions, start=1):
            suffix_ids, prompt_length = self._suffix(question)
            self._check_length(len(self.prefix) + len(suffix_ids), f"question '{question.question_id}'")
            unlabelled = prompt_length if self._loss_on == "answer" else 1
            ids += suffix_ids
            labels += [IGNORE_INDEX] * unlabelled + suffix_ids[unlabelled:]
            segments += [number if len(questions) > 1 else 0] * len(suffix_ids)
        return Row(*(np.array(values, np.int64) for values in (ids, labels, segments)))

    def lengths(self, questions: Iterable[Question]) -> Iterator[int]:
        """Yields the number of tokens after the placeholder for each conversation, without checking them."""
        questions = iter(questions)
        while chunk := list(islice(questions, _TOKENISED_AT_ONCE)):
            texts = [AUDIO_TOKEN + self._suffix_text(question) for question in chunk]
            for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]:
                yield len(ids) - 1

    def prompt(self, question: str) -> list[int]:
        """Returns the token ids up to where the answer begins, for generation.

        Raises:
            UserError: the prompt is longer than max_text_tokens, or the question contains the placeholder.
        """
        ids = self.prefix + self._encode_suffix(self._prompt_text(question), repr(question))
        self._check_length(len(ids), repr(question))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of an answer, without special tokens and surrounding white space."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()

    def _suffix(self, question: Question) -> tuple[list[int], int]:
        """Returns the token ids after the placeholder, and how many of them precede the answer."""
        key = (question.question, question.answer)
        if key not in self._cache:
            where = f"question '{question.question_id}'"
            prompt_ids = self._encode_suffix(self._prompt_text(question.question), where)
            suffix_ids = self._encode_suffix(self._suffix_text(question), where)
            if suffix_ids[: len(prompt_ids)] != prompt_ids:
                raise UserError(where, "its answer merges with the prompt's last token", "check the chat template")
            if len(self._cache) >= _CACHED_CONVERSATIONS:
                self._cache.clear()
            self._cache[key] = suffix_ids, len(prompt_ids)
        return self._cache[key]

    def _prompt_text(self, question: str) -> str:
        return self._parts.before_question + question.strip() + self._parts.after_question

    def _suffix_text(self, question: Question) -> str:
        answer_text = self._parts.before_answer + question.answer.strip() + self._parts.after_answer
        return self._prompt_text(question.question) + answer_text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _encode_suffix(self, text: str, where: str) -> list[int]:
        # Tokenised after the placeholder: some tokenizers treat the beginning of a text differently.
        ids = self._encode(AUDIO_TOKEN + text)[1:]
        if self.audio_token_id in ids:
            raise UserError(where, f"contains {AUDIO_TOKEN}", "remove it: the pipeline places the audio")
        return ids

    def _check_length(self, length: int, where: str) -> None:
        if length > self._max_text_tokens:
            raise UserError(
                where,
                f"is {length} text tokens long, data.max_text_tokens is {self._max_text_tokens}",
                "raise data.max_text_tokens or leave this question out",
            )

    def _split(self, system_prompt: str) -> _TemplateParts:
        has_template = self._tokenizer.chat_template is not None
        prompt, conversation = self._render(system_prompt) if has_template else self._render_ltu(system_prompt)
        markers = (AUDIO_TOKEN, _QUESTION, _ANSWER)
        positions = [conversation.find(marker) for marker in markers]
        if any(conversation.count(marker) != 1 for marker in markers) or positions != sorted(positions):
            raise self._unusable("does not show audio, question and answer once each, in this order")
        before_audio, _, user_text = prompt.partition(AUDIO_TOKEN)
        before_question, _, after_question = user_text.partition(_QUESTION)
        before_answer, _, after_answer = conversation.removeprefix(prompt).partition(_ANSWER)
        if not conversation.startswith(prompt) or before_answer.strip():
            raise self._unusable("writes another prompt for generation than for training")
        # White space after the end of the turn is never generated.
        after_answer = after_answer.rstrip() or self._tokenizer.eos_token or ""
        if not after_answer:
            raise self._unusable("does not end an answer, and the tokenizer has no end-of-sequence token")
        return _TemplateParts(before_audio + AUDIO_TOKEN, before_question, after_question, before_answer, after_answer)

    def _render(self, system_prompt: str) -> tuple[str, str]:
        """Returns the generation prompt and the whole conversation, with markers for question and answer."""
        user = AUDIO_TOKEN + _QUESTION
        candidates = [[{"role": "system", "content": system_prompt}, {"role": "user", "content": user}]]
        # Gemma's template has no system role: the system text goes to the beginning of the user's turn.
        candidates.append([{"role": "user", "content": f"{system_prompt}\n\n{user}"}])
        if not system_prompt:
            candidates = [[{"role": "user", "content": user}]]
        for turns in candidates:
            try:
                conversation = self._apply_template([*turns, {"role": "assistant", "content": _ANSWER}], prompt=False)
            except jinja2.TemplateError:
                continue
            if system_prompt.strip() in conversation:
                return self._apply_template(turns, prompt=True), conversation
        raise self._unusable("renders no system text and question")

    def _apply_template(self, turns: list[dict[str, str]], *, prompt: bool) -> str:
        text: str = self._tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=prompt, **_TEMPLATE_OPTIONS
        )
        return text

    def _render_ltu(self, system_prompt: str) -> tuple[str, str]:
        start = (self._tokenizer.bos_token or "") + (f"{system_prompt}\n\n" if system_prompt else "")
        prompt = f"{start}{AUDIO_TOKEN}### Instruction:\n{_QUESTION}\n\n### Response:\n"
        return prompt, prompt + _ANSWER

    def _check(self) -> None:
        """Checks that the parts, tokenised one by one, give the conversation, and that labels decode to the answer."""
        example = Question(question_id="example", question="What do you hear?", answer="A dog barks.")
        suffix_ids, prompt_length = self._suffix(example)
        if self.prefix + suffix_ids != self._encode(self._parts.prefix + self._suffix_text(example)):
            raise self._unusable("does not tokenise part by part")
        if "".join(self.decode(suffix_ids[prompt_length:]).split()) != "".join(example.answer.split()):
            raise self._unusable("gives labels that do not decode to the answer")

    def _unusable(self, fault: str) -> UserError:
        return UserError(self._name, f"its chat template {fault}", "use a language model with another chat template")


def build_chat_template(
    language_model: str, data: DataConfig, loss_on: Literal["answer", "all_text"]
) -> tuple[PreTrainedTokenizerBase, ChatTemplate]:
    """Loads the language model's tokenizer and builds the chat template that training uses.

    Raises:
        UserError: see `load_tokenizer` and `ChatTemplate`.
    """
    tokenizer = load_tokenizer(language_model)
    template = ChatTemplate(tokenizer, data.system_prompt, max_text_tokens=data.max_text_tokens, loss_on=loss_on)
    return tokenizer, template
