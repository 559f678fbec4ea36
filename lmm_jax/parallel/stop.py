"""Ending early: all processes together."""

from __future__ import annotations

import os
import signal

import jax
from jax.experimental import multihost_utils


class Stopping:
    """SIGTERM or SIGINT to any process asks all to save and leave; a second one acts at
    once."""

    def __init__(self):
        self._asked, self._before = False, {}
        # Of several processes, each has JAX's own handler of SIGTERM, which tells the
        # others; a handler of ours would take its place.
        alone = jax.process_count() == 1
        handlers = {signal.SIGINT: self._ask if alone else self._pass_on}
        if alone:
            handlers[signal.SIGTERM] = self._ask
        for kind, handler in handlers.items():
            self._before[kind] = signal.signal(kind, handler)

    def at(self, step: int) -> bool:
        """Whether to save and leave now, at the same step in all processes. Must be asked
        after every step."""
        return self._asked or multihost_utils.reached_preemption_sync_point(step)

    def restore(self) -> None:
        """Puts back the handlers that were there."""
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _ask(self, kind, frame):
        self._asked = True
        signal.signal(kind, self._before[kind])

    def _pass_on(self, kind, frame):
        signal.signal(kind, self._before[kind])
        os.kill(os.getpid(), signal.SIGTERM)
