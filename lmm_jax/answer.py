"""Questions to answers: batches of prompts through as few compiled programs as possible.

Prompts are cut to the smallest bucket of text slots that holds a batch, so short ones do
not pay for the longest; a batch size compiles at most twice per bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import functools
import sys
from typing import Any

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np
from tqdm import tqdm

from lmm_jax.data import pipeline
from lmm_jax.data.pipeline import Question
from lmm_jax.data.placement import SampleSpec
from lmm_jax.data.sources import Record
from lmm_jax.decode import Generator, Sampling, TextStream, words
from lmm_jax.experiment import Experiment

# What a batch says of every text slot; coordinates only where a model has them.
TEXT = (
    "tokens",
    "positions",
    "valid",
    "segment",
    "role",
    "turn",
    "loss_mask",
    "coords",
)


def buckets(largest: int, smallest: int = 64) -> tuple[int, ...]:
    """Powers of two from `smallest` on, and `largest` at the end."""
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= 2
    return (*sizes, largest)


@dataclasses.dataclass(frozen=True)
class Answerer:
    """A model that answers.

    Attributes:
        exp: whose model it is.
        params: as `weights.prepared` leaves them.
        slots: longest answer in tokens.
        sampling: how tokens are drawn.
        stop: texts before which an answer ends.
        seed: of the draws.
    """

    exp: Experiment
    params: Mapping[str, Any]
    slots: int
    sampling: Sampling = Sampling()  # noqa: RUF009 (frozen)
    stop: tuple[str, ...] = ()
    seed: int = 0

    def ask(
        self, questions: Sequence[Question], batch_size: int, title: str = ""
    ) -> list[tuple[str, int]]:
        """For every question, in order, the answer and the text tokens of its prompt.

        On several processes, all of them must ask the same.

        Raises:
            BadRecord: a question that cannot be asked.
        """
        axes = self.exp.axes
        own = axes.own_rows(batch_size)
        batches = pipeline.prompts(questions, self.samples, batch_size, own)
        total = -(-len(questions) // batch_size)
        quiet = jax.process_index() > 0 or not sys.stderr.isatty()
        found: dict[int, tuple[str, int]] = {}
        shown = tqdm(batches, total=total, desc=title, disable=quiet)
        for number, batch in enumerate(shown):
            generator, arrays = self._fitted(batch)
            tokens = generator(self.params, arrays, self._key(number))
            lengths = batch["valid"].sum(axis=1)
            known = {"ids": batch["id"], "lengths": lengths}
            rows = axes.read({"tokens": tokens}, known)
            told = zip(rows["tokens"], rows["lengths"].tolist())
            answers = ((self.words(line), length) for line, length in told)
            found |= zip(rows["ids"].tolist(), answers)  # -1 are the rows that fill up
        logging.info("compiled %d programs", self.programs)
        return [found[index] for index in range(len(questions))]

    def stream(self, record: Record, number: int = 0) -> Iterator[str]:
        """Pieces of the answer to one conversation that ends with a question.

        Args:
            number: tells the draws of several calls apart.

        Raises:
            BadRecord: a conversation that does not fit, or an image that cannot be read.
        """
        one = self.samples.prompt(record, index=0)
        generator, arrays = self._fitted(
            {k: np.asarray(x)[None] for k, x in one.items()}
        )
        said = TextStream(self.exp.tokenizer, self.exp.end_id, self.stop)
        for token in generator.stream(self.params, arrays, self._key(number)):
            yield said.push(int(token[0]))
            if said.done:
                return
        yield said.close()

    def words(self, tokens: np.ndarray) -> str:
        """The text of one row of tokens."""
        return words(tokens, self.exp.tokenizer, self.exp.end_id, self.stop)

    @property
    def programs(self) -> int:
        """Programs compiled so far."""
        return sum(generator.programs for generator in self._generators.values())

    @functools.cached_property
    def samples(self) -> SampleSpec:
        """How a question becomes a prompt with the largest number of slots."""
        return self.exp.samples(self.exp.plan(train=False))

    @functools.cached_property
    def _generators(self) -> dict[int, Generator]:
        largest = self.samples.slots.suffix
        settings = self.exp.config.eval
        chosen = settings.buckets or buckets(largest)
        sizes = sorted({largest, *(size for size in chosen if size < largest)})
        end, sampling = self.exp.end_id, self.sampling
        models = {size: self.exp.model(train=False, suffix=size) for size in sizes}
        return {
            size: Generator(model, self.slots, end, sampling, settings.chunk)
            for size, model in models.items()
        }

    def _fitted(self, batch: Mapping[str, np.ndarray]):
        """The generator of the smallest bucket, and a batch cut to it, on the devices."""
        size, batch = fitted(batch, self.samples.slots.prefix, self._generators)
        return self._generators[size], self.exp.place(batch)

    def _key(self, number: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.seed), number)


def fitted(
    batch: Mapping[str, np.ndarray], prefix: int, sizes: Iterable[int]
) -> tuple[int, dict[str, np.ndarray]]:
    """The smallest of these bucket sizes, ascending, that holds the text after `prefix`
    slots, on all processes, and the batch cut to it."""
    used = int(np.flatnonzero(batch["valid"].any(axis=0)).max()) + 1 - prefix
    if jax.process_count() > 1:
        used = int(multihost_utils.process_allgather(np.int32(used)).max())
    size = next(size for size in sizes if size >= used)
    cut = {name: batch[name][:, : prefix + size] for name in TEXT if name in batch}
    return size, {**batch, **cut}
