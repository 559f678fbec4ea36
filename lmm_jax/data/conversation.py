"""Conversations to tokens, roles, turns and the loss mask.

The whole conversation is rendered to text, cut at `<image>`, and each chunk tokenised
on its own (LLaVA). Supervised are exactly the answers and their end marks. Which tokens
those are comes from the tokenizer's character offsets: a token belongs to the piece of
text in which it starts.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import re

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
    """

    name: str
    ask: str
    answer: str
    end: str
    system: str = ""
    after: str = ""
    caption: bool = False
    image: str = ""


_ASK = "USER: {} ASSISTANT:"
_USER, _HUMAN = _VICUNA.format("user"), _VICUNA.format("human")
_TEMPLATES = (
    Template("plain", ask="{}", answer="{}", end="\n", caption=True),
    Template("short", ask="USER: {}\nASSISTANT:", answer=" {}", end="</s>"),
    Template("vicuna_v1", _ASK, " {}", "</s>", system=_USER),
    Template("llava_v1", _ASK, " {}", "</s>", system=_HUMAN),  # LLaVA 1.0
    Template("bunny", _ASK, " {}", "<|endoftext|>", system=_USER),  # Phi, Qwen1.5
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
        tokens: int32 [N].
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
    turns: Sequence[dict[str, str]], template: Template, tokenizer: Tokenizer
) -> Encoded:
    """A conversation for training.

    Args:
        turns: `{"from": "human" | "gpt", "value": str}` in alternation; a leading
            answer is dropped.

    Raises:
        BadRecord: "malformed" turns.
    """
    said = _alternating(turns)
    if len(said) % 2:
        raise BadRecord("malformed", f"the last of {len(said)} turns has no answer")
    return _encode(said, template, tokenizer)


def prompt(
    turns: Sequence[dict[str, str]], template: Template, tokenizer: Tokenizer
) -> Encoded:
    """A conversation up to the header of the answer that the model is to give.

    Raises:
        BadRecord: "malformed" turns, or the last one is not a question.
    """
    said = _alternating(turns)
    if not len(said) % 2:
        raise BadRecord("malformed", "a prompt ends with a question, not an answer")
    return _encode(said, template, tokenizer)


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


def _encode(said: list[str], template: Template, tokenizer: Tokenizer) -> Encoded:
    # Pieces of the rendered text: (text, role, turn, supervised).
    pieces = [(template.system, Role.SYSTEM, 0, 0.0)]
    for i, text in enumerate(said):
        if i % 2:
            answer = template.answer.format(text) + template.end
            pieces.append((answer, Role.ASSISTANT, i // 2, 1.0))
            pieces.append((template.after, Role.ASSISTANT, i // 2, 0.0))
        else:
            shown = MARKER * text.count(MARKER) if template.caption else text
            if template.image:
                shown = re.sub(rf"{MARKER}\n?", template.image, shown)
            pieces.append((template.ask.format(shown), Role.USER, i // 2, 0.0))
    texts, roles, turns, supervised = zip(*pieces)
    text = "".join(texts)
    tokens, starts, marks = [], [], []
    if tokenizer.adds_bos:
        tokens, starts = [tokenizer.bos_id], [0]
    begin = 0
    for match in re.finditer(rf"{MARKER}|\Z", text):
        ids, offsets = tokenizer.encode(text[begin : match.start()])
        tokens += ids
        starts += [begin + start for start, _ in offsets]
        if match.group():
            marks.append(len(tokens))
        begin = match.end()
    ends = np.cumsum([len(piece) for piece in texts])
    # A token without width at the very end would start past the last piece.
    owner = np.searchsorted(ends, np.minimum(starts, len(text) - 1), side="right")
    # BOS counts as system text even where the template has none.
    role = np.array(roles, np.int8)[owner]
    role[: int(tokenizer.adds_bos)] = Role.SYSTEM
    loss_mask = np.array(supervised, np.float32)[owner]
    loss_mask[: int(tokenizer.adds_bos)] = 0.0
    return Encoded(
        tokens=np.array(tokens, np.int32),
        role=role,
        turn=np.array(turns, np.int32)[owner],
        loss_mask=loss_mask,
        marks=np.array(marks, np.int32),
    )


def preview(encoded: Encoded, tokenizer: Tokenizer) -> str:
    """The conversation for a terminal: supervised text green, the rest dim."""
    count = len(encoded.tokens)
    changes = np.flatnonzero(np.diff(encoded.loss_mask)) + 1
    cuts = sorted({0, *changes.tolist(), *encoded.marks.tolist(), count})
    parts = []
    for start, stop in zip(cuts, [*cuts[1:], count]):
        images = MARKER * int(np.sum(encoded.marks == start))
        text = tokenizer.decode(encoded.tokens[start:stop], skip_special=False)
        colour = 32 if start < count and encoded.loss_mask[start] else 2
        parts.append(f"\x1b[2m{images}\x1b[0m" if images else "")
        parts.append(f"\x1b[{colour}m{text}\x1b[0m" if text else "")
    return "".join(parts)
