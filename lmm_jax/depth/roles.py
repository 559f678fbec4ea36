"""Who wrote a token. Stored as int8 in batches and in `TokenState.role`."""

from __future__ import annotations

import enum


class Role(enum.IntEnum):
    """What a token is, for masks, losses and text-informed reductions.

    A QUESTION is what the user asks, USER the text around it. ASSISTANT covers the
    answers and their end marks; the header that asks for an answer ("ASSISTANT:") is
    USER, so the last token that is not ASSISTANT is the one that has read the whole
    question. A QUERY stands after its question; its `tokens` say which of them it is.
    """

    SYSTEM = 0
    USER = 1
    ASSISTANT = 2
    VISUAL = 3
    QUERY = 4
    QUESTION = 5
