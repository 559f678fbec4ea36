"""Grain pipelines: records to batches for training, questions to batches of prompts.

    order of indices -> record -> views, tokens -> slots -> batch -> worker processes

Everything up to the batch is a function of (seed, position), so the order depends
neither on workers nor on processes, and a stream goes on from any batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, Protocol

from absl import flags
import grain
import numpy as np

from lmm_jax.data import grouping, packing
from lmm_jax.data.conversation import MARKER
from lmm_jax.data.kinds import PAIRS, SourceConfig, open_source
from lmm_jax.data.placement import SampleSpec
from lmm_jax.data.sources import BadRecord, Mixture, Record, image_paths

LOOKAHEAD = 100  # bad records in a row before a stream gives up


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to read and how.

    Attributes:
        sources: the mixture; dictionaries of the same keys will do.
        batch_size: samples of a global batch, over all processes; rows if they are packed.
        seed: of the order.
        group: "modality_length" makes batches of one modality; see `grouping`.
        parts: of a grouped batch, each with its fair share of long samples.
        pack: samples that a row may hold, 1 for no packing; see `packing`.
        workers: processes that decode, 0 for none; a script that uses them needs an
            `if __name__ == "__main__"` guard.
        threads: in each of them.
        prefetch: batches kept ready in each of them.
        max_skipped: distinct bad records before the run stops (`SkipLedger`).

    Raises:
        ValueError: fields that do not go together.
    """

    sources: tuple[SourceConfig, ...]
    batch_size: int
    seed: int = 0
    group: Literal["none", "modality_length"] = "none"
    parts: int = 1
    pack: int = 1
    workers: int = 0
    threads: int = 4
    prefetch: int = 4
    max_skipped: int = 100

    def __post_init__(self):
        made = [SourceConfig(**s) if isinstance(s, dict) else s for s in self.sources]
        object.__setattr__(self, "sources", tuple(made))
        if self.pack > 1 and self.group != "none":
            raise ValueError(
                f"data.pack={self.pack} with data.group={self.group!r}: a packed row holds "
                "samples with and without images; use group='none', or pack=1"
            )
        kinds = sorted({source.kind for source in made})
        plain = len(kinds) == 1 and self.pack == 1 and self.group == "none"
        if not plain and PAIRS.keys() & kinds:
            raise ValueError(
                f"sources of {', '.join(kinds)} with data.pack={self.pack} and "
                f"data.group={self.group!r}: samples of an encoder are all of one kind, "
                "neither packed nor grouped; use pack=1 and group='none'"
            )


@dataclasses.dataclass(frozen=True)
class Question:
    """One row of an evaluation file.

    `images` are paths or encoded bytes, `text` includes the format request, `answers`
    are the annotators' and may be empty, `category` is a subset of the benchmark.
    """

    id: str
    images: tuple[str | bytes, ...]
    text: str
    answers: tuple[str, ...] = ()
    category: str = ""

    @property
    def record(self) -> Record:
        """The question as a conversation that waits for its answer."""
        missing = len(self.images) - self.text.count(MARKER)
        text = f"{MARKER}\n" * missing + self.text
        return Record(self.id, self.images, ({"from": "human", "value": text},))


def read_questions(path: str | Path, image_root: str = "") -> tuple[Question, ...]:
    """Questions of a JSONL file of `question_id, image, text, category, answers`.

    Raises:
        ValueError: a line that is not JSON, or without id or text; names the line.
    """
    questions = []
    for number, line in enumerate(Path(path).read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            given = row.get("answers", ())
            answers = (given,) if isinstance(given, str) else tuple(given)
            images = image_paths(row.get("image"), Path(image_root))
            name, category = str(row["question_id"]), row.get("category", "")
            questions.append(Question(name, images, row["text"], answers, category))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number}: {error!r}; a question is an object with "
                "'question_id' and 'text'"
            ) from error
    return tuple(questions)


def open_sources(config: DataConfig) -> Mixture:
    """The mixture of a config; ValueError where only some sources have a weight."""
    sources = [open_source(source, train=True) for source in config.sources]
    weights = [s.weight for s in config.sources if s.weight is not None]
    return Mixture(sources, weights or None)


class Samples(Protocol):
    """How records become samples; each kind of record has its own."""

    def sample(self, record: Any, *, index: int, position: int) -> dict[str, Any]:
        """What is learned from a record: arrays, and `id` and `skipped` for the host.

        Args:
            index: of the record, stored as `id`.
            position: in the stream; whatever is drawn is a function of (seed, position).

        Raises:
            BadRecord: whatever keeps it from training.
        """

    def prompt(self, record: Any, *, index: int) -> dict[str, Any]:
        """What is asked about a record, with nothing drawn."""


@dataclasses.dataclass(frozen=True)
class _Sampler:
    """Position in the stream -> sample; the next good record replaces a bad one."""

    source: Mixture
    order: grain.MapDataset
    spec: Samples

    def __call__(self, position: int, index: int) -> dict[str, Any]:
        for ahead in range(LOOKAHEAD):
            other = int(self.order[position + ahead])
            try:
                record = self.source[other]
                found = self.spec.sample(record, index=other, position=position)
            except BadRecord as error:
                last = error
                continue
            found["skipped"] = np.int64(index if ahead else -1)
            return found
        raise ValueError(
            f"{LOOKAHEAD} bad records in a row, the last {self.source.name(other)}: "
            f"{last}; run python -m lmm_jax.data.check on the data"
        )


@dataclasses.dataclass(frozen=True)
class _Prompter:
    """Row -> prompt of a record; row -1 pads the last batch."""

    records: Sequence[Any]
    spec: Samples

    def __call__(self, row: int) -> dict[str, Any]:
        record = self.records[range(len(self.records))[row]]
        try:
            return self.spec.prompt(record, index=row)
        except BadRecord as error:
            raise BadRecord(error.kind, f"question {record.id}: {error}") from error


def train_batches(
    source: Mixture,
    spec: Samples,
    config: DataConfig,
    *,
    start: int = 0,
    own: Sequence[int] | None = None,
) -> grain.DatasetIterator:
    """Batches without end. Close it when workers were used.

    Args:
        own: rows of a global batch that this process reads, None for all; see
            `lmm_jax.parallel.axes.Axes.own_rows`.
        start: number of the first batch, which is that of the update that it is for; so a
            run goes on with other processes and workers, and misses and repeats nothing.

    Raises:
        ValueError: the source cannot be ordered as the config says.
    """
    return _stream(all_batches(source, spec, config, own)[start:], config)


def all_batches(
    source: Mixture,
    spec: Samples,
    config: DataConfig,
    own: Sequence[int] | None = None,
) -> grain.MapDataset:
    """Every batch by its number, made where it is asked for; see `train_batches`."""
    samples = _packed if config.pack > 1 else _samples
    return _batches(samples(source, spec, config), config.batch_size, own)


def prompts(
    questions: Sequence[Question],
    spec: SampleSpec,
    batch_size: int,
    own: Sequence[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of prompts, in order; `id` is the index into `questions`.

    The last batch is filled with the last question under `id` -1. Every process gets
    the same number of batches.

    Args:
        own: see `train_batches`.

    Raises:
        BadRecord: a question that cannot be asked; skipping it would change the score.
    """
    records = [question.record for question in questions]
    return in_order(records, spec, batch_size, own)


def in_order(
    records: Sequence[Any],
    spec: Samples,
    batch_size: int,
    own: Sequence[int] | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of the prompts of records, which may be a source; see `prompts`."""
    rows = [*range(len(records)), *[-1] * (-len(records) % batch_size)]
    asked = grain.MapDataset.source(rows).map(_Prompter(records, spec))
    batches = _batches(asked, batch_size, own)
    return iter(batches.to_iter_dataset(_read_options(threads=4, prefetch=4)))


def _samples(source: Mixture, spec: Samples, config: DataConfig) -> grain.MapDataset:
    """The endless stream of samples."""
    order = _order(source, config)
    return order.map_with_index(_Sampler(source, order, spec))


def _order(source: Mixture, config: DataConfig) -> grain.MapDataset:
    if config.group == "none":
        return source.order(config.seed)
    return grouping.order(source, config.batch_size, config.parts, config.seed)


def _packed(source: Mixture, spec: SampleSpec, config: DataConfig) -> grain.MapDataset:
    """The endless stream of packed rows."""
    if source.weights:
        raise ValueError("data.pack with weights of sources: leave one of them out")
    measured = grain.MapDataset.range(len(source)).map(packing.Measure(source, spec))
    with contextlib.closing(_stream(measured.batch(256), config)) as stream:
        sizes = np.concatenate(list(stream))
    if not sizes.any():
        raise ValueError(
            "data.pack: no record is good; run python -m lmm_jax.data.check on the data"
        )
    room = spec.slots.text, spec.slots.images
    rows = packing.Rows(sizes, room, config.pack, config.seed)
    packer = packing.Packer(source, rows, spec, config.pack)
    return grain.MapDataset.range(1).repeat().map_with_index(packer)


def _stream(batches: grain.MapDataset, config: DataConfig) -> grain.DatasetIterator:
    """Batches in order, made by the threads and processes of the config."""
    stream = batches.to_iter_dataset(_read_options(config.threads, config.prefetch))
    if config.workers:
        if not flags.FLAGS.is_parsed():  # Grain reads flags; a library has none
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=config.workers)
        stream = stream.mp_prefetch(options)
    return iter(stream)


def _batches(
    samples: grain.MapDataset, size: int, own: Sequence[int] | None
) -> grain.MapDataset:
    """Own rows of batches of `size`."""
    # Batching comes before the workers: order must not depend on their number.
    if own is None or len(own) == size:
        return samples.batch(size, drop_remainder=True)
    count = len(samples) // size * len(own)
    mine = grain.MapDataset.range(count).map(_Own(samples, size, tuple(own)))
    return mine.batch(len(own), drop_remainder=True)


@dataclasses.dataclass(frozen=True)
class _Own:
    """Number of an own row -> its sample."""

    samples: grain.MapDataset
    size: int
    rows: Sequence[int]

    def __call__(self, number: int) -> dict[str, Any]:
        batch, row = divmod(int(number), len(self.rows))
        return self.samples[batch * self.size + self.rows[row]]


def _read_options(threads: int, prefetch: int) -> grain.ReadOptions:
    """Grain's default keeps 500 elements ready, and an element here is a batch."""
    return grain.ReadOptions(
        num_threads=threads, prefetch_buffer_size=max(prefetch, threads)
    )


class TooManyBadRecords(RuntimeError):
    """More records were skipped than the config allows; the message lists them."""


def explain(source: Mixture, index: int, spec: Samples) -> str:
    """Why a record was skipped, by trying it again; "" if it is good now."""
    try:
        spec.sample(source[index], index=index, position=0)
    except BadRecord as error:
        return str(error)
    return ""


class SkipLedger:
    """Counts and names the distinct records skipped, and tolerates `limit` of them."""

    def __init__(self, limit: int, source: Mixture, spec: Samples):
        self.limit, self.reasons = limit, {}
        self._source, self._spec = source, spec

    def observe(self, batch: dict[str, Any]) -> list[tuple[int, str, str]]:
        """(index, name, reason) of the records that `batch["skipped"]` shows first.

        With several processes give all of them the gathered column, so that all stop
        together.

        Raises:
            TooManyBadRecords: beyond the limit.
        """
        skipped = np.unique(batch["skipped"]).tolist()
        new = [
            (index, self._source.name(index), explain(self._source, index, self._spec))
            for index in skipped
            if index >= 0 and index not in self.reasons
        ]
        self.reasons |= {index: f"{name}: {reason}" for index, name, reason in new}
        if len(self.reasons) > self.limit:
            listing = "\n".join(list(self.reasons.values())[:20])
            raise TooManyBadRecords(
                f"{len(self.reasons)} bad records, {self.limit} allowed (max_skipped); "
                f"repair or remove them:\n{listing}"
            )
        return new
