"""Is it faster? Time to first token and per decoded token, beside the plan's FLOPs.

    python benchmarks/prefill.py --keeps=288,144,58

A random LLaVA-shaped model of some 60 M parameters whose language stack does nearly all
the work. All plans run in turn, round after round, so the ratios hold on a noisy machine.
Only real dropping is timed: a mask saves nothing.
"""

from __future__ import annotations

import dataclasses
import platform
import statistics
import time

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np

from lmm_jax import strategies
from lmm_jax.decode import Generator
from lmm_jax.depth import make_plan
from lmm_jax.depth.cost import cost
from lmm_jax.models import lmm, specs

_KEEPS = flags.DEFINE_list("keeps", ["288", "144", "58"], "Visual tokens that stay.")
_LAYER = flags.DEFINE_integer("layer", 2, "FastV's layer.")
_TEXT = flags.DEFINE_integer("text", 64, "Text tokens of the prompt.")
_TOKENS = flags.DEFINE_integer("new_tokens", 16, "Tokens decoded.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds.")
_BATCH = flags.DEFINE_integer("batch", 1, "Prompts at once.")

SPEC = specs.LMMSpec(
    specs.VisionSpec(
        336,
        14,
        specs.vit_block(32, 2, 64, "quick_gelu"),
        depth=1,
        run=1,
        post_norm=False,
    ),
    specs.LanguageSpec(2000, specs.llama_block(512, 8, 1408), 18),
)


@dataclasses.dataclass
class Case:
    """One plan, compiled, and its times in seconds."""

    name: str
    plan: object
    generator: Generator
    prefills: list[float] = dataclasses.field(default_factory=list)
    decodes: list[float] = dataclasses.field(default_factory=list)

    def round(self, params, batch, key) -> None:
        start = time.perf_counter()
        token, cache = self.generator.prefill(params, batch, key)
        token.block_until_ready()
        middle = time.perf_counter()
        for _ in range(_TOKENS.value):
            token, cache = self.generator.step(params, token, cache, key)
        token.block_until_ready()
        self.prefills.append(middle - start)
        self.decodes.append((time.perf_counter() - middle) / _TOKENS.value)


def main(argv) -> None:
    geometry = lmm.geometry(SPEC, images=1, crops=0, prefix=0, suffix=_TEXT.value)
    chosen = [("baseline", {})]
    chosen += [
        (f"fastv keep {keep}", {"fastv": dict(layer=_LAYER.value, keep=int(keep))})
        for keep in _KEEPS.value
    ]
    cases = []
    for name, strategy in chosen:
        plan = make_plan(geometry, strategies.build(strategy, geometry))
        model = lmm.LMM(SPEC, plan)
        cases.append(Case(name, plan, Generator(model, _TOKENS.value + 1, end=-1)))
    first = cases[0].generator.model
    params = jax.jit(lambda k: lmm.init(first, k))(jax.random.key(0))
    batch, key = prompts(first), jax.random.key(0)
    for _ in range(1 + _ROUNDS.value):
        for case in cases:
            case.round(params, batch, key)
    report(cases)


def prompts(model: lmm.LMM) -> dict[str, jax.Array]:
    """Random words around a random image."""
    rng = np.random.default_rng(0)
    batch = {
        name: np.zeros(x.shape, x.dtype)
        for name, x in lmm.abstract_batch(model, _BATCH.value).items()
    }
    visual = model.plan.tokens_per_image
    batch["images"] = rng.integers(0, 256, batch["images"].shape, dtype=np.uint8)
    batch["tokens"] = rng.integers(3, 2000, batch["tokens"].shape, dtype=np.int32)
    batch["positions"] += visual + np.arange(_TEXT.value, dtype=np.int32)
    batch["visual_positions"] += np.arange(visual, dtype=np.int32)
    for name in ("valid", "visual_valid", "views"):
        batch[name][:] = True
    return jax.tree.map(jnp.asarray, batch)


def report(cases: list[Case]) -> None:
    base = cases[0]
    whole = cost(base.plan, pairs="all")
    print(
        f"{jax.devices()[0].device_kind}, {platform.processor() or platform.machine()}"
    )
    print(f"batch {_BATCH.value}, {_ROUNDS.value} rounds in turn, medians and ranges")
    print(
        "| plan | FLOP ratio | prefill ratio | prefill ms | KV ratio | decode ratio | "
        "decode ms |\n|---|---|---|---|---|---|---|"
    )
    for case in cases:
        this = cost(case.plan, pairs="all")
        prefill = [a / b for a, b in zip(case.prefills[1:], base.prefills[1:])]
        decode = [a / b for a, b in zip(case.decodes[1:], base.decodes[1:])]
        print(
            f"| {case.name} | {this.prefill / whole.prefill:.3f} | {spread(prefill)} "
            f"| {1e3 * statistics.median(case.prefills[1:]):.0f} "
            f"| {this.kv_bytes / whole.kv_bytes:.3f} | {spread(decode)} "
            f"| {1e3 * statistics.median(case.decodes[1:]):.1f} |"
        )


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    app.run(main)
