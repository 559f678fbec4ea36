"""Conversations to tokens, roles, turns and the loss mask.

The whole conversation is rendered to text, cut at `<image>`, and each chunk tokenised
on its own (LLaVA). Supervised are exactly the answers and their end marks. Which tokens
those are comes from the tokenizer's character offsets: a token belongs to the piece of
text in which it starts.

A model may have learned vectors, K of them, that read each question (FlashSloth). They
stand behind it, in slots that the text is cut at as it is at images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import re
from typing import NamedTuple

import numpy as np

from lmm_jax.data.sources import BadRecord
from lmm_jax.data.tokenizer import Tokenizer
from lmm_jax.depth.roles import Role

MARKER = "<image>"
HUMAN = frozenset({"human", "user"})
MODEL = frozenset({"gpt", "assistant"})

_VICUNA = (
    "A chat between a curious {0} and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the {0}'s questions. "
)
_LLAMA_3 = "<|start_header_id|>{}<|end_header_id|>\n\n"


@dataclasses.dataclass(frozen=True)
class Template:
    """The text around questions and answers.

    Attributes:
        name: how configs refer to it.
        ask: a turn of the user with the header that asks for an answer; ends without a
            space, as a generation prompt must. `{}` is the question.
        answer: the answer, `{}`, with the space that may lead it.
        end: mark after an answer, supervised with it. One token, or white space.
        system: text before the first turn.
        after: text after an end mark, not supervised.
        caption: pictures only; what the user says is dropped (LLaVA's stage 1).
        image: what stands in a turn for `<image>` and the newline after it, with
            `<image>` in it; empty for just these.
        gap: text between a question and its query slots in training. Prompts have none:
            FlashSloth was trained with a space there, and evaluated without.
    """

    name: str
    ask: str
    answer: str
    end: str
    system: str = ""
    after: str = ""
    caption: bool = False
    image: str = ""
    gap: str = ""


_ASK = "USER: {} ASSISTANT:"
_USER, _HUMAN = _VICUNA.format("user"), _VICUNA.format("human")
_TEMPLATES = (
    Template("plain", ask="{}", answer="{}", end="\n", caption=True),
    Template("short", ask="USER: {}\nASSISTANT:", answer=" {}", end="</s>"),
    Template("vicuna_v1", _ASK, " {}", "</s>", system=_USER),
    Template("llava_v1", _ASK, " {}", "</s>", system=_HUMAN),  # LLaVA 1.0
    Template("bunny", _ASK, " {}", "<|endoftext|>", system=_USER),  # Phi, Qwen1.5
    Template("flashsloth", _ASK, " {}", "</s>", system=_USER, gap=" "),
    Template("bunny_llama_3", _ASK, " {}", "<|end_of_text|>", system=_USER),
    Template(
        "llava_llama_3",
        ask=_LLAMA_3.format("user") + "{}<|eot_id|>" + _LLAMA_3.format("assistant"),
        answer="{}",
        end="<|eot_id|>",
        system=_LLAMA_3.format("system")
        + "You are a helpful language and vision assistant. You are able to understand "
        "the visual content that the user provides, and assist the user with a variety "
        "of tasks using natural language.<|eot_id|>",
    ),
    Template(
        "phi3_instruct",
        ask="<|user|>\n{}<|end|>\n<|assistant|>\n",
        answer="{}",
        end="<|end|>",
        system="<|system|>\nYou are a helpful AI assistant.<|end|>\n",
        after="\n",
    ),
    Template(
        "chatml",  # Qwen
        ask="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        answer="{}",
        end="<|im_end|>",
        system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        after="\n",
    ),
    Template(
        "qwen3_vl",
        ask="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        answer="{}",
        end="<|im_end|>",
        after="\n",
        image=f"<|vision_start|>{MARKER}<|vision_end|>",
    ),
)
TEMPLATES = {template.name: template for template in _TEMPLATES}


def find_template(name: str) -> Template:
    """The template of that name; ValueError lists the names."""
    if name not in TEMPLATES:
        raise ValueError(f"no template {name!r}; choose from {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def check(template: Template, tokenizer: Tokenizer) -> None:
    """Raise ValueError where the end mark is not one token: nothing would ever stop."""
    pieces = len(tokenizer.encode(template.end)[0])
    if pieces != 1 and not template.end.isspace():
        raise ValueError(
            f"template {template.name!r} ends answers with {template.end!r}, which "
            f"this tokenizer splits into {pieces} tokens; choose the template of the "
            "model's family"
        )


def end_id(template: Template, tokenizer: Tokenizer) -> int:
    """The token that ends an answer: the template's mark (a chat model's need not be its
    tokenizer's end of sequence), or that one where the mark is white space."""
    pieces = tokenizer.encode(template.end)[0]
    whole = len(pieces) == 1 and not template.end.isspace()
    return pieces[0] if whole else tokenizer.eos_id


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A tokenised conversation of N tokens, without the tokens of its images.

    Attributes:
        tokens: int32 [N]; 0..K-1 where query slots are.
        role: int8 [N], `Role`; the header before an answer is USER.
        turn: int32 [N], the pair of question and answer, from 0; the system text is 0.
        loss_mask: float32 [N], 1.0 on answers and end marks.
        marks: int32 [K], for each image the number of tokens before it.
    """

    tokens: np.ndarray
    role: np.ndarray
    turn: np.ndarray
    loss_mask: np.ndarray
    marks: np.ndarray


def encode(
    turns: Sequence[dict[str, str]],
    template: Template,
    tokenizer: Tokenizer,
    *,
    queries: int = 0,
) -> Encoded:
    """A conversation for training.

    Args:
        turns: `{"from": "human" | "gpt", "value": str}` in alternation; a leading
            answer is dropped.
        queries: K, query slots of each question; a caption's stand before its end.

    Raises:
        BadRecord: "malformed" turns.
    """
    said = _alternating(turns)
    if len(said) % 2:
        raise BadRecord("malformed", f"the last of {len(said)} turns has no answer")
    return _encode(said, template, tokenizer, queries)


def prompt(
    turns: Sequence[dict[str, str]],
    template: Template,
    tokenizer: Tokenizer,
    *,
    queries: int = 0,
) -> Encoded:
    """A conversation up to the header of the answer that the model is to give.

    Args:
        turns, queries: see `encode`.

    Raises:
        BadRecord: "malformed" turns, or the last one is not a question.
    """
    said = _alternating(turns)
    if not len(said) % 2:
        raise BadRecord("malformed", "a prompt ends with a question, not an answer")
    asked = dataclasses.replace(template, gap="")
    return _encode(said, asked, tokenizer, queries)


def _alternating(turns: Sequence[dict[str, str]]) -> list[str]:
    """Cleaned texts: question, answer, question, ..."""
    skip = 1 if turns and turns[0]["from"] in MODEL else 0
    speakers = [turn["from"] for turn in turns[skip:]]
    humans, models = set(speakers[::2]), set(speakers[1::2])
    if not humans or humans - HUMAN or models - MODEL:
        raise BadRecord("malformed", f"human and gpt must alternate: {speakers}")
    return [clean(turn["value"]) for turn in turns[skip:]]


def clean(text: str) -> str:
    """The marker first in its turn, then a newline, then the rest stripped.

    A turn with several markers keeps their places: they are part of the sentence.
    """
    if text.count(MARKER) != 1:
        return text
    return f"{MARKER}\n{text.replace(MARKER, '').strip()}".strip()


class _Piece(NamedTuple):
    """A part of the rendered text. That of QUERY is a character for each slot."""

    text: str
    role: Role
    turn: int = 0
    supervised: float = 0.0


def _encode(
    said: list[str], template: Template, tokenizer: Tokenizer, queries: int
) -> Encoded:
    pieces = [_Piece(template.system, Role.SYSTEM)]
    for i, text in enumerate(said):
        render = _answered if i % 2 else _asked
        pieces += render(text, template, i // 2, " " * queries)
    text = "".join(piece.text for piece in pieces)
    ends = np.cumsum([len(piece.text) for piece in pieces])
    # BOS starts in the system text, even where the template has none.
    tokens, starts = ([tokenizer.bos_id], [-1]) if tokenizer.adds_bos else ([], [])
    marks, begin = [], 0
    for start, stop in _holes(text, pieces, ends):
        ids, offsets = tokenizer.encode(text[begin:start])
        tokens += ids
        # A lone space may come without width, so start where the next piece does.
        starts += [min(begin + first, start - 1) for first, _ in offsets]
        if text[start:stop] == MARKER:
            marks.append(len(tokens))
        else:
            tokens += range(stop - start)
            starts += range(start, stop)
        begin = stop
    owner = np.searchsorted(ends, starts, side="right")
    _, roles, turns, supervised = zip(*pieces)
    return Encoded(
        tokens=np.array(tokens, np.int32),
        role=np.array(roles, np.int8)[owner],
        turn=np.array(turns, np.int32)[owner],
        loss_mask=np.array(supervised, np.float32)[owner],
        marks=np.array(marks, np.int32),
    )


def _asked(text: str, template: Template, turn: int, slots: str) -> Iterator[_Piece]:
    """A turn of the user."""
    if template.caption:
        shown = (template.image or MARKER) * text.count(MARKER)
        yield _Piece(template.ask.format(shown), Role.USER, turn)
        return
    before, after = template.ask.split("{}")
    parts = re.split(rf"({MARKER}\n?)", text)
    if parts[0] and before.endswith(" "):  # it leads a word and belongs to its token
        before, parts[0] = before[:-1], " " + parts[0]
    yield _Piece(before, Role.USER, turn)
    for i, part in enumerate(parts):
        if i % 2:
            yield _Piece(template.image or part, Role.USER, turn)
        else:
            yield _Piece(part, Role.QUESTION, turn)
    if slots:
        yield _Piece(template.gap, Role.QUESTION, turn)
        yield _Piece(slots, Role.QUERY, turn)
    yield _Piece(after, Role.USER, turn)


def _answered(text: str, template: Template, turn: int, slots: str) -> Iterator[_Piece]:
    """An answer, or a caption with the slots that no question has had."""
    said = template.answer.format(text)
    if template.caption and slots:
        yield _Piece(said, Role.ASSISTANT, turn, 1.0)
        yield _Piece(slots, Role.QUERY, turn)
        said = ""
    yield _Piece(said + template.end, Role.ASSISTANT, turn, 1.0)
    yield _Piece(template.after, Role.ASSISTANT, turn)


def _holes(
    text: str, pieces: Sequence[_Piece], ends: np.ndarray
) -> list[tuple[int, int]]:
    """Where images and query slots interrupt the text, and its end."""
    images = [match.span() for match in re.finditer(MARKER, text)]
    slots = [
        (int(end) - len(piece.text), int(end))
        for piece, end in zip(pieces, ends)
        if piece.role == Role.QUERY
    ]
    return sorted([*images, *slots, (len(text), len(text))])


def preview(encoded: Encoded, tokenizer: Tokenizer) -> str:
    """The conversation for a terminal: supervised text green, the rest dim."""
    count, asks = len(encoded.tokens), encoded.role == Role.QUERY
    changes = np.flatnonzero(np.diff(encoded.loss_mask + 2 * asks)) + 1
    cuts = sorted({0, *changes.tolist(), *encoded.marks.tolist(), count})
    parts = []
    for start, stop in zip(cuts, [*cuts[1:], count]):
        images = MARKER * int(np.sum(encoded.marks == start))
        text = tokenizer.decode(encoded.tokens[start:stop], skip_special=False)
        if asks[start:stop].any():
            text = f"<{stop - start} queries>"
        colour = 32 if start < count and encoded.loss_mask[start] else 2
        parts.append(f"\x1b[2m{images}\x1b[0m" if images else "")
        parts.append(f"\x1b[{colour}m{text}\x1b[0m" if text else "")
    return "".join(parts)
