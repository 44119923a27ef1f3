"""Questions that are asked one after another about the same clips, each alone or as the next turn of a conversation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from pipeline.core.errors import UserError
from pipeline.core.feature_contract import Question, Turn
from pipeline.core.streams import IntegrationKind
from pipeline.data.template_parts import AUDIO_TOKEN
from pipeline.inference.responder import Answer, Features, Responder
from pipeline.model import PrefixCache


class Dialogue:
    """Answers questions about some clips, whose audio is prefilled once.

    Args:
        clips: features of each clip. With several, a question names each by `<audio>`, in their order; the clips stand
            in front of a question that names none. With one, `<audio>` in a question is plain text.
        hidden: integrations whose audio tokens are masked from the language model.
        keeps_history: whether each question follows the ones before and their answers, as they were generated. The
            clips are then part of the first question.

    Attributes:
        questions: the questions so far, with their turns and answers.
    """

    def __init__(
        self,
        responder: Responder,
        clips: Sequence[Features],
        hidden: Collection[IntegrationKind] = (),
        *,
        keeps_history: bool = False,
    ) -> None:
        self._responder, self._clips, self._hidden, self._keeps_history = responder, clips, hidden, keeps_history
        self._history: list[Turn] = []
        self._prefix: tuple[tuple[list[int], tuple[int, ...]], PrefixCache] | None = None
        self.questions: list[Question] = []

    def prefill(self, text: str) -> PrefixCache:
        """Prefills the clips as the next question needs them; the cache serves all questions that begin alike.

        Raises:
            UserError: see `ask`.
        """
        return self._prefill(self._next_question(text))

    def ask(self, text: str, write: Callable[[str], None]) -> Answer:
        """Answers a question; calls `write` with each new piece of the answer.

        Raises:
            UserError: the question names another number of clips, or is too long with its history.
        """
        question = self._next_question(text)
        prefix = self._prefill(question)
        answer = self._responder.answer_streaming(prefix, question, write)
        answered = question.model_copy(update={"answer": answer.answer})
        if question.turns is not None:
            reply = Turn(role="assistant", content=[answer.answer])
            answered = answered.model_copy(update={"turns": [*question.turns[:-1], reply]})
        self.questions.append(answered)
        if self._keeps_history:
            self._history = answered.conversation
        return answer

    def _prefill(self, question: Question) -> PrefixCache:
        prompt = self._responder.prompt_of(question)
        key = prompt.prefix, prompt.clips
        if self._prefix is None or self._prefix[0] != key:
            self._prefix = None  # frees its memory first
            cache = self._responder.prefill_prompts([prompt.prefix], self._clips, prompt.clips, self._hidden)
            self._prefix = key, cache
        return self._prefix[1]

    def _next_question(self, text: str) -> Question:
        content: list[str | int] = [text] if self._history else self._place_clips(text)
        if self._history and len(self._clips) > 1 and AUDIO_TOKEN in text:
            raise UserError("QUESTION", f"names {AUDIO_TOKEN} in a later turn", "name the clips in the first question")
        user, reply = Turn(role="user", content=content), Turn(role="assistant", content=[""])
        turns = [*self._history, user, reply] if len(self._clips) > 1 or self._history else None
        others = [f"clip {number}" for number in range(2, len(self._clips) + 1)] or None
        return Question(question_id=text, question=text, answer="", turns=turns, clips=others)

    def _place_clips(self, text: str) -> list[str | int]:
        """Returns the content of a turn with all clips: in place of `<audio>`, or else in front of the text."""
        count, parts = len(self._clips), text.split(AUDIO_TOKEN)
        if count == 1 or len(parts) == 1:
            return [*range(count), text]
        if len(parts) != count + 1:
            fault = f"names {len(parts) - 1} clips by {AUDIO_TOKEN}, but there are {count}"
            raise UserError("QUESTION", fault, f"write {AUDIO_TOKEN} {count} times, or not at all")
        content: list[str | int] = [parts[0]]
        for number, part in enumerate(parts[1:]):
            content += [number, part]
        return [part for part in content if part != ""]
