"""Tokenises conversations in which only the chat template writes control tokens: questions and answers are plain text.

A text may spell a control token (`<|im_end|>` in code or in a forum post). The tokenizer alone would read it as the
end of a turn, wherever it stands."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from pipeline.core.errors import UserError

Conversation = Sequence[str]  # texts of the template (even indices) and texts of the data (odd indices), in turn
_EXAMPLE = "A dog barks."


class PlainTextTokenizer:
    """Encodes conversations without reading control tokens out of the data's texts.

    Control tokens are the special tokens of the tokenizer, and its other added tokens that the chat template mentions
    (`<think>`, `<tool_call>`). A conversation whose data spells none of them gets the token ids of the tokenizer
    itself. In any other, the template's control tokens are replaced by private placeholders and the text is encoded
    by a copy of the tokenizer that knows the placeholders as tokens and splits control tokens like any other text.

    Args:
        tokenizer: a tokenizer; one without a Rust backend cannot split control tokens, so their texts are refused.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        template = tokenizer.chat_template or ""
        self._control: dict[int, AddedToken] = {
            token_id: token
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if token.special or (token.content.strip() and token.content in str(template))
        }
        longest_first = sorted((token.content for token in self._control.values()), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._placeholders = {token.content: f"\ue000{token_id}\ue001" for token_id, token in self._control.items()}
        # Characters that the vocabulary lacks become the unknown token too: its text is found by its spelling.
        self._unknown: str | None = tokenizer.unk_token
        self._counted = self._control.keys() - {tokenizer.unk_token_id}
        self._template_counts: dict[tuple[str, ...], int] = {}
        self._splitting: Tokenizer | None = None
        self._control_ids: dict[int, int] = {}  # id of a placeholder in the copy -> id of its control token

    def has_control_token(self, text: str) -> bool:
        """Returns whether a text spells a control token."""
        return self._pattern.search(text) is not None

    def encode(self, conversation: Conversation, where: str) -> list[int]:
        """Returns the token ids of a conversation.

        Args:
            where: names the conversation in an error.

        Raises:
            UserError: the data's texts spell a control token that the tokenizer cannot encode as text.
        """
        return self.encode_batch([conversation], [where])[0]

    def encode_batch(self, conversations: Sequence[Conversation], where: Sequence[str]) -> list[list[int]]:
        """Does the same as `encode` with several conversations at once."""
        texts = ["".join(conversation) for conversation in conversations]
        ids_of_texts: list[list[int]] = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [
            self._encode_split(conversation, name) if self._spells_control_token(conversation, ids) else ids
            for ids, conversation, name in zip(ids_of_texts, conversations, where, strict=True)
        ]

    def _encode_as_is(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _spells_control_token(self, conversation: Conversation, ids: Sequence[int]) -> bool:
        if self._unknown and any(self._unknown in text for text in conversation[1::2]):
            return True
        return self._count(ids) != self._template_count(conversation)

    def _count(self, ids: Sequence[int]) -> int:
        return sum(token_id in self._counted for token_id in ids)

    def _template_count(self, conversation: Conversation) -> int:
        """Returns how many control tokens the template itself writes."""
        template = tuple(conversation[::2])
        if template not in self._template_counts:
            self._template_counts[template] = self._count(self._encode_as_is(_EXAMPLE.join(template)))
        return self._template_counts[template]

    def _encode_split(self, conversation: Conversation, where: str) -> list[int]:
        if self._tokenizer.is_fast:
            ids = self._split(conversation)
            # The placeholders have to change nothing but the data's texts, and no control token may be left in those.
            example = [_EXAMPLE if index % 2 else text for index, text in enumerate(conversation)]
            faithful = self._split(example) == self._encode_as_is("".join(example))
            if faithful and self._count(ids) == self._template_count(conversation):
                return ids
        spelled = next((match[0] for text in conversation[1::2] if (match := self._pattern.search(text))), "of its own")
        raise UserError(
            where,
            f"contains the control token {spelled}, which this tokenizer cannot encode as text",
            "reword the text or leave the question out",
        )

    def _split(self, conversation: Conversation) -> list[int]:
        splitting = self._splitting_tokenizer()
        splitting.encode_special_tokens = True  # pickling, as for a worker process, does not keep it
        texts = list(conversation)
        texts[::2] = [self._pattern.sub(lambda match: self._placeholders[match[0]], text) for text in texts[::2]]
        ids: list[int] = splitting.encode("".join(texts), add_special_tokens=False).ids
        return [self._control_ids.get(token_id, token_id) for token_id in ids]

    def _splitting_tokenizer(self) -> Tokenizer:
        """Returns the copy of the tokenizer, which is built on first use."""
        if self._splitting is None:
            splitting = copy.deepcopy(self._tokenizer.backend_tokenizer)
            splitting.no_truncation()
            splitting.no_padding()
            for token_id, token in self._control.items():
                flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
                # Only special tokens are split: the other control tokens become special in the copy.
                splitting.add_special_tokens([AddedToken(token.content, special=True, **flags)])
                placeholder = self._placeholders[token.content]
                splitting.add_tokens([AddedToken(placeholder, special=False, **flags)])
                self._control_ids[splitting.token_to_id(placeholder)] = token_id
            self._splitting = splitting
        return self._splitting
