"""Renders questions about a clip into token ids and labels with the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.config import DataConfig
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import Question
from pipeline.core.labels import IGNORE_INDEX
from pipeline.data.plain_text import PlainTextTokenizer
from pipeline.data.template_parts import AUDIO_TOKEN, split_template, unusable_template

_CACHED_CONVERSATIONS = 100_000
_TOKENISED_AT_ONCE = 10_000


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


class ChatTemplate:
    """Renders conversations: system text, a user turn with the clip's placeholder and the question, then the answer.

    The tokenizer's template is rendered once, with markers in place of question and answer, which gives its fixed
    parts: everything up to and including `<audio>` (shared by all questions of a clip), the text between question and
    answer, and the end of the answer. Labels are built from these parts and not from `{% generation %}` marks, which
    the templates of Llama and Qwen lack. A tokenizer without a template gets LTU's format (arXiv 2305.10790), with the
    audio in front: `### Instruction:\\n{question}\\n\\n### Response:\\n{answer}`.

    Questions and answers are plain text: a control token in them, or the placeholder, is encoded as its characters (see
    `PlainTextTokenizer`). Where the template marks turns by plain text instead (`### Response:`), a question or answer
    with such a mark is an error.

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
        self._max_text_tokens = max_text_tokens
        self._loss_on = loss_on
        self._cache: dict[tuple[str, str], tuple[list[int], int]] = {}
        self.audio_token_id: int = tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
        self._plain_text = PlainTextTokenizer(tokenizer)
        self._parts = split_template(tokenizer, system_prompt)
        self._turn_marks = self._find_turn_marks(system_prompt)
        self.prefix = self._encode(self._parts.prefix)
        self.end_token_id = self._encode(self._parts.after_answer)[-1]
        self.pad_token_id: int = self.end_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._check()

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self._tokenizer

    def row(self, questions: Sequence[Question], *, audio: bool = True) -> Row:
        """Returns one sequence about one clip.

        Several questions are packed: the prefix is segment 0, what follows it in each conversation is segment 1, 2, ...
        A sequence with a single question is all segment 0.

        Args:
            audio: False omits the placeholder, for questions about no clip.

        Raises:
            UserError: a conversation is longer than max_text_tokens, or a text contains a mark of the template.
        """
        ids = list(self.prefix) if audio else self.prefix[:-1]
        labels, segments = [IGNORE_INDEX] * len(ids), [0] * len(ids)
        for number, question in enumerate(questions, start=1):
            suffix_ids, prompt_length = self._suffix(question)
            self._check_length(len(self.prefix) + len(suffix_ids), _name_of(question))
            unlabelled = prompt_length if self._loss_on == "answer" else 1
            ids += suffix_ids
            labels += [IGNORE_INDEX] * unlabelled + suffix_ids[unlabelled:]
            segments += [number if len(questions) > 1 else 0] * len(suffix_ids)
        return Row(*(np.array(values, np.int64) for values in (ids, labels, segments)))

    def lengths(self, questions: Iterable[Question]) -> Iterator[int]:
        """Yields the number of tokens after the placeholder for each conversation, without checking it.

        Raises:
            UserError: a text contains a mark of the template.
        """
        questions = iter(questions)
        while chunk := list(islice(questions, _TOKENISED_AT_ONCE)):
            names = [_name_of(question) for question in chunk]
            suffixes = [self._suffix_texts(question) for question in chunk]
            for ids in self._encode_suffixes(suffixes, names):
                yield len(ids)

    def prompt(self, question: str) -> list[int]:
        """Returns the token ids up to where the answer begins, for generation.

        Raises:
            UserError: the prompt is longer than max_text_tokens, or the question contains a mark of the template.
        """
        ids = self.prefix + self._encode_suffixes([self._prompt_texts(question)], [repr(question)])[0]
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
            where = _name_of(question)
            texts = [self._prompt_texts(question.question), self._suffix_texts(question)]
            prompt_ids, suffix_ids = self._encode_suffixes(texts, [where, where])
            if suffix_ids[: len(prompt_ids)] != prompt_ids:
                raise UserError(where, "its answer merges with the prompt's last token", "check the chat template")
            if len(self._cache) >= _CACHED_CONVERSATIONS:
                self._cache.clear()
            self._cache[key] = suffix_ids, len(prompt_ids)
        return self._cache[key]

    def _prompt_texts(self, question: str) -> list[str]:
        """Returns the texts between placeholder and answer, the template's and the data's in turn."""
        return [AUDIO_TOKEN + self._parts.before_question, question.strip(), self._parts.after_question]

    def _suffix_texts(self, question: Question) -> list[str]:
        """Does the same as `_prompt_texts` up to the end of the answer."""
        *texts, after_question = self._prompt_texts(question.question)
        return [*texts, after_question + self._parts.before_answer, question.answer.strip(), self._parts.after_answer]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _encode_suffixes(self, suffixes: Sequence[Sequence[str]], names: Sequence[str]) -> list[list[int]]:
        """Returns the token ids after the placeholder.

        Args:
            suffixes: texts from `_prompt_texts` or `_suffix_texts`: they begin with the placeholder, since some
                tokenizers treat the beginning of a text differently.
            names: names of the conversations in an error.
        """
        for texts, name in zip(suffixes, names, strict=True):
            for mark in self._turn_marks:
                if any(mark in text for text in texts[1::2]):
                    fault = f"contains {mark!r}, which marks a turn in the language model's prompts"
                    raise UserError(name, fault, "reword the text or leave the question out")
        return [ids[1:] for ids in self._plain_text.encode_batch(suffixes, names)]

    def _check_length(self, length: int, where: str) -> None:
        if length > self._max_text_tokens:
            raise UserError(
                where,
                f"is {length} text tokens long, data.max_text_tokens is {self._max_text_tokens}",
                "raise data.max_text_tokens or leave this question out",
            )

    def _find_turn_marks(self, system_prompt: str) -> list[str]:
        """Returns the plain texts by which the template marks turns; none where control tokens mark them."""
        prefix = self._parts.prefix.removeprefix(self._tokenizer.bos_token or "").removesuffix(AUDIO_TOKEN)
        if system_prompt:
            prefix = prefix.replace(system_prompt.strip(), "")
        parts = [prefix, self._parts.before_question, self._parts.after_question, self._parts.after_answer]
        return [part.strip() for part in parts if part.strip() and not self._plain_text.has_control_token(part)]

    def _check(self) -> None:
        """Checks that the parts, tokenised one by one, give the conversation, and that labels decode to the answer."""
        example = Question(question_id="example", question="What do you hear?", answer="A dog barks.")
        suffix_ids, prompt_length = self._suffix(example)
        conversation = self._parts.prefix + "".join(self._suffix_texts(example)).removeprefix(AUDIO_TOKEN)
        if self.prefix + suffix_ids != self._encode(conversation):
            raise unusable_template(self._tokenizer, "does not tokenise part by part")
        if "".join(self.decode(suffix_ids[prompt_length:]).split()) != "".join(example.answer.split()):
            raise unusable_template(self._tokenizer, "gives labels that do not decode to the answer")


def _name_of(question: Question) -> str:
    return f"question '{question.question_id}'"


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
