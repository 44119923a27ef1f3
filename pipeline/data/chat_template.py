"""Renders questions about a clip into token ids and labels with the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipeline.config import DataConfig
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import Question
from pipeline.core.gguf import refuse_gguf
from pipeline.core.labels import IGNORE_INDEX
from pipeline.data.conversation import (
    Conversation,
    Prompt,
    Row,
    Span,
    SpanTokenizer,
    SpanTokens,
    find_turn_marks,
    refuse_turn_marks,
    write_conversation,
)
from pipeline.data.length_errors import too_many_text_tokens
from pipeline.data.plain_text import PlainTextTokenizer
from pipeline.data.template_parts import (
    AUDIO_TOKEN,
    MARKERS,
    TemplateParts,
    split_next_turn,
    split_template,
    unusable_template,
)

_CACHED_SYSTEM_TEXTS = 1000
_EXAMPLE = Question(question_id="example", question="What do you hear?", answer="A dog barks.")
_TOKENISED_AT_ONCE = 10_000


def load_tokenizer(language_model: str | Path) -> PreTrainedTokenizerBase:
    """Loads the language model's tokenizer, without running remote code, and adds `<audio>` as one special token.

    The token's id may lie beyond the embedding matrix, since the placeholder is never embedded.

    Args:
        language_model: a Hugging Face folder or Hub name.

    Raises:
        UserError: there is no usable tokenizer.
    """
    refuse_gguf(language_model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(language_model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fault = f"has no usable tokenizer ({str(error).splitlines()[0]})"
        raise UserError(language_model, fault, "name a Hugging Face folder or a model on the Hub") from error
    tokenizer.add_tokens([AddedToken(AUDIO_TOKEN, special=True, normalized=False)], special_tokens=True)
    return tokenizer


class ChatTemplate:
    """Renders conversations: the system text, then in turn the user's texts and clips, and the answers.

    The tokenizer's template is rendered with markers in place of the texts, which gives its fixed parts (see
    `template_parts`). A plain question is a conversation with one user turn, the clip's placeholder and the question,
    and an answer; all plain questions of a clip share the prefix up to and including `<audio>`. Labels are built from
    these parts and not from `{% generation %}` marks, which the templates of Llama and Qwen lack. A tokenizer without a
    template gets LTU's format (arXiv 2305.10790), with the audio in front:
    `### Instruction:\\n{question}\\n\\n### Response:\\n{answer}`.

    The data's texts and system texts are plain text: a control token in them, or the placeholder, is encoded as its
    characters (see `PlainTextTokenizer`). Where the template marks turns by plain text instead (`### Response:`), a
    text of the data with such a mark is an error.

    Args:
        tokenizer: a tokenizer from `load_tokenizer`.
        system_prompt: system text of questions without their own; see `split_template` for "" and None.
        max_text_tokens: a longer conversation is an error and never truncated.
        length_error: makes that error from the conversation's name, its tokens and the bound.
        loss_on: `answer` (with its end of turn), or `all_text`, which adds the user's texts and the template around
            them. Before the first audio only answers have a loss, and the first token after an audio never has one,
            because its predecessor depends on the integration.

    Attributes:
        audio_token_id: token id of the placeholder.
        pad_token_id: token id that pads rows.
        end_token_id: token id that ends an answer and stops generation.
        prefix: token ids of a plain question up to and including the placeholder.

    Raises:
        UserError: the tokenizer's template cannot be used, or the system prompt contains a marker.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        system_prompt: str | None,
        *,
        max_text_tokens: int,
        length_error: Callable[[str, int, int], UserError] = too_many_text_tokens,
        loss_on: Literal["answer", "all_text"] = "answer",
    ) -> None:
        for marker in MARKERS:
            if marker in (system_prompt or ""):
                remedy = "remove it: the pipeline places the audio, the question and the answer"
                raise UserError("data.system_prompt", f"contains {marker}", remedy)
        self._tokenizer = tokenizer
        self._max_text_tokens, self._length_error = max_text_tokens, length_error
        self._loss_on = loss_on
        self._next_turn: str | None = None
        self.audio_token_id: int = tokenizer.convert_tokens_to_ids(AUDIO_TOKEN)
        self._plain_text = PlainTextTokenizer(tokenizer)
        self._spans = SpanTokenizer(self._plain_text)
        self._parts = split_template(tokenizer, system_prompt)
        self._parts_of_system: dict[str, TemplateParts] = {}
        self._turn_marks = find_turn_marks(self._parts, tokenizer.bos_token or "", self._plain_text)
        self.end_token_id = self._tokenizer.encode(self._parts.after_answer, add_special_tokens=False)[-1]
        self.pad_token_id: int = self.end_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.prefix = self.prefix_of(_EXAMPLE)
        self._check(_EXAMPLE)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self._tokenizer

    def row(self, questions: Sequence[Question], *, audio: bool = True) -> Row:
        """Returns one sequence about one clip.

        Several questions are packed: the prefix is segment 0, what follows it in each conversation is segment 1, 2, ...
        A sequence with a single question is all segment 0.

        Args:
            questions: questions that agree in everything up to and including the first placeholder.
            audio: False omits the placeholder, for questions about no clip.

        Raises:
            UserError: a conversation is longer than max_text_tokens, contains a mark of the template, or has what the
                template cannot express.
        """
        conversations = [self._write(question, audio=audio) for question in questions]
        prefix = SpanTokens(self.prefix, [])
        if questions:
            prefix = self._tokenise_prefix(conversations[0], _name_of(questions[0]))
        ids, labels = list(prefix.ids), self._labels(prefix, only_answers=True)
        if not audio or (conversations and not conversations[0].clips):
            del ids[-1], labels[-1]
        segments = [0] * len(ids)
        for number, (conversation, question) in enumerate(zip(conversations, questions, strict=True), start=1):
            name = _name_of(question)
            if number > 1 and self._tokenise_prefix(conversation, name).ids != prefix.ids:
                raise ValueError(f"{name} has another prefix than the other questions of its row")
            tokens = self._spans.tokenise(conversation.suffix, name, skip=1)
            self._check_length(len(prefix.ids) + len(tokens.ids), name)
            ids += tokens.ids
            labels += self._labels(tokens)
            segments += [number if len(questions) > 1 else 0] * len(tokens.ids)
        return Row(*(np.array(values, np.int64) for values in (ids, labels, segments)))

    def prefix_of(self, question: Question) -> list[int]:
        """Returns the token ids up to the first placeholder; without a clip, one stands before the first user turn."""
        return self._tokenise_prefix(self._write(question), _name_of(question)).ids

    def token_counts(self, questions: Iterable[Question], *, audio: bool = True) -> Iterator[tuple[int, int]]:
        """Yields each conversation's tokens up to and including the first placeholder, and after it, without a check.

        Raises:
            UserError: see `row`.
        """
        questions = iter(questions)
        while chunk := list(islice(questions, _TOKENISED_AT_ONCE)):
            names = [_name_of(question) for question in chunk]
            conversations = [self._write(question, audio=audio) for question in chunk]
            counts = self._spans.count([conversation.suffix for conversation in conversations], names)
            for conversation, count, name in zip(conversations, counts, names, strict=True):
                yield len(self._tokenise_prefix(conversation, name).ids), count - 1

    def prompt_of(self, question: Question) -> Prompt:
        """Returns the token ids up to where the last answer begins, for generation.

        Raises:
            UserError: the prompt is longer than max_text_tokens; see also `row`.
        """
        name = _name_of(question)
        conversation = self._write(question, for_generation=True)
        prefix_ids = self._tokenise_prefix(conversation, name).ids
        ids = prefix_ids + self._spans.tokenise(conversation.suffix, name, skip=1).ids
        self._check_length(len(ids), name)
        if not conversation.clips:
            return Prompt(prefix_ids[:-1], ids[len(prefix_ids) :], ())
        end = len(ids) - ids[::-1].index(self.audio_token_id)
        return Prompt(ids[:end], ids[end:], conversation.clips)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of an answer, without special tokens and surrounding white space."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text).strip()

    def _write(self, question: Question, *, audio: bool = True, for_generation: bool = False) -> Conversation:
        """Returns the texts of a question, without its last answer if they are for generation."""
        name, parts = _name_of(question), self._parts
        if question.system is not None:
            parts = self._parts_with(question.system, name)
        conversation = write_conversation(question, parts, partial(self._between_exchanges, name), audio=audio)
        if for_generation:
            *history, last = conversation.suffix.answers
            conversation = replace(conversation, suffix=Span(list(last.prompt), history))
        for span in (conversation.prefix, conversation.suffix):
            texts = span.texts[1::2]
            if span is conversation.prefix and question.system is None:
                texts = texts[len(parts.start) // 2 :]  # the system text is the run's own
            refuse_turn_marks(texts, self._turn_marks, name)
        return conversation

    def _parts_with(self, system_text: str, name: str) -> TemplateParts:
        if system_text not in self._parts_of_system:
            if len(self._parts_of_system) >= _CACHED_SYSTEM_TEXTS:
                self._parts_of_system.clear()
            with _naming(name, "a system text"):
                self._parts_of_system[system_text] = split_template(self._tokenizer, system_text)
        return self._parts_of_system[system_text]

    def _between_exchanges(self, name: str) -> str:
        if self._next_turn is None:
            with _naming(name, "several turns"):
                self._next_turn = split_next_turn(self._tokenizer, self._parts)
        return self._next_turn

    def _tokenise_prefix(self, conversation: Conversation, name: str) -> SpanTokens:
        return self._spans.tokenise(conversation.prefix, name, skip=0)

    def _labels(self, tokens: SpanTokens, *, only_answers: bool = False) -> list[int]:
        ids = tokens.ids
        labels = [IGNORE_INDEX] * len(ids)
        if self._loss_on == "all_text" and not only_answers:
            labels[1:] = [IGNORE_INDEX if self.audio_token_id in pair else pair[1] for pair in pairwise(ids)]
        for first, last, loss in tokens.answers:
            labels[first:last] = ids[first:last] if loss else [IGNORE_INDEX] * (last - first)
        return labels

    def _check_length(self, length: int, where: str) -> None:
        if length > self._max_text_tokens:
            raise self._length_error(where, length, self._max_text_tokens)

    def _check(self, example: Question) -> None:
        """Checks that the parts, tokenised one by one, give the conversation, and that labels decode to the answer."""
        conversation = self._write(example)
        tokens = self._spans.tokenise(conversation.suffix, _name_of(example), skip=1)
        *texts, end = conversation.prefix.texts
        texts.append(end + "".join(conversation.suffix.texts).removeprefix(AUDIO_TOKEN))
        if self.prefix + tokens.ids != self._plain_text.encode(texts, _name_of(example)):
            raise unusable_template(self._tokenizer, "does not tokenise part by part")
        first, last, _ = tokens.answers[-1]
        if "".join(self.decode(tokens.ids[first:last]).split()) != "".join(example.answer.split()):
            raise unusable_template(self._tokenizer, "gives labels that do not decode to the answer")


@contextmanager
def _naming(name: str, feature: str) -> Iterator[None]:
    """Turns an error about the chat template into one that names the question with what it cannot express."""
    try:
        yield
    except UserError as error:
        fault = f"has {feature}, but {error.where}: {error.fault}"
        raise UserError(name, fault, "leave this question out or use another language model") from error


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
