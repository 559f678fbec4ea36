"""FlashSloth's conversations against the reference: what stands where, and what is asked.

Where ours differ: every turn has the span of its own question, which starts with its first
word also where no image stands before it; the word ASSISTANT in a question brings no
second group of queries; and a caption, which nobody asked for, has no span at all.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from lmm_jax.data import conversation
from lmm_jax.data.conversation import MARKER, TEMPLATES, Encoded
from lmm_jax.data.placement import Slots, place
from lmm_jax.data.tokenizer import FastBackend, Tokenizer
from lmm_jax.depth import Role
from tests.golden import reference

QUERIES = 9
SPANS = {  # of ours, where they differ
    "infer_three_turns": [[[114, 118], [138, 145], [166, 172]]],
    "train_text_only": [[[31, 39]]],
    "train_mixed_batch": [[[114, 120], [139, 145]], [[31, 36]], [[114, 120]]],
}
PREFIX = """32 8537 1022 257 11040 2836 290 281 11666 4430 8796 13 383 8796 3607 7613 11
    6496 11 290 23507 7429 284 262 2836 338 2683 13 1294 1137 25"""
HEADER = "24994 8808 8643 25"  # " ASSISTANT:"


@functools.cache
def fixture():
    return reference.load("flashsloth/tokens_placement")


@functools.cache
def phi_2() -> Tokenizer:
    """The tokens of Phi-2's vocabulary in which these texts are written."""
    file = Path(__file__).parent / "flashsloth" / "pieces.json"
    pieces = json.loads(file.read_text("utf-8"))
    end = "<|endoftext|>"
    # The longest piece first: for these words the same as its merges, as the ids show.
    options = dict(unk_token=end, continuing_subword_prefix="")
    model = tokenizers.models.WordPiece(pieces, **options)
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([end, "</s>"])
    return Tokenizer(FastBackend(made), None, "</s>", end, False)


def turns(said, *, image: bool) -> list[dict[str, str]]:
    first, *others = said
    if image and MARKER not in first:
        first = f"{MARKER}\n{first}"
    return [
        {"from": ("human", "gpt")[i % 2], "value": text}
        for i, text in enumerate([first, *others])
    ]


def caption(text: str) -> list[dict[str, str]]:
    return turns(["", text], image=True)


def placed(encoded: Encoded, visual: int) -> dict[str, np.ndarray]:
    return place(encoded, Slots(0, 128, 1, visual), len(encoded.marks), pad_id=50256)


def expanded(found: dict[str, np.ndarray], visual: int) -> np.ndarray:
    """What stands at each position, in the code of the fixture."""
    tokens = np.where(
        found["role"] == Role.QUERY, -3000 - found["tokens"], found["tokens"]
    )
    order = np.concatenate([found["positions"], found["visual_positions"]])
    real = np.concatenate([found["valid"], found["visual_valid"]])
    source = np.concatenate([tokens, -1000 - np.arange(visual)])
    line = np.full(real.sum(), -9999)
    line[order[real]] = source[real]
    return line


def groups(found: dict[str, np.ndarray]) -> list[int]:
    """Where each group of queries begins."""
    starts = (found["role"] == Role.QUERY) & (found["tokens"] == 0)
    return found["positions"][starts].tolist()


def spans(found: dict[str, np.ndarray]) -> list[list[int]]:
    """First and last position of each turn's question, as [start, end)."""
    asked = found["role"] == Role.QUESTION
    found_spans = []
    for turn in np.unique(found["turn"][asked]):
        at = found["positions"][asked & (found["turn"] == turn)]
        assert np.array_equal(at, np.arange(at[0], at[-1] + 1))
        found_spans.append([int(at[0]), int(at[-1]) + 1])
    return found_spans


def labels(found: dict[str, np.ndarray], visual: int) -> np.ndarray:
    """Token to learn at each position, -100 elsewhere."""
    line = np.full(len(expanded(found, visual)), -100)
    learned = found["loss_mask"] > 0
    line[found["positions"][learned]] = found["tokens"][learned]
    return line


def rows() -> list:
    """(example, row) of all conversations that ours and theirs write alike."""
    f, listed = fixture(), []
    for name in f.meta["config"]["examples"]:
        if name != "train_word_assistant":
            count = len(f[f"in/{name}/input_ids"])
            listed += [(name, row) for row in range(min(count, 4))]
    return listed


def sample(name: str, row: int) -> dict[str, np.ndarray]:
    """A conversation of the fixture, in our slots."""
    f = fixture()
    about = f.meta["config"]["examples"][name]
    said = about["turns"] if about["batch"] == 1 else about["turns"][row]
    if name.startswith("plain"):
        encode, said, template = conversation.encode, caption(said), TEMPLATES["plain"]
    else:
        template = TEMPLATES["flashsloth"]
        infers = name.startswith("infer")
        encode = conversation.prompt if infers else conversation.encode
        said = turns(said, image=f[f"out/{name}/has_image"][row])
    encoded = encode(said, template, phi_2(), queries=QUERIES)
    return placed(encoded, about["visual_tokens"])


@pytest.mark.parametrize(("name", "row"), rows())
def test_what_stands_where(name, row):
    f, found = fixture(), sample(name, row)
    visual = f.meta["config"]["examples"][name]["visual_tokens"]
    real = f[f"out/{name}/attention_mask"][row] > 0
    line = expanded(found, visual)
    np.testing.assert_array_equal(line, f[f"out/{name}/source"][row][real])
    starts = f[f"out/{name}/group_starts"][row]
    assert groups(found) == starts[starts >= 0].tolist()
    theirs = f[f"out/{name}/question_spans"][row][starts >= 0].tolist()
    if name.startswith("plain"):
        theirs = []
    assert spans(found) == SPANS.get(name, {row: theirs})[row]
    if f"out/{name}/labels" in f.arrays:
        expected = f[f"out/{name}/labels"][row][real]
        np.testing.assert_array_equal(labels(found, visual), expected)


def test_a_question_about_the_assistant_has_one_group():
    found = sample("train_word_assistant", 0)
    assert groups(found) == [
        fixture()["out/train_word_assistant/group_starts"][0, 1] - 10
    ]
    ((_, end),) = spans(found)
    assert [end] == groups(found)


# The example of the specification: ids by hand.
TWO_TURNS = f"""{PREFIX} 220
    198 2061 318 3402 30 220 {HEADER} 317 3797 13 50296
    29904 25 9022 3124 30 220 {HEADER} 2619 13 50296"""
TEXT_ONLY = f"{PREFIX} 6530 257 3124 13 220 {HEADER} 2297 13 50296"
COLOURS = ("What is shown?", "A cat.", "Which color?", "Black.")
CASES = {
    "low": (COLOURS, True, 81, 158, [119, 142], [[114, 119], [138, 142]]),
    "high": (COLOURS, True, 405, 482, [443, 466], [[438, 443], [462, 466]]),
    "text": (("Name a color.", "Red."), False, 81, 52, [36], [[31, 36]]),
}


@pytest.mark.parametrize("case", CASES)
def test_worked_example(case):
    said, image, visual, length, starts, questions = CASES[case]
    template = TEMPLATES["flashsloth"]
    encoded = conversation.encode(
        turns(said, image=image), template, phi_2(), queries=QUERIES
    )
    ids = [int(i) for i in (TWO_TURNS if image else TEXT_ONLY).split()]
    assert encoded.tokens[encoded.role != Role.QUERY].tolist() == ids
    found = placed(encoded, visual)
    line = expanded(found, visual)
    assert (len(line), groups(found), spans(found)) == (length, starts, questions)
    learned = np.flatnonzero(labels(found, visual) >= 0)
    if case == "low":
        assert learned.tolist() == [*range(132, 136), *range(155, 158)]
    if image:
        assert line[: 32 + visual].tolist()[32:] == [-1000 - k for k in range(visual)]


def test_worked_example_of_a_caption():
    said = caption("a black cat on a mat")
    encoded = conversation.encode(said, TEMPLATES["plain"], phi_2(), queries=QUERIES)
    found = placed(encoded, 81)
    ids = [64, 2042, 3797, 319, 257, 2603]
    slots = [-3000 - k for k in range(QUERIES)]
    assert expanded(found, 81).tolist()[81:] == [*ids, *slots, 198]
    assert labels(found, 81).tolist()[81:] == [*ids, *[-100] * QUERIES, 198]
    assert groups(found) == [87]
