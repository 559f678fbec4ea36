"""Multiple choice by log-likelihood: which letter a model expects after a question.

Letters: B batch, C choices, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lmm_jax.answer import buckets, fitted
from lmm_jax.data import pipeline
from lmm_jax.data.conversation import Encoded
from lmm_jax.data.placement import SampleSpec, arranged, numbers
from lmm_jax.data.sources import BadRecord
from lmm_jax.depth import Role
from lmm_jax.eval import choices
from lmm_jax.eval.choices import Choice
from lmm_jax.experiment import Conversing
from lmm_jax.models import lmm

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Chooser:
    """A model that chooses.

    Attributes:
        exp: whose model it is.
        params: as `weights.prepared` leaves them.
        slots: longest prompt in tokens.
        shots: solved examples before a question, at most; fewer where they do not fit.
    """

    exp: Conversing
    params: Mapping[str, Any]
    slots: int
    shots: int

    def ask(
        self, questions: Sequence[Choice], batch_size: int
    ) -> list[tuple[np.ndarray, int]]:
        """For every question, in order, the log-likelihoods f32 [C] of its letters, and
        the tokens of its prompt.

        Raises:
            BadRecord: a question that does not fit, or letters of several tokens.
        """
        plan = self.exp.text_model(self.slots).plan
        samples = self.exp.samples(plan)
        prompts = Letters(samples, self.shots, choices.most(questions))
        axes = self.exp.axes
        own = axes.own_rows(batch_size)
        found: dict[int, tuple[np.ndarray, int]] = {}
        for batch in pipeline.in_order(questions, prompts, batch_size, own):
            lengths = batch["valid"].sum(axis=1)
            size, arrays = fitted(batch, 0, self._programs)
            said = self._programs[size](self.params, self.exp.place(arrays))
            known = {"ids": batch["id"], "lengths": lengths}
            rows = axes.read({"said": said}, known)
            told = zip(rows["said"], rows["lengths"].tolist())
            found |= zip(rows["ids"].tolist(), told)  # -1 are the rows that fill up
        return [
            (found[i][0][: len(question.choices)], found[i][1])
            for i, question in enumerate(questions)
        ]

    @functools.cached_property
    def _programs(self):
        models = {size: self.exp.text_model(size) for size in buckets(self.slots)}
        chunk = self.exp.config.eval.chunk
        return {size: likelihoods(model, chunk) for size, model in models.items()}


def likelihoods(model: lmm.LMM, chunk: int = 0):
    """(parameters, batch with `candidates` int32 [B, C]) to their log-likelihoods as the
    next token, f32 [B, C]; compiled at its first call."""

    @jax.jit
    def run(params, batch):
        sizes = dict(slots=1, chunk=chunk)
        logits, _ = model.apply({"params": params}, batch, **sizes, method="prefill")
        logs = jax.nn.log_softmax(logits.astype(jnp.float32))
        return jnp.take_along_axis(logs, batch["candidates"], axis=-1)

    return run


@dataclasses.dataclass(frozen=True)
class Letters:
    """How a question becomes a prompt, and its letters candidates for the next token.

    Attributes:
        samples: tokenizer and slots.
        shots: see `Chooser`.
        count: C, places for candidates; the first ones are filled.
    """

    samples: SampleSpec
    shots: int
    count: int

    def prompt(self, record: Choice, *, index: int) -> dict[str, Any]:
        """The arrays of `SampleSpec.prompt`, and candidates int32 [C].

        Raises:
            BadRecord: "too long" without examples, or "letters" of several tokens.
        """
        tokens, candidates = self._fitting(record)
        zeros = np.zeros(len(tokens), np.int32)
        encoded = Encoded(
            tokens=np.array(tokens, np.int32),
            role=np.full(len(tokens), Role.USER, np.int8),
            turn=zeros,
            loss_mask=zeros.astype(np.float32),
            marks=zeros[:0],
        )
        places = np.zeros(self.count, np.int32)
        places[: len(candidates)] = candidates
        arrays = arranged(encoded, (), self.samples, self.samples.slots)
        return {**arrays, "candidates": places, **numbers(index)}

    def _fitting(self, question: Choice) -> tuple[list[int], list[int]]:
        """Tokens with as many examples as there is room for, and those of the letters."""
        shots = min(self.shots, len(question.examples))
        room = self.samples.slots.text
        for count in range(shots, -1, -1):
            tokens, letters = self._tokens(question, count)
            if len(tokens) <= room:
                return tokens, letters
        raise BadRecord(
            "too long",
            f"{len(tokens)} tokens in {room} slots; raise the task's `slots`",
        )

    def _tokens(self, question: Choice, shots: int) -> tuple[list[int], list[int]]:
        tokenizer, text = self.samples.tokenizer, question.prompt(shots)
        begin = [tokenizer.bos_id] if tokenizer.adds_bos else []
        # Each with its letter: a word's token holds the space before it, or does not.
        whole = [tokenizer.encode(f"{text} {x}")[0] for x in question.letters]
        if len({tuple(ids[:-1]) for ids in whole}) > 1:
            raise BadRecord(
                "letters",
                f"this tokenizer does not end {text[-8:]!r} and a letter with one token "
                f"for each of {', '.join(question.letters)}; use another",
            )
        return [*begin, *whole[0][:-1]], [ids[-1] for ids in whole]
