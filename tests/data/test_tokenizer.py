"""Offsets, special tokens, and that a saved tokenizer is the same one."""

from __future__ import annotations

import functools
import json
import pickle

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest
import tokenizers
import transformers

from lmm_jax.data.tokenizer import Tokenizer

TEXTS = ["USER: What is naïve?\nASSISTANT: 12 ☃ cats</s>USER: b", "", " ", "</s></s>"]


@pytest.fixture(params=["characters", "phi", "llama"])
def tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


def test_special_tokens(characters, phi, llama):
    assert (characters.bos_id, characters.eos_id, characters.pad_id) == (1, 2, 0)
    assert (llama.bos_id, llama.eos_id, llama.pad_id) == (1, 2, 0)
    assert phi.bos_id == phi.eos_id == phi.pad_id == 0
    assert (characters.adds_bos, llama.adds_bos, phi.adds_bos) == (True, True, False)
    assert characters.vocab_size == 3 + 95 + 1


def test_written_special_tokens_are_one_id(tokenizer):
    ids, offsets = tokenizer.encode(f"a{tokenizer.eos}b")
    assert offsets[ids.index(tokenizer.eos_id)] == (1, 1 + len(tokenizer.eos))


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_ascend_within_the_text(tokenizer, text):
    ids, offsets = tokenizer.encode(text)
    assert len(ids) == len(offsets)
    starts = [start for start, _ in offsets]
    assert starts == sorted(starts)
    assert all(0 <= start <= end <= len(text) for start, end in offsets)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Zs"])))
def test_characters_round_trip(text):
    tokenizer = Tokenizer.load("characters")
    ids, offsets = tokenizer.encode(text)
    if "</s>" not in text and "<s>" not in text and "<unk>" not in text:
        assert tokenizer.decode(ids) == text
        assert offsets == [(i, i + 1) for i in range(len(text))]


@pytest.mark.parametrize("text", TEXTS)
def test_saved_is_the_same(tokenizer, text, tmp_path):
    tokenizer.save(tmp_path)
    for again in (Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert again.encode(text) == tokenizer.encode(text)
        for name in ("bos_id", "eos_id", "pad_id", "adds_bos", "vocab_size"):
            assert getattr(again, name) == getattr(tokenizer, name)


def test_decode_keeps_or_drops_special_tokens(tokenizer):
    ids = [*tokenizer.encode("a cat")[0], tokenizer.eos_id]
    assert tokenizer.decode(ids).strip() == "a cat"
    assert tokenizer.decode(ids, skip_special=False).endswith(tokenizer.eos)


def test_missing_files_say_what_to_do(tmp_path, phi):
    with pytest.raises(FileNotFoundError, match=r"download.*'characters'"):
        Tokenizer.load(tmp_path)
    phi.backend.save(tmp_path)
    with pytest.raises(ValueError, match="names no eos_token"):
        Tokenizer.load(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "<nowhere>"}))
    with pytest.raises(ValueError, match="<nowhere>"):
        Tokenizer.load(tmp_path)


@pytest.fixture(scope="module")
def codegen(tmp_path_factory):
    """Phi-2's kind of files: merges, and tokens added behind them."""
    folder = tmp_path_factory.mktemp("codegen")
    Tokenizer.train(TEXTS * 3, 300).save(folder)
    whole = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    last = len(whole["vocab"])
    vocab = whole["vocab"] | {"<|endoftext|>": last}
    added = {"  ": last + 1, "\t\t": last + 2, "<learnable>": last + 3, "</s>": 2}
    lines = [" ".join(m) if isinstance(m, list) else m for m in whole["merges"]]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines]))
    (folder / "added_tokens.json").write_text(json.dumps(added))
    names = dict(bos_token="<|endoftext|>", unk_token="<|endoftext|>", eos_token="</s>")
    config = dict(names, tokenizer_class="CodeGenTokenizer", add_prefix_space=False)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@settings(max_examples=40, deadline=None)
@given(st.text("ab USER:cat?12\n\t ☃", max_size=30))
def test_merges_split_as_transformers_does(codegen, text):
    theirs = _theirs(codegen)
    ours = Tokenizer.load(codegen)
    text = f"{text}<learnable> ASSISTANT:  {text}</s>"
    assert ours.encode(text)[0] == theirs(text)["input_ids"]
    assert (ours.pad, ours.eos_id) == ("<|endoftext|>", 2)


@functools.cache
def _theirs(folder):
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_merges_of_another_kind(codegen, tmp_path):
    for file in codegen.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "Qwen2Tokenizer"}'
    )
    with pytest.raises(
        ValueError, match=r"merges.txt of a Qwen2Tokenizer.*tokenizer.json"
    ):
        Tokenizer.load(tmp_path)


WORDS = [
    "a",
    "cat",
    "##s",
    "naive",
    "12",
    "##3",
    "?",
    "user",
    "User",
    "##er",
    "na",
    "##ïve",
]
PHRASES = ("a naïve Cats123? 漢 user\n12", "User [SEP] xyz ☃ cat\u0301")


def write_words(folder, lower: bool):
    """A folder of BERT's kind before `tokenizer.json`."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (folder / "vocab.txt").write_text("\n".join([*special, *WORDS]) + "\n", "utf-8")
    config = {"tokenizer_class": "BertTokenizer", "do_lower_case": lower}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_roberta(folder):
    """A folder of RoBERTa's kind before `tokenizer.json`."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("c", "a"), ("ca", "t"), ("\u0120", "cat"), ("1", "2")]
    tokens = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        *alphabet,
        *map("".join, merges),
        "<mask>",
    ]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines), "utf-8")
    config = '{"tokenizer_class": "RobertaTokenizer"}'
    (folder / "tokenizer_config.json").write_text(config)


WRITERS = {
    "bert": functools.partial(write_words, lower=True),
    "cased": functools.partial(write_words, lower=False),
    "roberta": write_roberta,
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("text", PHRASES)
def test_encoders_encode_as_transformers_does(tmp_path, kind, text):
    WRITERS[kind](tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "fast")
    named = tmp_path / "unnamed"
    named.mkdir()
    whole = (tmp_path / "fast" / "tokenizer.json").read_text("utf-8")
    (named / "tokenizer.json").write_text(whole, "utf-8")
    for folder in (tmp_path, tmp_path / "fast", named):
        ours = Tokenizer.load(folder)
        ids = [ours.bos_id, *ours.encode(text)[0], ours.eos_id]
        assert ids == theirs(text)["input_ids"]
        assert ours.pad_id == theirs.pad_token_id
        assert ours.adds_bos


def test_words_of_no_bert(tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\na\n")
    with pytest.raises(ValueError, match=r"lacks \[CLS\], \[SEP\], \[PAD\].*BERT"):
        Tokenizer.load(tmp_path)
