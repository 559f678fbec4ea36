"""Look at every record before training on it.

    python -m lmm_jax.data.check train.json --images=images --tokenizer=vicuna-7b
    python -m lmm_jax.data.check train.json --images=images --slots=1472,4 --pack=8
    python -m lmm_jax.data.check questions.json --kind=vqav2 --images=train2014 \
        --annotations=annotations.json --answers=answers.json --tokenizer=bert

Prints counts, text lengths and up to ten of each fault; exits with 1 if there is any. With
the text and image slots of a row also how full rows are, packed and not.
FILE is a LLaVA JSON or JSONL file, the folder of a TFDS version, or what `--kind` says.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Callable, Iterable, Sequence
import dataclasses
from pathlib import Path
import sys
from typing import Any

import grain
import numpy as np
import tqdm

from lmm_jax.data import conversation, images, kinds, packing
from lmm_jax.data.conversation import Template
from lmm_jax.data.kinds import SourceConfig, open_source
from lmm_jax.data.pairs import Pair
from lmm_jax.data.sources import BadRecord, Record, Source
from lmm_jax.data.tokenizer import Tokenizer

SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one record holds.

    Attributes:
        images, turns: how many; a pair has no turns.
        tokens: length of its text.
        faults: (kind, reason) of everything wrong with it.
    """

    images: int = 0
    turns: int = 0
    tokens: int = 0
    faults: tuple[tuple[str, str], ...] = ()


# Record -> its turns, the length of its text, and its faults.
Reader = Callable[[Any], tuple[int, int, list[tuple[str, str]]]]


@dataclasses.dataclass(frozen=True)
class Inspector:
    """Index -> `Finding`."""

    source: Source
    read: Reader

    def __call__(self, index: int) -> Finding:
        try:
            record = self.source[index]
        except BadRecord as error:
            return Finding(faults=((error.kind, error.reason),))
        faults = []
        for image in record.images:
            try:
                images.load(image)
            except BadRecord as error:
                faults.append((error.kind, error.reason))
        turns, tokens, more = self.read(record)
        return Finding(len(record.images), turns, tokens, (*faults, *more))


@dataclasses.dataclass(frozen=True)
class ConversationReader:
    """Reads conversations."""

    template: Template
    tokenizer: Tokenizer

    def __call__(self, record: Record) -> tuple[int, int, list[tuple[str, str]]]:
        turns, faults = len(record.turns), []
        try:
            encoded = conversation.encode(record.turns, self.template, self.tokenizer)
        except BadRecord as error:
            return turns, 0, [(error.kind, error.reason)]
        if len(encoded.marks) != len(record.images):
            counts = f"{len(record.images)} images, {len(encoded.marks)} markers"
            faults.append(("placeholders", counts))
        if not encoded.loss_mask.any():
            faults.append(("unsupervised", "no answer token to learn"))
        return turns, len(encoded.tokens), faults


@dataclasses.dataclass(frozen=True)
class PairReader:
    """Reads the texts of pairs, with a token before and after."""

    tokenizer: Tokenizer

    def __call__(self, record: Pair) -> tuple[int, int, list[tuple[str, str]]]:
        learned = record.target or record.others
        faults = [] if learned else [("unsupervised", "nothing that could be learned")]
        return 0, len(self.tokenizer.encode(record.text)[0]) + 2, faults


def inspect(source: Source, read: Reader) -> Iterable[Finding]:
    """Findings of all records in order; images are decoded by a few threads."""
    records = grain.MapDataset.range(len(source))
    return records.map(Inspector(source, read)).to_iter_dataset(
        grain.ReadOptions(num_threads=8, prefetch_buffer_size=64)
    )


def report(source: Source, findings: Sequence[Finding]) -> tuple[str, int]:
    """The text of the report and the number of faults."""
    faults = collections.defaultdict(list)
    for index, finding in enumerate(findings):
        for kind, reason in finding.faults:
            faults[kind].append(f"{source.name(index)}: {reason}")
    lengths = [finding.tokens for finding in findings if finding.tokens]
    counts = {
        "samples": len(findings),
        "images": sum(finding.images for finding in findings),
        "text only": sum(f.turns > 0 and not f.images for f in findings),
        "turns": sum(finding.turns for finding in findings),
    }
    lines = [f"{name:18}{count}" for name, count in counts.items()]
    if lengths:
        median, most, longest = np.percentile(lengths, (50, 99, 100)).astype(int)
        lines.append(f"{'text tokens':18}median {median}, 99 % {most}, max {longest}")
    for kind, listed in sorted(faults.items()):
        lines.append(f"\n{kind}: {len(listed)}")
        lines += [f"  {line}" for line in listed[:SHOWN]]
        if len(listed) > SHOWN:
            lines.append(f"  and {len(listed) - SHOWN} more")
    return "\n".join(lines), sum(map(len, faults.values()))


def fill(findings: Sequence[Finding], slots: tuple[int, int], most: int) -> str:
    """How full the text slots of rows are, for samples that are cut where too long.

    Args:
        slots: text and image slots of a row.
        most: samples of a packed row.
    """
    fit = [f for f in findings if f.tokens and f.images <= slots[1]]
    if not fit:
        return ""
    sizes = np.array([(min(f.tokens, slots[0]), f.images) for f in fit])
    packed = len(packing.pack(sizes, slots, most, np.random.default_rng(0)))
    lines = [f"{'rows':18}{len(fit)}, packed {packed}"]
    shares = (sizes[:, 0].sum() / (rows * slots[0]) for rows in (len(fit), packed))
    lines.append(f"{'text slots used':18}{{:.1%}}, packed {{:.1%}}".format(*shares))
    return "\n".join(lines)


def _pair(text: str) -> tuple[int, int]:
    first, second = map(int, text.split(","))
    return first, second


def main(arguments: list[str] | None = None) -> int:
    """Check one file; 1 if anything is wrong, else 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="JSON, JSONL or TFDS folder")
    parser.add_argument(
        "--kind", choices=[*kinds.CONVERSATIONS, *kinds.PAIRS], help="of the file"
    )
    parser.add_argument("--images", default="", help="root of the image paths")
    parser.add_argument("--split", default="train", help="of TFDS and Flickr30k")
    parser.add_argument("--annotations", default="", help="of VQAv2")
    parser.add_argument("--answers", default="", help="of VQAv2, a JSON file or folder")
    parser.add_argument("--tokenizer", default="characters", help="folder, or a name")
    parser.add_argument(
        "--template", default="short", choices=list(conversation.TEMPLATES)
    )
    parser.add_argument(
        "--slots", type=_pair, metavar="TEXT,IMAGES", help="of a row: says how full"
    )
    parser.add_argument("--pack", type=int, default=8, help="samples of a packed row")
    options = parser.parse_args(arguments)
    config = SourceConfig(
        path=str(options.file),
        kind=options.kind or ("tfds" if options.file.is_dir() else "llava"),
        images=options.images,
        split=options.split,
        annotations=options.annotations,
        answers=options.answers,
    )
    source = open_source(config, train=True)
    tokenizer = Tokenizer.load(options.tokenizer)
    if config.kind in kinds.PAIRS:
        reader = PairReader(tokenizer)
    else:
        template = conversation.find_template(options.template)
        conversation.check(template, tokenizer)
        reader = ConversationReader(template, tokenizer)
    found = inspect(source, reader)
    findings = list(tqdm.tqdm(found, total=len(source)))
    text, faults = report(source, findings)
    print(text)
    if options.slots:
        print(fill(findings, options.slots, options.pack))
    print(f"\n{faults} faults" if faults else "\nall good")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
