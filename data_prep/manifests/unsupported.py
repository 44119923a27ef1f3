"""What records of other tools hold and a feature set cannot, for which their rows are rejected."""

from __future__ import annotations

from typing import Any


class Unsupported(Exception):
    """A row asks for something that cannot be kept; it is rejected with this text as the detail."""


# Fields of records that change what is trained, with what they hold.
_UNSUPPORTED_FIELDS = {
    "tools": "tools",
    **dict.fromkeys(("images", "image"), "images"),
    **dict.fromkeys(("videos", "video"), "videos"),
    "rejected_response": "a rejected answer",
    "rejected_messages": "a rejected conversation",
    "chosen": "a preferred answer",
    "rejected": "a rejected answer",
}
# Fields that the readers of conversations read; all others refuse them.
_CONVERSATION_FIELDS = {"system": "a system text", "history": "earlier turns"}


def refuse_fields(record: dict[str, Any], read: frozenset[str] = frozenset()) -> None:
    """Checks that a record of another tool asks for nothing that its reader does not keep.

    Args:
        read: fields out of `system` and `history` that the reader keeps.

    Raises:
        Unsupported: a field holds a system text, earlier turns, tools, other media or a rejected answer.
    """
    for field, content in {**_UNSUPPORTED_FIELDS, **_CONVERSATION_FIELDS}.items():
        if record.get(field) and field not in read:
            raise Unsupported(f"field '{field}' holds {content}")
    if record.get("label") is False:
        raise Unsupported("field 'label' marks an unwanted answer (false)")
