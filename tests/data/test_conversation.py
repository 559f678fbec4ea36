"""Rendered text, loss masks, roles and marks against strings written by hand."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

from lmm_jax.data import conversation
from lmm_jax.data.conversation import (
    TEMPLATES,
    clean,
    encode,
    end_id,
    find_template,
    prompt,
)
from lmm_jax.data.sources import BadRecord
from lmm_jax.data.tokenizer import Tokenizer
from lmm_jax.depth.roles import Role

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def turns(*said: str) -> list[dict[str, str]]:
    return [
        {"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)
    ]


def text_of(encoded, tokenizer, mask=slice(None)) -> str:
    return tokenizer.decode(encoded.tokens[mask], skip_special=False)


def supervised(encoded, tokenizer) -> list[str]:
    """The supervised text, run by run."""
    learned = np.flatnonzero(encoded.loss_mask)
    runs = np.split(learned, np.flatnonzero(np.diff(learned) > 1) + 1)
    return [text_of(encoded, tokenizer, run) for run in runs if len(run)]


# (template, turns, whole text, supervised runs), the character tokenizer.
GOLDEN = [
    (
        "vicuna_v1",
        ("What is\n<image>", "A cat.", "Sure?", "Yes"),
        f"<s>{VICUNA} USER: \nWhat is ASSISTANT: A cat.</s>"
        "USER: Sure? ASSISTANT: Yes</s>",
        [" A cat.</s>", " Yes</s>"],
    ),
    (
        "short",
        ("Hi", "", "b", "c", "d", "e"),
        "<s>USER: Hi\nASSISTANT: </s>USER: b\nASSISTANT: c</s>USER: d\nASSISTANT: e</s>",
        [" </s>", " c</s>", " e</s>"],
    ),
    ("plain", ("<image>\nDescribe.", "A dog"), "<s>A dog\n", ["A dog\n"]),
]


@pytest.mark.parametrize("name, said, whole, answers", GOLDEN)
def test_golden(name, said, whole, answers, characters):
    encoded = encode(turns(*said), find_template(name), characters)
    assert text_of(encoded, characters) == whole
    assert supervised(encoded, characters) == answers
    assert encoded.tokens.dtype == encoded.turn.dtype == encoded.marks.dtype == np.int32
    assert (encoded.role.dtype, encoded.loss_mask.dtype) == (np.int8, np.float32)


# End marks of other families, on a byte-level tokenizer without BOS.
GOLDEN_PHI = [
    (
        "bunny",
        ("<image>\nQ", "A", "R", "naïve ☃"),
        f"{VICUNA} USER: \nQ ASSISTANT: A<|endoftext|>"
        "USER: R ASSISTANT: naïve ☃<|endoftext|>",
        [" A<|endoftext|>", " naïve ☃<|endoftext|>"],
    ),
    (
        "chatml",
        ("Q", "A", "R", "B"),
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n",
        ["A<|im_end|>", "B<|im_end|>"],
    ),
    (
        "phi3_instruct",
        ("Q", "A", "R", "B"),
        "<|system|>\nYou are a helpful AI assistant.<|end|>\n"
        "<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n"
        "<|user|>\nR<|end|>\n<|assistant|>\nB<|end|>\n",
        ["A<|end|>", "B<|end|>"],
    ),
    (
        "llava_llama_3",
        ("Q", "A"),
        "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and "
        "vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language."
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
        ["A<|eot_id|>"],
    ),
    ("plain", ("<image>\nDescribe.", "A dog"), "A dog\n", ["A dog\n"]),
]


@pytest.mark.parametrize("name, said, whole, answers", GOLDEN_PHI)
def test_golden_byte_level(name, said, whole, answers, phi):
    """pad = eos = bos here: the true end tokens stay supervised, and no BOS comes."""
    encoded = encode(turns(*said), find_template(name), phi)
    assert text_of(encoded, phi) == whole
    assert supervised(encoded, phi) == answers


def test_roles_and_turns(characters):
    template = TEMPLATES["vicuna_v1"]
    encoded = encode(turns("Q", "A", "R", "B"), template, characters)
    by_role = {
        role: text_of(encoded, characters, encoded.role == role)
        for role in np.unique(encoded.role)
    }
    assert by_role == {
        Role.SYSTEM: f"<s>{VICUNA} ",
        Role.USER: "USER: ASSISTANT:USER: ASSISTANT:",
        Role.QUESTION: " Q R",
        Role.ASSISTANT: " A</s> B</s>",
    }
    second = text_of(encoded, characters, encoded.turn == 1)
    assert second == "USER: R ASSISTANT: B</s>"


def test_marks_count_tokens_before_each_image(characters):
    template = TEMPLATES["short"]
    encoded = encode(turns("<image> or <image>?", "no"), template, characters)
    assert encoded.marks.tolist() == [len("<USER: "), len("<USER:  or ")]
    assert encode(turns("<image>a", "b"), TEMPLATES["plain"], characters).marks == [1]
    assert encode(turns("a", "b"), template, characters).marks.size == 0


def test_clean():
    assert clean("What?\n<image>") == "<image>\nWhat?"
    assert clean(" a <image> b ") == "<image>\na  b"
    assert clean("<image>") == "<image>"
    assert clean("<image> <image>x") == "<image> <image>x"
    assert clean(" no image ") == " no image "


def test_prompt_is_the_start_of_the_training_text(characters, phi, llama):
    said = ("<image>\nQ", "A", "What is this?", "It is a cat")
    for tokenizer, name in (
        (characters, "vicuna_v1"),
        (phi, "bunny"),
        (llama, "short"),
    ):
        whole = encode(turns(*said), TEMPLATES[name], tokenizer)
        asked = prompt(turns(*said[:3]), TEMPLATES[name], tokenizer)
        count = len(asked.tokens)
        assert np.array_equal(asked.tokens, whole.tokens[:count])
        assert asked.role[-1] == Role.USER
        assert whole.role[count:].tolist() == [Role.ASSISTANT] * (
            len(whole.role) - count
        )
    assert text_of(asked, llama).endswith("ASSISTANT:")


def test_a_leading_answer_is_dropped(characters):
    template = TEMPLATES["short"]
    leading = [{"from": "gpt", "value": "Hello"}, *turns("Q", "A")]
    found = encode(leading, template, characters)
    assert np.array_equal(
        found.tokens, encode(turns("Q", "A"), template, characters).tokens
    )


@pytest.mark.parametrize(
    "said, reason",
    [
        ([{"from": "gpt", "value": "a"}], "alternate"),
        ([], "alternate"),
        (turns("Q"), "no answer"),
        ([*turns("Q"), *turns("R")], "alternate"),
        ([{"from": "robot", "value": "x"}, *turns("Q", "A")[1:]], "alternate"),
    ],
)
def test_malformed_turns(said, reason, characters):
    with pytest.raises(BadRecord, match=reason):
        encode(said, TEMPLATES["short"], characters)


def test_generation_stops_at_the_mark_of_the_template(characters, phi):
    chat = end_id(TEMPLATES["chatml"], phi)
    assert phi.decode([chat], skip_special=False) == "<|im_end|>"
    assert chat != phi.eos_id
    # A newline is no end of generation: captions may have lines.
    assert end_id(TEMPLATES["plain"], characters) == characters.eos_id


def test_template_must_fit_the_tokenizer(characters):
    with pytest.raises(ValueError, match=r"bunny.*13 tokens.*family"):
        conversation.check(TEMPLATES["bunny"], characters)
    with pytest.raises(ValueError, match="vicuna_v1"):
        find_template("vicuna")


def counting_rule(said, tokenizer: Tokenizer, end: str) -> np.ndarray:
    """The own mask of LLaVA and Bunny: re-tokenised prefixes and arithmetic.

    A round that is tokenised alone lacks its end mark and may have a BOS too many; the
    space before an answer is a piece of its own only while the answer is missing.
    """
    bos = [tokenizer.bos_id] if tokenizer.adds_bos else []

    def tok(text: str) -> list[int]:
        """Image-aware: a marker counts as one."""
        chunks = [tokenizer.encode(chunk)[0] for chunk in text.split("<image>")]
        joined = chunks[0]
        for chunk in chunks[1:]:
            joined = [*joined, -200, *chunk]
        return [*bos, *joined]

    whole = VICUNA + " "
    for i, text in enumerate(said):
        whole += f" ASSISTANT: {text}{end}" if i % 2 else f"USER: {text}"
    ids = tok(whole)
    mask, cur = np.zeros(len(ids)), len(bos)
    for turn in filter(None, whole.split(end)):
        before, _ = turn.split(" ASSISTANT: ")
        size = len(tok(turn)) - len(bos) + 1
        skip = len(tok(before + " ASSISTANT: ")) - len(bos) - 1
        mask[cur + skip : cur + size] = 1
        cur += size
    assert cur == len(ids)
    return mask[np.array(ids) != -200]


@pytest.mark.parametrize(
    "said",
    [
        ("<image>\nWhat is this?", "A red cat"),
        ("What is the total?", "It is 12.50 euro", "Who wrote this?", "5 cats ☃"),
        ("<image>\nWho?", "A", "What?", "the mat", "And naïve?", "12"),
    ],
)
@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [("vicuna_v1", "llama"), ("bunny", "phi"), ("bunny_llama_3", "llama_3")],
)
def test_equals_the_counting_rule(said, name, tokenizer, request):
    template, tokenizer = TEMPLATES[name], request.getfixturevalue(tokenizer)
    encoded = encode(turns(*said), template, tokenizer)
    rule = counting_rule(said, tokenizer, template.end)
    assert np.array_equal(encoded.loss_mask, rule)


def test_captions_supervise_all_but_bos_and_picture(llama, phi, llama_3):
    """LLaVA's and Bunny's `plain`: the tokens of the marker alone are ignored."""
    for tokenizer in (llama, phi, llama_3):
        said = turns("<image>\nDescribe it.", "A red cat")
        encoded = encode(said, TEMPLATES["plain"], tokenizer)
        wanted = np.ones(len(encoded.tokens))
        wanted[: int(tokenizer.adds_bos)] = 0
        np.testing.assert_array_equal(encoded.loss_mask, wanted)
        assert tokenizer.eos_id not in encoded.tokens[1:]


# No markers of any kind: those change what is text.
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=12)


@settings(max_examples=60, deadline=None)
@given(said=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), data=st.data())
def test_supervised_text_is_the_answers(said, data, phi, llama, llama_3):
    pairs = [("bunny", phi), ("chatml", phi), ("vicuna_v1", llama)]
    pairs += [("bunny_llama_3", llama_3), ("llava_llama_3", llama_3)]
    name, tokenizer = data.draw(st.sampled_from(pairs))
    template = TEMPLATES[name]
    flat = [text for pair in said for text in pair]
    encoded = encode(turns(*flat), template, tokenizer)
    ends = encoded.tokens == tokenizer.encode(template.end)[0][0]
    assert encoded.loss_mask[ends].sum() == len(said)
    found = supervised(encoded, tokenizer)
    wanted = [template.answer.format(answer) + template.end for _, answer in said]
    # SentencePiece drops the space that starts a text when it decodes.
    assert [text.lstrip(" ") for text in found] == [w.lstrip(" ") for w in wanted]


def test_preview_colours_what_is_learned(characters):
    encoded = encode(turns("<image>\nQ", "A"), TEMPLATES["short"], characters)
    shown = conversation.preview(encoded, characters)
    assert "\x1b[32m A</s>\x1b[0m" in shown
    assert "\x1b[2m<image>\x1b[0m\x1b[2m\nQ\nASSISTANT:\x1b[0m" in shown


def test_questions_are_what_the_user_asks(phi):
    """Without headers, images and what stands around those; wherever they stand."""
    said = turns("<image>\nQ one", "A", "R two", "B", "a<image>\nb<image> c", "C")
    for name in ("bunny", "qwen3_vl", "llava_llama_3"):
        encoded = encode(said, TEMPLATES[name], phi)
        asked = [
            text_of(encoded, phi, (encoded.role == Role.QUESTION) & (encoded.turn == i))
            for i in range(3)
        ]
        # A space belongs to the token of the word after it.
        space = " " if name == "bunny" else ""
        assert asked == ["Q one", f"{space}R two", f"{space}ab c"], name


@settings(max_examples=60, deadline=None)
@given(said=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3), data=st.data())
def test_queries_stand_behind_their_questions(said, data, phi, llama):
    """What comes before and after them is tokenised as texts of their own."""
    tokenizer = data.draw(st.sampled_from([phi, llama]))
    count = data.draw(st.integers(1, 3))
    image = data.draw(st.sampled_from(["", "<image>\n"]))
    flat = [text for pair in said for text in pair]
    said = turns(image + flat[0], *flat[1:])
    for found, gap in (
        (encode(said, TEMPLATES["flashsloth"], tokenizer, queries=count), " "),
        (prompt(said[:-1], TEMPLATES["flashsloth"], tokenizer, queries=count), ""),
    ):
        asks = found.role == Role.QUERY
        starts = np.flatnonzero(asks & (found.tokens == 0))
        assert found.turn[starts].tolist() == list(range(found.turn.max() + 1))
        slots = starts[:, None] + np.arange(count)
        assert np.array_equal(np.flatnonzero(asks), slots.reshape(-1))
        assert (found.tokens[slots] == np.arange(count)).all()
        assert not found.loss_mask[asks].any()
        for i, start in enumerate(starts):
            asked = (found.role == Role.QUESTION) & (found.turn == i)
            question = re.sub("^<image>\n?", "", clean(said[2 * i]["value"]))
            told = text_of(found, tokenizer, asked)
            assert told.strip(" ") == (question + gap).strip(" ")
            assert not asked.any() or np.flatnonzero(asked)[-1] == start - 1
            after = found.tokens[start + count :]
            header = tokenizer.encode(" ASSISTANT:")[0]
            assert after[: len(header)].tolist() == header


def test_queries_of_a_caption(phi):
    said = turns("<image>\nDescribe it.", "A red cat")
    plain = encode(said, TEMPLATES["plain"], phi)
    found = encode(said, TEMPLATES["plain"], phi, queries=2)
    asks = found.role == Role.QUERY
    assert np.flatnonzero(asks).tolist() == [len(asks) - 3, len(asks) - 2]
    assert np.array_equal(found.tokens[~asks], plain.tokens)
    assert np.array_equal(found.loss_mask, ~asks)
    assert not (found.role == Role.QUESTION).any()
    assert not prompt(said[:1], TEMPLATES["plain"], phi, queries=2).tokens.size


def test_preview_names_queries(phi):
    said = turns("<image>\nQ", "A")
    shown = conversation.preview(
        encode(said, TEMPLATES["flashsloth"], phi, queries=9), phi
    )
    assert "\nQ \x1b[0m\x1b[2m<9 queries>\x1b[0m\x1b[2m ASSISTANT:\x1b[0m" in shown
    assert "\x1b[32m A</s>\x1b[0m" in shown
