"""A question about a clip as token ids and labels, through the tokenizer's chat template; packed rows of several."""

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

from pipeline.config import ExperimentConfig
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import Question

AUDIO_TOKEN = "<audio>"
IGNORE_INDEX = -100  # label of a token without loss, as in torch and transformers
_CACHED_CONVERSATIONS = 100_000
_TOKENISED_AT_ONCE = 10_000
_QUESTION, _ANSWER = "[[question]]", "[[answer]]"
# Llama 3's template writes today's date and Qwen 3's a thinking block: both fixed, so that a prompt never depends on
# the day, and training and generation see the same one.
_TEMPLATE_OPTIONS = {"date_string": "26 Jul 2024", "enable_thinking": False}


def load_tokenizer(language_model: str | Path) -> PreTrainedTokenizerBase:
    """The language model's tokenizer with `<audio>` as one special token (its id may lie beyond the embedding: the
    placeholder is never embedded). Remote code is never run.

    Args:
        language_model: a Hugging Face folder or Hub name.

    Raises:
        UserError: there is no usable tokenizer.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(language_model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fault = f"has no usable tokenizer ({str(error).splitlines()[0]})"
        raise UserError(language_model, fault, "give a Hugging Face folder or Hub name") from error
    tokenizer.add_tokens([AddedToken(AUDIO_TOKEN, special=True, normalized=False)], special_tokens=True)
    return tokenizer


@dataclass(frozen=True)
class Row:
    """One sequence before padding; three int64 arrays of one length, as the model reads them."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    segment_ids: NDArray[np.int64]


@dataclass(frozen=True)
class _Parts:
    """A conversation's fixed texts: up to and including the placeholder; before and after the question; between prompt
    and answer (white space that the model itself writes); after the answer."""

    head: str
    before: str
    middle: str
    gap: str
    tail: str


class Chat:
    """Writes conversations: system text, a user turn of the clip's placeholder and the question, then the answer.

    The template is rendered once, with marks in place of question and answer, which gives its fixed parts: everything
    up to and including `<audio>` (shared by all questions of a clip), the text between question and answer, and the end
    of the answer. So the labels are built from parts that are known, not from `{% generation %}` marks, which the
    templates of Llama and Qwen lack. A tokenizer without a template gets LTU's form (arXiv 2305.10790), the audio in
    front: `### Instruction:\\n{question}\\n\\n### Response:\\n{answer}`.

    Args:
        tokenizer: from `load_tokenizer`.
        system_prompt: text before the audio; empty for none.
        max_text_tokens: a longer conversation is an error, never cut.
        loss_on: `answer` (with its end of turn), or `all_text`: also the question and the template around it. Never
            the system text, nor the first token after the audio, whose predecessor depends on the integration.

    Attributes:
        audio_token_id: the placeholder.
        pad_token_id: fills rows on the right.
        end_token_id: ends an answer; generation stops here.
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
            raise UserError("data.system_prompt", f"holds {AUDIO_TOKEN}", "remove it: the pipeline places the audio")
        self.audio_token_id: int = tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
        self._parts = self._split(system_prompt)
        self.prefix = self._encode(self._parts.head)
        self.end_token_id = self._encode(self._parts.tail)[-1]
        self.pad_token_id: int = self.end_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._check()

    def row(self, questions: Sequence[Question], *, audio: bool = True) -> Row:
        """One sequence about one clip. Several questions are packed: the prefix is segment 0, the rest of each
        conversation segment 1, 2, ...; a single question is all segment 0.

        Args:
            audio: False for questions about no clip: the same without the placeholder.

        Raises:
            UserError: a conversation is longer than max_text_tokens, or holds the placeholder.
        """
        ids = list(self.prefix) if audio else self.prefix[:-1]
        labels, segments = [IGNORE_INDEX] * len(ids), [0] * len(ids)
        for number, question in enumerate(questions, start=1):
            rest, prompt_length = self._rest(question)
            self._check_length(len(self.prefix) + len(rest), f"question '{question.question_id}'")
            unlabelled = prompt_length if self._loss_on == "answer" else 1
            ids += rest
            labels += [IGNORE_INDEX] * unlabelled + rest[unlabelled:]
            segments += [number if len(questions) > 1 else 0] * len(rest)
        return Row(*(np.array(values, np.int64) for values in (ids, labels, segments)))

    def lengths(self, questions: Iterable[Question]) -> Iterator[int]:
        """Tokens of each conversation behind the placeholder, without looking closer at them."""
        questions = iter(questions)
        while chunk := list(islice(questions, _TOKENISED_AT_ONCE)):
            texts = [
                AUDIO_TOKEN + self._prompt_text(q.question) + self._parts.gap + q.answer.strip() + self._parts.tail
                for q in chunk
            ]
            for ids in self._tokenizer(texts, add_special_tokens=False)["input_ids"]:
                yield len(ids) - 1

    def prompt(self, question: str) -> list[int]:
        """Token ids up to where the answer begins, for generation.

        Raises:
            UserError: longer than max_text_tokens, or the question holds the placeholder.
        """
        ids = self.prefix + self._encode_rest(self._prompt_text(question), repr(question))
        self._check_length(len(ids), repr(question))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer, without special tokens and surrounding white space."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()

    def _rest(self, question: Question) -> tuple[list[int], int]:
        """Ids after the placeholder, and how many of them come before the answer."""
        key = (question.question, question.answer)
        if key not in self._cache:
            where = f"question '{question.question_id}'"
            text = self._prompt_text(question.question)
            prompt = self._encode_rest(text, where)
            rest = self._encode_rest(text + self._parts.gap + question.answer.strip() + self._parts.tail, where)
            if rest[: len(prompt)] != prompt:
                raise UserError(where, "its answer melts into the prompt's last token", "check the chat template")
            if len(self._cache) >= _CACHED_CONVERSATIONS:
                self._cache.clear()
            self._cache[key] = rest, len(prompt)
        return self._cache[key]

    def _prompt_text(self, question: str) -> str:
        return self._parts.before + question.strip() + self._parts.middle

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _encode_rest(self, text: str, where: str) -> list[int]:
        # Tokenised behind the placeholder: some tokenizers treat the beginning of a text differently.
        ids = self._encode(AUDIO_TOKEN + text)[1:]
        if self.audio_token_id in ids:
            raise UserError(where, f"holds {AUDIO_TOKEN}", "remove it: the pipeline places the audio")
        return ids

    def _check_length(self, length: int, where: str) -> None:
        if length > self._max_text_tokens:
            raise UserError(
                where,
                f"is {length} text tokens long, data.max_text_tokens is {self._max_text_tokens}",
                "raise data.max_text_tokens or leave this question out",
            )

    def _split(self, system_prompt: str) -> _Parts:
        prompt, whole = (
            self._render_ltu(system_prompt) if self._tokenizer.chat_template is None else self._render(system_prompt)
        )
        order = [whole.find(mark) for mark in (AUDIO_TOKEN, _QUESTION, _ANSWER)]
        if any(whole.count(mark) != 1 for mark in (AUDIO_TOKEN, _QUESTION, _ANSWER)) or order != sorted(order):
            raise self._unusable("does not show audio, question and answer once each, in this order")
        head, _, user = prompt.partition(AUDIO_TOKEN)
        before, _, middle = user.partition(_QUESTION)
        gap, _, tail = whole.removeprefix(prompt).partition(_ANSWER)
        if not whole.startswith(prompt) or gap.strip():
            raise self._unusable("writes another prompt for generation than for training")
        # White space after the end of the turn is never generated.
        tail = tail.rstrip() or self._tokenizer.eos_token or ""
        if not tail:
            raise self._unusable("does not end an answer, and the tokenizer has no end of text")
        return _Parts(head + AUDIO_TOKEN, before, middle, gap, tail)

    def _render(self, system_prompt: str) -> tuple[str, str]:
        """The generation prompt and the whole conversation, with marks for question and answer."""
        user = AUDIO_TOKEN + _QUESTION
        ways = [[{"role": "system", "content": system_prompt}, {"role": "user", "content": user}]]
        # Gemma's template knows no system role: its text goes to the head of the user's turn.
        ways.append([{"role": "user", "content": f"{system_prompt}\n\n{user}"}])
        if not system_prompt:
            ways = [[{"role": "user", "content": user}]]
        for turns in ways:
            try:
                whole = self._apply_template([*turns, {"role": "assistant", "content": _ANSWER}], prompt=False)
            except jinja2.TemplateError:
                continue
            if system_prompt.strip() in whole:
                return self._apply_template(turns, prompt=True), whole
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
        """The parts, tokenised one by one, are the whole conversation, and its labels decode to the answer."""
        question, answer = "What do you hear?", "A dog barks."
        parts = self._parts
        rest, prompt_length = self._rest(Question(question_id="example", question=question, answer=answer))
        whole = self._encode(parts.head + parts.before + question + parts.middle + parts.gap + answer + parts.tail)
        if self.prefix + rest != whole:
            raise self._unusable("does not tokenise part by part")
        if "".join(self.decode(rest[prompt_length:]).split()) != "".join(answer.split()):
            raise self._unusable("gives labels that do not decode to the answer")

    def _unusable(self, fault: str) -> UserError:
        return UserError(self._name, f"its chat template {fault}", "use a language model with another chat template")


def build_chat(config: ExperimentConfig) -> tuple[PreTrainedTokenizerBase, Chat]:
    """The language model's tokenizer, and what writes conversations with it."""
    tokenizer = load_tokenizer(config.model.language_model)
    data = config.data
    chat = Chat(tokenizer, data.system_prompt, max_text_tokens=data.max_text_tokens, loss_on=config.train.loss_on)
    return tokenizer, chat
