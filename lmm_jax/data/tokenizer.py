"""Text to token ids with character offsets, over `tokenizers` or `sentencepiece`."""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import json
from pathlib import Path
import re
from typing import Protocol

import tokenizers

CHARACTERS = "characters"
VOCAB, MERGES, ADDED = "vocab.json", "merges.txt", "added_tokens.json"
WORDS = "vocab.txt"
# What splits text as GPT-2 does, and its special tokens, the first two around a text; the
# files of others lack their own rule.
GPT_2: dict[str, tuple[str, ...]] = {
    "GPT2Tokenizer": (),
    "CodeGenTokenizer": (),
    "RobertaTokenizer": ("<s>", "</s>", "<pad>", "<unk>"),
}
BERT = ("[CLS]", "[SEP]", "[PAD]", "[UNK]")
PADS = ("[PAD]", "<pad>")
Offsets = list[tuple[int, int]]


class Backend(Protocol):
    """What a tokenizer library must give."""

    def encode(self, text: str) -> tuple[list[int], Offsets]: ...
    def decode(self, ids: list[int], skip_special: bool) -> str: ...
    def id(self, token: str) -> int | None: ...
    def size(self) -> int: ...
    def extended(self, tokens: list[str]) -> Backend: ...
    def save(self, folder: Path) -> None: ...


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A vocabulary and its special tokens.

    Attributes:
        bos, eos, pad: texts of the special tokens; bos may be None. Those of an encoder
            stand before and after a text ([CLS] and [SEP]).
        adds_bos: whether a sequence starts with bos.
    """

    backend: Backend
    bos: str | None
    eos: str
    pad: str
    adds_bos: bool

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """A folder or file with `tokenizer.json` or `tokenizer.model`, or a folder with
        the `vocab.json` and `merges.txt` of GPT-2's kind or the `vocab.txt` of BERT.

        "characters" builds a vocabulary of printable ASCII, for tests and toys.

        Raises:
            FileNotFoundError: no such file is there.
            ValueError: no end-of-sequence token is named, merges of an unknown kind, or
                words without BERT's special tokens.
        """
        if str(path) == CHARACTERS:
            return cls(FastBackend(_characters()), "<s>", "</s>", "<unk>", True)
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        names = ("tokenizer.json", "tokenizer.model", *_READ)
        files = [folder / name for name in names]
        file = next(filter(Path.is_file, [Path(path), *files]), None)
        if file is None:
            raise FileNotFoundError(
                f"no {', '.join(names)} in {path}; download the model's folder, or use "
                f"{CHARACTERS!r}"
            )
        names = _special_names(folder)
        backend: Backend
        if file.suffix == ".model":
            backend = SentencePieceBackend(file.read_bytes())
            names = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", **names}
            adds_bos = True
        else:
            read = _READ.get(file.name, tokenizers.Tokenizer.from_file)
            backend = FastBackend(read(str(file)))
            names = backend.marks() | names
            adds_bos = backend.around()[:1] == [names.get("bos")]
        if "eos" not in names:
            raise ValueError(
                f"{folder} names no eos_token; put tokenizer_config.json or "
                "special_tokens_map.json beside the tokenizer"
            )
        # The rule of LLaVA and Bunny: pad with unk where it exists, else with eos.
        pad = names.get("pad") or names.get("unk") or names["eos"]
        adds_bos = names.get("add_bos", adds_bos)
        return cls(backend, names.get("bos"), names["eos"], pad, adds_bos)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A byte-level BPE of the given texts, with every digit a token of its own.

        Any text can be encoded; what the texts repeat becomes short.
        """
        return cls(
            FastBackend(_trained(texts, vocab_size)), "<s>", "</s>", "<unk>", True
        )

    def __post_init__(self):
        for token in filter(None, (self.bos, self.eos, self.pad)):
            if self.backend.id(token) is None:
                raise ValueError(
                    f"special token {token!r} is not in the vocabulary; correct "
                    "tokenizer_config.json"
                )

    @property
    def bos_id(self) -> int | None:
        return self.backend.id(self.bos) if self.bos else None

    @property
    def eos_id(self) -> int:
        return self.backend.id(self.eos)

    @property
    def pad_id(self) -> int:
        return self.backend.id(self.pad)

    @property
    def vocab_size(self) -> int:
        """The highest id plus one, added tokens included."""
        return self.backend.size()

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        """Ids and, for each, the (start, end) characters of `text` it stands for.

        No special tokens are added; those written out in `text` become one id each.
        """
        return self.backend.encode(text)

    def decode(self, ids, *, skip_special: bool = True) -> str:
        """The text of a sequence of ids."""
        return self.backend.decode([int(i) for i in ids], skip_special)

    def extended(self, token: str) -> tuple[Tokenizer, int]:
        """This tokenizer with one more special token, and the id of that one.

        A token that it has keeps its id. A `tokenizer.model` cannot be extended; there
        the id is the next one, as `transformers` counts tokens beside such a file.
        """
        larger = dataclasses.replace(self, backend=self.backend.extended([token]))
        found = larger.backend.id(token)
        return larger, self.vocab_size if found is None else found

    def save(self, folder: str | Path) -> None:
        """Write files from which `load(folder)` gives this tokenizer again."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(folder)
        config = {
            "bos_token": self.bos,
            "eos_token": self.eos,
            "pad_token": self.pad,
            "add_bos_token": self.adds_bos,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


class FastBackend:
    """`tokenizers`: any `tokenizer.json`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        tokenizer.no_truncation()  # files carry these settings; placement decides
        tokenizer.no_padding()
        self._tokenizer = tokenizer

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: list[int], skip_special: bool) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    def id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def size(self) -> int:
        return 1 + max(self._tokenizer.get_vocab().values())  # ids may have gaps

    def extended(self, tokens: list[str]) -> FastBackend:
        larger = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        larger.add_special_tokens(tokens)
        return FastBackend(larger)

    def around(self) -> list[str]:
        """What the file's own post-processing puts around a text."""
        return self._tokenizer.encode("").tokens

    def marks(self) -> dict[str, str]:
        """`bos`, `eos` and `pad` of an encoder, which its folder need not name."""
        around = self.around()
        if len(around) != 2:
            return {}
        pads = [("pad", pad) for pad in PADS if self.id(pad) is not None]
        return dict([("bos", around[0]), ("eos", around[1]), *pads[:1]])

    def save(self, folder: Path) -> None:
        self._tokenizer.save(str(folder / "tokenizer.json"))


class SentencePieceBackend:
    """`sentencepiece`: `tokenizer.model`, with the legacy treatment of special tokens.

    Text between special tokens is encoded on its own, so that each stretch starts with
    the dummy prefix, as the slow Llama tokenizer did when LLaVA was trained.
    """

    def __init__(self, proto: bytes):
        import sentencepiece

        self._proto = proto
        self._model = sentencepiece.SentencePieceProcessor(model_proto=proto)
        special = [i for i in range(self.size()) if self._model.is_control(i)]
        self._special = {self._model.id_to_piece(i): i for i in special}
        pattern = "|".join(map(re.escape, self._special)) or r"(?!)"
        self._split = re.compile(f"({pattern})").split

    def __reduce__(self):
        return SentencePieceBackend, (self._proto,)

    def encode(self, text: str) -> tuple[list[int], Offsets]:
        ids, offsets, start = [], [], 0
        for part in self._split(text):
            if part in self._special:
                ids.append(self._special[part])
                offsets.append((start, start + len(part)))
            elif part:
                found = self._model.encode(part, return_type="offset_mapping")
                ids += found["ids"]
                offsets += [(start + a, start + b) for a, b in found["offsets"]]
            start += len(part)
        return ids, offsets

    def decode(self, ids: list[int], skip_special: bool) -> str:
        if skip_special:
            return self._model.decode([i for i in ids if not self._model.is_control(i)])
        pieces = [self._model.id_to_piece(i) for i in ids]
        parts, run = [], []
        for i, piece in zip(ids, pieces):
            if piece in self._special:
                parts += [self._model.decode(run), piece]
                run = []
            else:
                run.append(i)
        return "".join([*parts, self._model.decode(run)])

    def id(self, token: str) -> int | None:
        found = self._model.piece_to_id(token)
        return found if self._model.id_to_piece(found) == token else None

    def size(self) -> int:
        return self._model.vocab_size()

    def extended(self, tokens: list[str]) -> SentencePieceBackend:
        return self

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(self._proto)


def _special_names(folder: Path) -> dict[str, str | bool]:
    """`bos`, `eos`, `pad`, `unk` and `add_bos`, as far as a hub folder names them."""
    found = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        file = folder / name
        config = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        for key in ("bos", "eos", "pad", "unk"):
            token = config.get(f"{key}_token")
            if token:  # a text, or an object with flags around it
                found[key] = token if isinstance(token, str) else token["content"]
        if isinstance(config.get("add_bos_token"), bool):
            found["add_bos"] = config["add_bos_token"]
    return found


def _merged(merges: str) -> tokenizers.Tokenizer:
    """A byte-level BPE from its vocabulary and merges, as they were before
    `tokenizer.json`."""
    folder = Path(merges).parent
    settings = folder / "tokenizer_config.json"
    config = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
    kind = config.get("tokenizer_class")
    if kind not in GPT_2:
        raise ValueError(
            f"{folder} has {MERGES} of a {kind}, which may split text in its own way; "
            "save the tokenizer with transformers' AutoTokenizer to get a tokenizer.json"
        )
    model = tokenizers.models.BPE.from_file(str(folder / VOCAB), merges)
    tokenizer = tokenizers.Tokenizer(model)
    spaced = bool(config.get("add_prefix_space"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(spaced)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = {
        name for name in _special_names(folder).values() if isinstance(name, str)
    }
    special |= set(GPT_2[kind])
    file = folder / ADDED
    added = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    for token in [*sorted(special - added.keys()), *sorted(added, key=added.get)]:
        options = dict(normalized=False, special=token in special)
        tokenizer.add_tokens([tokenizers.AddedToken(token, **options)])
    moved = [token for token in added if tokenizer.token_to_id(token) != added[token]]
    if moved:
        raise ValueError(f"{file}: {moved[0]!r} is not next to the vocabulary's ids")
    return _framed(tokenizer, *GPT_2[kind][:2])


def _word_pieces(words: str) -> tokenizers.Tokenizer:
    """BERT's word pieces from their list, as it was before `tokenizer.json`."""
    settings = Path(words).with_name("tokenizer_config.json")
    config = json.loads(settings.read_text("utf-8")) if settings.is_file() else {}
    model = tokenizers.models.WordPiece.from_file(words, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    missing = [token for token in BERT if tokenizer.token_to_id(token) is None]
    if missing:
        raise ValueError(
            f"{words} lacks {', '.join(missing)}: it is not a vocabulary of BERT; give a "
            "folder with tokenizer.json"
        )
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    tokenizer.add_special_tokens([*BERT, "[MASK]"])
    return _framed(tokenizer, *BERT[:2])


def _framed(tokenizer: tokenizers.Tokenizer, *around: str) -> tokenizers.Tokenizer:
    """A tokenizer with these tokens around a text, if there are any."""
    if around:
        begin, end = around
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{begin} $A {end}",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in around],
        )
    return tokenizer


# Files that were read before `tokenizer.json`, and how.
_READ = {MERGES: _merged, WORDS: _word_pieces}


def _trained(texts: Iterable[str], vocab_size: int) -> tokenizers.Tokenizer:
    pre = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _characters() -> tokenizers.Tokenizer:
    """One id for each printable ASCII character and the newline."""
    special = ["<unk>", "<s>", "</s>"]
    letters = [*map(chr, range(32, 127)), "\n"]
    vocabulary = {token: i for i, token in enumerate([*special, *letters])}
    # BPE without merges: characters, twice as fast as splitting with a regex.
    model = tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", cache_capacity=0)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(special)
    return tokenizer
