"""Writes the turns of a question into the texts of a chat template, and finds its answers among their tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.core.choices import choice_lines
from pipeline.core.errors import UserError
from pipeline.core.feature_contract import Question
from pipeline.data.plain_text import PlainTextTokenizer
from pipeline.data.template_parts import AUDIO_TOKEN, TemplateParts

_CACHED_SPANS = 100_000
Content = Sequence[str | int]


@dataclass(frozen=True)
class Answer:
    """An answer in a `Span`.

    Attributes:
        prompt, end: the span's texts up to where the answer begins, and up to the end of its turn.
        loss: whether the answer is trained on.
    """

    prompt: tuple[str, ...]
    end: tuple[str, ...]
    loss: bool


@dataclass
class Span:
    """A part of a conversation.

    Attributes:
        texts: texts of the template (even indices) and of the data (odd indices), in turn. The template's contain the
            placeholders.
        answers: the answers that end in this span.
    """

    texts: list[str] = field(default_factory=lambda: [""])
    answers: list[Answer] = field(default_factory=list)

    def add(self, text: str, *, data: bool) -> None:
        """Appends a text of the template or of the data."""
        if len(self.texts) % 2 == int(data):
            self.texts.append(text)
        else:
            self.texts[-1] += text


@dataclass(frozen=True)
class Conversation:
    """A question in the texts of a chat template.

    Attributes:
        prefix: up to and including the first placeholder.
        suffix: what follows; it begins with the first placeholder once more, since some tokenizers treat the beginning
            of a text differently. An answer ends it.
        clips: index of the clip at each placeholder: 0 is the clip of the question, 1, 2, ... are `Question.clips`.
            Empty if the conversation names no clip: its only placeholder, in front of the first user turn, is dropped.
    """

    prefix: Span
    suffix: Span
    clips: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One sequence before padding: three int64 arrays of equal length, in the form the model reads."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    segment_ids: NDArray[np.int64]


@dataclass(frozen=True)
class Prompt:
    """What a model reads before it writes the last answer of a question.

    Attributes:
        prefix: token ids up to and including the last placeholder.
        suffix: the other token ids.
        clips: index of the clip at each placeholder: 0 is the clip of the question, 1, 2, ... are `Question.clips`.
    """

    prefix: list[int]
    suffix: list[int]
    clips: tuple[int, ...]


class SpanTokens(NamedTuple):
    """Token ids of a span, and the start, the end and the `loss` of each of its answers."""

    ids: list[int]
    answers: list[tuple[int, int, bool]]


class SpanTokenizer:
    """Tokenises spans and remembers their tokens, since a conversation is read once an epoch."""

    def __init__(self, plain_text: PlainTextTokenizer) -> None:
        self._plain_text = plain_text
        self._tokens: dict[tuple[tuple[str, ...], tuple[Answer, ...]], SpanTokens] = {}

    def tokenise(self, span: Span, name: str, *, skip: int) -> SpanTokens:
        """Returns the tokens of a span without the first `skip` ones.

        Args:
            name: names the conversation in an error.

        Raises:
            UserError: a token spans the beginning or the end of an answer; see also `PlainTextTokenizer`.
        """
        key = (tuple(span.texts), tuple(span.answers))
        if key not in self._tokens:
            cuts = [cut for answer in span.answers for cut in (answer.prompt, answer.end)]
            *heads, ids = self._plain_text.encode_batch([*cuts, span.texts], [name] * (len(cuts) + 1))
            _refuse_merged_tokens(ids, heads, name)
            bounds = [len(head) - skip for head in heads]
            losses = [answer.loss for answer in span.answers]
            if len(self._tokens) >= _CACHED_SPANS:
                self._tokens.clear()
            answers = list(zip(bounds[::2], bounds[1::2], losses, strict=True))
            self._tokens[key] = SpanTokens(ids[skip:], answers)
        return self._tokens[key]

    def count(self, spans: Sequence[Span], names: Sequence[str]) -> Iterator[int]:
        """Yields the number of tokens of each span, without remembering them; otherwise as `tokenise`."""
        whole = [tuple(span.texts) for span in spans]
        cuts = [
            [cut for answer in span.answers for cut in (answer.prompt, answer.end) if cut != texts]
            for span, texts in zip(spans, whole, strict=True)
        ]
        batch = [text for texts, heads in zip(whole, cuts, strict=True) for text in (texts, *heads)]
        batch_names = [name for heads, name in zip(cuts, names, strict=True) for _ in range(len(heads) + 1)]
        encoded = iter(self._plain_text.encode_batch(batch, batch_names))
        for heads, name in zip(cuts, names, strict=True):
            ids = next(encoded)
            _refuse_merged_tokens(ids, [next(encoded) for _ in heads], name)
            yield len(ids)


def _refuse_merged_tokens(ids: list[int], heads: Sequence[list[int]], name: str) -> None:
    """Refuses a text whose beginnings up to an answer, and up to its end, have other tokens than the text itself."""
    if any(ids[: len(head)] != head for head in heads):
        raise UserError(name, "an answer merges with a token of the text beside it", "check the chat template")


def write_conversation(
    question: Question, parts: TemplateParts, next_turn: Callable[[], str], *, audio: bool = True
) -> Conversation:
    """Returns the texts of a question.

    An answer stays in the history as the model wrote it, with the end of its turn and whatever the template wrote in
    front of it, even if the template would write earlier turns differently: each answer is trained after the very text
    after which it is generated, and the prefix cache of one turn is valid for the next.

    Args:
        next_turn: returns the text between two exchanges, of conversations with several.
        audio: whether the conversation may name clips.

    Raises:
        UserError: the turns do not alternate, or name clips although `audio` is False.
    """
    contents = [list(content) for content in _contents(question, audio)]
    clips = tuple(part for content in contents[::2] for part in content if isinstance(part, int))
    if clips and not audio:
        fault = "names a clip, but its feature set holds no audio"
        raise UserError(f"question '{question.question_id}'", fault, "prepare the set with the encoders of the model")
    if not clips:
        contents[0] = [0, *contents[0]]
    contents[-2] = _with_choices(contents[-2], question)
    losses = [True] if question.turns is None else [turn.loss for turn in question.turns[1::2]]

    prefix = span = Span()
    for index, text in enumerate(parts.start):
        span.add(text, data=index % 2 == 1)
    for number, (content, (answer,), loss) in enumerate(zip(contents[::2], contents[1::2], losses, strict=True)):
        if number:
            span.add(next_turn(), data=False)
        stripped = _strip(content)
        leading = next((i for i, part in enumerate(stripped) if isinstance(part, str)), len(stripped))
        for part in [*stripped[:leading], None, *stripped[leading:]]:
            if part is None:
                span.add(parts.before_question, data=False)
            elif isinstance(part, str):
                span.add(part, data=True)
            else:
                span.add(AUDIO_TOKEN, data=False)
                if span is prefix:
                    span = Span([AUDIO_TOKEN])
        span.add(parts.after_question, data=False)
        prompt = tuple(span.texts)
        span.add(parts.before_answer, data=False)
        span.add(str(answer).strip(), data=True)
        span.add(parts.after_answer, data=False)
        span.answers.append(Answer(prompt, tuple(span.texts), loss))
    return Conversation(prefix, span, clips)


def _contents(question: Question, audio: bool) -> list[Content]:
    """Returns the content of each turn; the clip of a plain question is omitted where there is no audio."""
    if question.turns is None:
        return [[0, question.question] if audio else [question.question], [question.answer]]
    roles = [turn.role for turn in question.turns]
    answers = [turn.content for turn in question.turns[1::2]]
    alternate = roles == ["user", "assistant"] * (len(roles) // 2) and roles
    if not alternate or any(len(content) != 1 or not isinstance(content[0], str) for content in answers):
        fault = "has turns that do not alternate between the user and an answer of one text"
        raise UserError(f"question '{question.question_id}'", fault, "prepare the set again")
    return [turn.content for turn in question.turns]


def _with_choices(content: Content, question: Question) -> list[str | int]:
    """Returns the content of the last user turn with the lines that list the choices."""
    lines = choice_lines(question)
    if not lines:
        return list(content)
    *others, last = content
    text = last.rstrip() if isinstance(last, str) else ""
    return [*others, *([last] if isinstance(last, int) else []), f"{text}\n{lines}" if text else lines]


def _strip(content: Content) -> list[str | int]:
    """Returns the content without the white space around its text; that between two clips stays."""
    stripped: list[str | int] = []
    for part in content:
        if isinstance(part, str) and stripped and isinstance(stripped[-1], str):
            stripped[-1] += part
        else:
            stripped.append(part)
    texts = [i for i, part in enumerate(stripped) if isinstance(part, str)]
    if texts:
        first, last = texts[0], texts[-1]
        if first in (0, len(stripped) - 1) or str(stripped[first]).strip():
            stripped[first] = str(stripped[first]).lstrip()
        if last == len(stripped) - 1:
            stripped[last] = str(stripped[last]).rstrip()
    return [part for part in stripped if part != ""]


def find_turn_marks(parts: TemplateParts, bos_token: str, plain_text: PlainTextTokenizer) -> list[str]:
    """Returns the plain texts by which a template marks turns; none where control tokens mark them."""
    start = "".join(parts.start[::2]).removeprefix(bos_token)
    texts = [start, parts.before_question, parts.after_question, parts.after_answer]
    return [text.strip() for text in texts if text.strip() and not plain_text.has_control_token(text)]


def refuse_turn_marks(texts: Sequence[str], marks: Sequence[str], name: str) -> None:
    """Checks that no text of the data contains a mark of `find_turn_marks`.

    Args:
        name: names the conversation in an error.

    Raises:
        UserError: a text contains a mark.
    """
    for mark in marks:
        if any(mark in text for text in texts):
            fault = f"contains {mark!r}, which marks a turn in the language model's prompts"
            raise UserError(name, fault, "reword the text or leave the question out")
