"""Look at every record before training on it.

    python -m lmm_jax.data.check train.json --images=images --tokenizer=vicuna-7b
    python -m lmm_jax.data.check train.json --images=images --slots=1472,4 --pack=8

Prints counts, text lengths and up to ten of each fault; exits with 1 if there is any. With
the text and image slots of a row also how full rows are, packed and not.
FILE is a LLaVA JSON or JSONL file, or the folder of a TFDS version.
"""

from __future__ import annotations

import argparse
import collections
from collections.abc import Iterable, Sequence
import dataclasses
from pathlib import Path
import sys

import grain
import numpy as np
import tqdm

from lmm_jax.data import conversation, images, packing
from lmm_jax.data.conversation import Template
from lmm_jax.data.sources import BadRecord, LlavaJson, Source, TfdsSource
from lmm_jax.data.tokenizer import Tokenizer

SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one record holds.

    Attributes:
        images, turns: how many.
        tokens: length of its text.
        faults: (kind, reason) of everything wrong with it.
    """

    images: int = 0
    turns: int = 0
    tokens: int = 0
    faults: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Inspector:
    """Index -> `Finding`."""

    source: Source
    template: Template
    tokenizer: Tokenizer

    def __call__(self, index: int) -> Finding:
        try:
            record = self.source[index]
        except BadRecord as error:
            return Finding(faults=((error.kind, error.reason),))
        faults, tokens = [], 0
        for image in record.images:
            try:
                images.load(image)
            except BadRecord as error:
                faults.append((error.kind, error.reason))
        try:
            encoded = conversation.encode(record.turns, self.template, self.tokenizer)
            tokens = len(encoded.tokens)
            if len(encoded.marks) != len(record.images):
                counts = f"{len(record.images)} images, {len(encoded.marks)} markers"
                faults.append(("placeholders", counts))
            if not encoded.loss_mask.any():
                faults.append(("unsupervised", "no answer token to learn"))
        except BadRecord as error:
            faults.append((error.kind, error.reason))
        return Finding(len(record.images), len(record.turns), tokens, tuple(faults))


def inspect(
    source: Source, template: Template, tokenizer: Tokenizer
) -> Iterable[Finding]:
    """Findings of all records in order; images are decoded by a few threads."""
    records = grain.MapDataset.range(len(source))
    return records.map(Inspector(source, template, tokenizer)).to_iter_dataset(
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
    parser.add_argument("--images", default="", help="root of the image paths")
    parser.add_argument("--tokenizer", default="characters", help="folder, or a name")
    parser.add_argument(
        "--template", default="short", choices=list(conversation.TEMPLATES)
    )
    parser.add_argument(
        "--slots", type=_pair, metavar="TEXT,IMAGES", help="of a row: says how full"
    )
    parser.add_argument("--pack", type=int, default=8, help="samples of a packed row")
    options = parser.parse_args(arguments)
    if options.file.is_dir():
        source = TfdsSource(options.file)
    else:
        source = LlavaJson(options.file, options.images)
    tokenizer = Tokenizer.load(options.tokenizer)
    template = conversation.find_template(options.template)
    conversation.check(template, tokenizer)
    found = inspect(source, template, tokenizer)
    findings = list(tqdm.tqdm(found, total=len(source)))
    text, faults = report(source, findings)
    print(text)
    if options.slots:
        print(fill(findings, options.slots, options.pack))
    print(f"\n{faults} faults" if faults else "\nall good")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
