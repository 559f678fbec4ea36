"""Ways to do the same, timed in turn, so that ratios hold on a noisy machine.

Imported before torch, which counts cores as it is imported; jax does so later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import os
import platform
import statistics
import time

from absl import flags

CORES = 2
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])

import jax  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds.")
_REST = flags.DEFINE_float("rest", 0.3, "Seconds in which idle threads fall asleep.")

Ways = Mapping[str, Callable[[], float]]  # to seconds


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def measured(cases: Mapping[str, Ways]) -> dict[str, dict[str, list[float]]]:
    """Seconds of every way of every case, round after round; the first, which compiles,
    is thrown away."""
    times = {case: {way: [] for way in ways} for case, ways in cases.items()}
    for number in range(1 + _ROUNDS.value):
        for case, ways in cases.items():
            for way, run in ways.items():
                time.sleep(_REST.value)  # OpenMP's threads spin on before they sleep
                spent = run()
                if number:
                    times[case][way].append(spent)
    return times


def fastest(ways: Mapping[str, list[float]]) -> tuple[str, list[float]]:
    """The way of the lowest median, and its seconds."""
    return min(ways.items(), key=lambda way: statistics.median(way[1]))


def conditions() -> str:
    """What the times depend on, in words."""
    chip = platform.processor() or platform.machine()
    versions = f"jax {jax.__version__}, torch {torch.__version__}"
    return (
        f"{chip}, {CORES} cores, float32; {versions}, transformers "
        f"{transformers.__version__}; {_ROUNDS.value} rounds, medians (ranges)"
    )
