"""Tiny data sets and tokenizers, built on the spot."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import numpy as np
from PIL import Image
import pytest
import sentencepiece
import tokenizers

from lmm_jax.data import conversation
from lmm_jax.data.images import ImageSpec
from lmm_jax.data.placement import SampleSpec, Slots
from lmm_jax.data.tokenizer import Tokenizer

CORPUS = [
    "A chat between a curious user and an artificial intelligence assistant.",
    "USER: What is the total? ASSISTANT: It is 12.50 euro, naïve café.",
    "USER: Who wrote this? ASSISTANT: A red cat on a mat wrote it.",
] * 4


@pytest.fixture(scope="session")
def golden():
    """Reader of reference arrays: golden("deepstack/preprocess")."""
    here = Path(__file__).parents[1] / "golden"
    folder = Path(os.environ.get("LMM_JAX_GOLDEN_DIR", here))

    def read(name: str) -> dict:
        with np.load(folder / f"{name}.npz", allow_pickle=False) as arrays:
            found = dict(arrays)
        return {**found, "meta": json.loads(str(found["meta"]))}

    return read


@pytest.fixture(scope="session")
def characters() -> Tokenizer:
    return Tokenizer.load("characters")


@pytest.fixture(scope="session")
def phi(tmp_path_factory) -> Tokenizer:
    """Byte-level BPE without BOS, one token for bos, eos and unk: like Phi-2's."""
    post = tokenizers.processors.ByteLevel(trim_offsets=True)
    end = {"content": "<|endoftext|>", "lstrip": False}
    names = {"bos_token": end, "eos_token": end, "unk_token": "<|endoftext|>"}
    return byte_level(tmp_path_factory.mktemp("phi"), post, names)


@pytest.fixture(scope="session")
def llama_3(tmp_path_factory) -> Tokenizer:
    """Byte-level BPE with BOS and no unk: like Llama-3's."""
    begin = "<|begin_of_text|>"
    post = tokenizers.processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, MARKS.index(begin))]
    )
    names = {"bos_token": begin, "eos_token": "<|end_of_text|>"}
    return byte_level(tmp_path_factory.mktemp("llama_3"), post, names)


MARKS = ["<|endoftext|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>"]
MARKS += ["<|start_header_id|>", "<|end_header_id|>", "</s>"]
MARKS += ["<|begin_of_text|>", "<|end_of_text|>", "<|end|>"]


def byte_level(folder: Path, post, names: dict) -> Tokenizer:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.post_processor = post
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=MARKS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(CORPUS, trainer)
    model.save(str(folder / "tokenizer.json"))
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    return Tokenizer.load(folder)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Tokenizer:
    """SentencePiece BPE with BOS, byte fallback and a dummy prefix: like Vicuna's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return Tokenizer.load(folder)


@pytest.fixture
def spec(characters) -> SampleSpec:
    return SampleSpec(
        image=ImageSpec(8, mode="stretch", crops=4),
        slots=Slots(prefix=16, suffix=80, images=1, tokens_per_image=4),
        template=conversation.find_template("short"),
        tokenizer=characters,
    )


def row(index: int, question: str = "<image>\nWhat?") -> dict:
    """A good LLaVA record that answers with its own number."""
    turns = [{"from": "human", "value": question}]
    turns.append({"from": "gpt", "value": f"number {index}"})
    return {"id": f"r{index}", "image": f"{index}.png", "conversations": turns}


@pytest.fixture
def dataset(tmp_path):
    """write(rows, name) -> path; images 0.png ... 15.png lie beside the files."""
    rng = np.random.default_rng(0)
    for index in range(16):
        pixels = rng.integers(0, 256, (10 + index, 20, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")

    def write(rows: list, name: str = "train.json") -> Path:
        path = tmp_path / name
        lines = [json.dumps(r, ensure_ascii=False) for r in rows]
        is_lines = name.endswith(".jsonl")
        path.write_text("\n".join(lines) if is_lines else f"[{', '.join(lines)}]")
        return path

    return write
