"""Generation: prefill, a decode loop, sampling.

Letters: B batch, W vocabulary, M new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lmm_jax.data.tokenizer import Tokenizer
from lmm_jax.models import lmm
from lmm_jax.nn.cache import Cache

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: 0 is greedy.
        top_p: smallest set of tokens with this much probability; 1 is all.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature={self.temperature}, top_p={self.top_p}: use "
                "temperature >= 0 and 0 < top_p <= 1."
            )


def sample(logits: Array, key: Array, sampling: Sampling) -> Array:
    """Draws tokens int32 [B] from logits [B, W]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits.astype(jnp.float32) / sampling.temperature
    if sampling.top_p < 1:
        ranked = -jnp.sort(-logits, axis=-1)
        mass = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
        # The token that crosses the line stays in, so at least one does.
        last = jnp.sum(mass < sampling.top_p, axis=-1, keepdims=True)
        least = jnp.take_along_axis(ranked, last, axis=-1)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return jax.random.categorical(key, logits).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Generator:
    """Compiled generation of one model: one program per (batch, prompt, M) shape.

    Attributes:
        model: along the plan for running.
        slots: M.
        end: token that ends an answer.
        sampling: how tokens are drawn.
        chunk: see `LMM.prefill`.
    """

    model: lmm.LMM
    slots: int
    end: int
    sampling: Sampling = Sampling()
    chunk: int = 0

    def __call__(self, params, batch, key: Array | None = None) -> Array:
        """Answers int32 [B, M]; after the end token, more end tokens."""
        key = jax.random.key(0) if key is None else key
        token, cache = self.prefill(params, batch, key)
        return self.loop(params, token, cache, key)

    def stream(self, params, batch, key: Array | None = None) -> Iterator[np.ndarray]:
        """Yields tokens int32 [B] one by one, until every row has ended."""
        key = jax.random.key(0) if key is None else key
        token, cache = self.prefill(params, batch, key)
        ended = np.zeros(token.shape, bool)
        for step in range(self.slots):
            now = np.where(ended, self.end, np.asarray(token))
            ended |= now == self.end
            yield now
            if ended.all():
                return
            if step + 1 < self.slots:
                token, cache = self.step(params, token, cache, key)

    @property
    def programs(self) -> int:
        """Programs compiled so far."""
        jitted = (self.prefill, self.step, self.loop)
        return sum(function._cache_size() for function in jitted)

    @functools.cached_property
    def prefill(self) -> Callable[..., tuple[Array, Cache]]:
        @jax.jit
        def prefill(params, batch, key):
            logits, cache = self.model.apply(
                {"params": params},
                batch,
                slots=self.slots,
                chunk=self.chunk,
                method="prefill",
            )
            return sample(logits, _at(key, cache), self.sampling), cache

        return prefill

    @functools.cached_property
    def step(self) -> Callable[..., tuple[Array, Cache]]:
        return jax.jit(self._next, donate_argnums=2)

    @functools.cached_property
    def loop(self) -> Callable[..., Array]:
        @jax.jit
        def loop(params, token, cache, key):
            answers = jnp.full((token.shape[0], self.slots), self.end, jnp.int32)

            def running(carry):
                _, cache, _, ended = carry
                return (cache.step < self.slots - 1) & ~ended.all()

            def body(carry):
                token, cache, answers, ended = carry
                token, cache = self._next(params, token, cache, key)
                token = jnp.where(ended, self.end, token)
                answers = jax.lax.dynamic_update_slice(
                    answers, token[:, None], (0, cache.step)
                )
                return token, cache, answers, ended | (token == self.end)

            answers = answers.at[:, 0].set(token)
            carry = (token, cache, answers, token == self.end)
            return jax.lax.while_loop(running, body, carry)[2]

        return loop

    def _next(self, params, token, cache, key):
        logits, cache = self.model.apply(
            {"params": params}, token, cache, method="decode"
        )
        return sample(logits, _at(key, cache), self.sampling), cache


def _at(key: Array, cache: Cache) -> Array:
    """A key of its own for every step."""
    return jax.random.fold_in(key, cache.step)


def words(
    tokens: np.ndarray, tokenizer: Tokenizer, end: int, stop: Sequence[str] = ()
) -> str:
    """Tokens of one answer as text, up to the token `end` or the first text of `stop`."""
    said = TextStream(tokenizer, end, stop)
    ids = tokens.tolist()
    ids = ids[: ids.index(end)] if end in ids else ids
    return said.certain(ids, whole=True)


class TextStream:
    """Tokens of one answer to pieces of text that will not change any more.

    Held back are half a character, white space that may be the last, and what may turn
    out to begin a stop text; so the pieces add up to `words` of all tokens.

    Attributes:
        done: whether the answer has ended.
    """

    def __init__(self, tokenizer: Tokenizer, end: int, stop: Sequence[str] = ()):
        self.done = False
        self._tokenizer, self._end, self._stop = tokenizer, end, tuple(stop)
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """What one more token makes certain."""
        if self.done:
            return ""
        if token == self._end:
            return self.close()
        self._ids.append(token)
        return self._new(whole=False)

    def close(self) -> str:
        """What is left when no token follows."""
        self.done = True
        return self._new(whole=True)

    def certain(self, ids: Sequence[int], *, whole: bool) -> str:
        """The text of `ids` up to a stop text, without what more tokens could change."""
        # All are decoded each time: a character may span tokens.
        text = self._tokenizer.decode(ids)
        found = [(text.find(s) + len(s), text.find(s)) for s in self._stop if s in text]
        if found:  # the one that was complete first, whatever the tokens were
            self.done = True
            return text[: min(found)[1]].strip()
        text = text.rstrip("\ufffd")
        return (text if whole else text[: self._safe(text)]).strip()

    def _new(self, *, whole: bool) -> str:
        text, before = self.certain(self._ids, whole=whole), self._shown
        if not text.startswith(before):  # a decoder that rewrites what it said
            return ""
        self._shown = text
        return text[len(before) :]

    def _safe(self, text: str) -> int:
        """Where the longest ending that begins a stop text starts."""
        longest = max(map(len, self._stop), default=0)
        for at in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[at:]) for stop in self._stop):
                return at
        return len(text)
