"""A conversation in the terminal, or through a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses
import sys
from typing import TextIO

from lmm_jax.answer import Answerer
from lmm_jax.data.conversation import MARKER
from lmm_jax.data.sources import BadRecord, Record

HELP = "/image FILE shows an image, /reset starts anew, /quit ends."


@dataclasses.dataclass
class Chat:
    """What was shown and said so far.

    Attributes:
        shown: image files that no question has gone with yet.
    """

    answerer: Answerer
    shown: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    turns: tuple[dict[str, str], ...] = ()

    def ask(self, text: str, show: Callable[[Iterable[str]], str]) -> None:
        """Answers, and remembers it.

        Raises:
            BadRecord: it cannot be asked; nothing is remembered.
        """
        marked = f"{MARKER}\n" * len(self.shown) + text.replace(MARKER, "")
        turns = (*self.turns, {"from": "human", "value": marked})
        images = (*self.images, *self.shown)
        record = Record("chat", images, turns)
        said = show(self.answerer.stream(record, number=len(turns)))
        self.turns = (*turns, {"from": "gpt", "value": said})
        self.images, self.shown = images, ()


def converse(
    answerer: Answerer,
    images: tuple[str, ...],
    lines: TextIO,
    show: Callable[[Iterable[str]], str],
) -> None:
    """Answers line after line until they end or one says /quit.

    Args:
        images: files that go with the first question, also after a /reset.
        lines: what the user types.
        show: prints the pieces of an answer and returns them as one.
    """
    chat, typed = Chat(answerer, images), lines.isatty()
    if typed:
        print(HELP)
    while True:
        if typed:
            print("> ", end="", flush=True)
        line = lines.readline()
        word, _, rest = line.strip().partition(" ")
        if not line or word == "/quit":
            return
        if word == "/reset":
            chat = Chat(answerer, images)
        elif word == "/image" and rest.strip():
            chat.shown = (*chat.shown, rest.strip())
        elif word.startswith("/"):
            print(HELP, file=sys.stderr)
        elif word:
            try:
                chat.ask(line.strip(), show)
            except BadRecord as error:
                print(f"{error}; /reset starts anew.", file=sys.stderr)
                chat.shown = ()
