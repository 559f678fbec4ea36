"""A tiny model and batch on which every strategy runs."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from lmm_jax import strategies
from lmm_jax.data import tiles
from lmm_jax.depth import Edit, Geometry, Plan, Role, make_plan
from lmm_jax.models import lmm, specs

SPEC = specs.LMMSpec(
    specs.named("vision", "tiny-vit"), specs.named("language", "tiny-lm")
)
PREFIX, SUFFIX, IMAGES, CROPS = 4, 12, 2, 4
GRIDS = ((2, 2), (3, 1))  # of tiles or crops, in the first and the second image
SIZES = ((30, 25), (48, 8))  # of these images as any-resolution ones
BUDGETS = {  # arguments under which each strategy really does something here
    "anyres": {},
    "average_pool": {"factor": 2},
    "deepstack": {"start": 1, "interval": 1},
    "deepstack_hd": {"start": 1, "interval": 2},
    "deepstack_v": {"start": 1},
    "deepstack_whole": {"start": 2, "groups": 2, "inputs": False},
    "fastv": {"layer": 2, "keep": 9},
    "flashsloth": {"window": 3, "queries": 2, "layer": 3},
    "llava": {},
    "llava_hires": {},
    "pumer": {"layers": (1, 3), "prune": 0.2, "merge": 0.3},
    "random": {"keep": 5},
    "slimm_e": {"interval": 2},
    "slimm_m": {"taps": (0, 1)},
    "slimm_v1": {},
    "uniform": {"keep": 4},
}
LEARN = (
    "anyres",
    "flashsloth",
    "slimm_e",
    "slimm_m",
    "slimm_v1",
)  # what has parameters of its own
NEEDS = {"deepstack_hd": {"fine": 2}}  # more views than others read
GEOMETRY = lmm.geometry(
    SPEC, images=IMAGES, crops=CROPS, prefix=PREFIX, suffix=SUFFIX, pinpoints=GRIDS
)


def strategy(name: str, geometry: Geometry = GEOMETRY, **arguments) -> tuple[Edit, ...]:
    """Its edits, by default those that do something here."""
    geometry = dataclasses.replace(geometry, **NEEDS.get(name, {}))
    return strategies.build({name: arguments or BUDGETS[name]}, geometry)


@dataclasses.dataclass(frozen=True)
class Tiny:
    """Random parameters, shared by all plans, and a batch for any of them.

    The parameters are those of the model and of every strategy that learns.
    """

    geometry: Geometry
    params: dict[str, Any]

    @classmethod
    @functools.cache
    def make(cls) -> Tiny:
        params = {}

        def fresh(key, model, given):
            own = lmm.init(model, key)
            return {branch: x for branch, x in own.items() if branch not in given}

        learn = (strategy(name) for name in LEARN)
        for edits in ((), *learn):
            model = lmm.LMM(SPEC, make_plan(GEOMETRY, edits))
            given = frozenset(params)
            params |= jax.jit(fresh, static_argnums=(1, 2))(
                jax.random.key(0), model, given
            )
        # Norms and biases start at ones and zeros, which would hide mistakes in both.
        leaves, tree = jax.tree.flatten(params)
        rng = np.random.default_rng(0)
        noisy = [
            np.asarray(x) + 0.1 * rng.standard_normal(x.shape).astype(np.float32)
            for x in leaves
        ]
        return cls(GEOMETRY, jax.tree.unflatten(tree, noisy))

    def plan(self, edits: tuple[Edit, ...] = (), *, mode="drop", **changes) -> Plan:
        for edit in edits:
            changes = NEEDS.get(getattr(edit, "name", None), {}) | changes
        geometry = dataclasses.replace(self.geometry, **changes)
        return make_plan(geometry, edits, mode=mode)

    def strategy(self, name: str, **arguments) -> tuple[Edit, ...]:
        return strategy(name, self.geometry, **arguments)

    def model(self, plan: Plan, spec: specs.LMMSpec = SPEC) -> lmm.LMM:
        return lmm.LMM(spec, plan)

    def run(self, plan: Plan, batch, params=None):
        """The state after the last layer."""
        return _forward(self.model(plan))(params or self.params, batch)[0]

    def logits(self, plan: Plan, batch, params=None) -> np.ndarray:
        """Logits that predict each text token, zero where there is none."""
        logits = _forward(self.model(plan))(params or self.params, batch)[1]
        predicted = batch["valid"] & (batch["positions"] > 0)
        return np.asarray(logits) * predicted[..., None]

    def decoded(
        self, plan: Plan, batch, count: int, *, chunk: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """The last `count` tokens of each row, read one by one after a prefill.

        Returns:
            Logits [B, count, W] that predict them, and their text slots int [B, count].
        """
        prompt = dict(batch, valid=batch["valid"].copy())
        slots = np.stack([np.flatnonzero(row)[-count:] for row in batch["valid"]])
        np.put_along_axis(prompt["valid"], slots, False, axis=1)
        new = np.take_along_axis(batch["tokens"], slots, 1)
        prefill, decode = _steps(self.model(plan), count, chunk)
        logits, cache = prefill(self.params, prompt)
        found = []
        for step in range(count):
            found.append(np.asarray(logits))
            logits, cache = decode(self.params, new[:, step], cache)
        assert cache.step == count
        return np.stack(found, axis=1), slots

    def batch(self, plan: Plan, seed: int = 0, rows: int = 3) -> dict[str, np.ndarray]:
        """Row 0 has two images, row 1 one, row 2 none (repeating); lengths differ."""
        rng = np.random.default_rng(seed)
        g, per_image = plan.geometry, plan.tokens_per_image
        abstract = lmm.abstract_batch(lmm.LMM(SPEC, plan), rows)
        arrays = {name: np.zeros(x.shape, x.dtype) for name, x in abstract.items()}
        images, tokens = arrays["images"].shape, arrays["tokens"].shape
        arrays["tokens"] = rng.integers(3, SPEC.language.vocab, tokens, np.int32)
        arrays["images"] = rng.integers(0, 256, images, dtype=np.uint8)
        arrays["role"][:] = Role.USER
        tiled = g.pinpoints
        if tiled:
            arrays["visual_rows"][:] = -1
        for row in range(rows):
            count = min((2, 1, 0)[row % 3], g.images)
            length = g.suffix - row % 3
            at = 0
            for slot in range(g.prefix):  # text before the images
                _put(arrays, row, slot, at)
                at += 1
            for image in range(count):
                grid, filled = GRIDS[image], per_image
                if tiled:
                    mosaic = grid[0] * g.grid[1], grid[1] * g.grid[0]
                    border = tiles.borders(SIZES[image], mosaic)
                    found = tiles.rows(grid, g.grid[0], 1 + g.crops, border)
                    arrays["visual_rows"][row, image, : len(found)] = found
                if plan.connect and plan.connect.varies:
                    filled = min(len(found), per_image)
                arrays["grid"][row, image] = grid
                real = np.arange(1 + g.crops) < 1 + grid[0] * grid[1]
                fine = np.repeat(real, g.fine**2)
                arrays["views"][row, image] = np.concatenate([real, fine])
                span = slice(image * per_image, image * per_image + filled)
                arrays["visual_positions"][row, span] = at + np.arange(filled)
                arrays["visual_valid"][row, span] = True
                at += filled
            for slot in range(length):
                _put(arrays, row, g.prefix + slot, at)
                at += 1
            answer = slice(g.prefix + length - 4, g.prefix + length)
            count = sum(query.count for query in plan.queries)
            asks = slice(answer.start - count, answer.start)
            arrays["role"][row, g.prefix + 1 : asks.start] = Role.QUESTION
            arrays["role"][row, asks] = Role.QUERY
            arrays["tokens"][row, asks] = np.arange(count)
            arrays["role"][row, answer] = Role.ASSISTANT
            arrays["loss_mask"][row, answer] = 1.0
        arrays["images"][~arrays["views"]] = 0
        return arrays


def _put(arrays, row: int, slot: int, at: int) -> None:
    arrays["positions"][row, slot] = at
    arrays["valid"][row, slot] = True


@functools.cache
def _steps(model: lmm.LMM, slots: int, chunk: int):
    """Programs of prefill and of one decode step."""

    def prefill(params, batch):
        sizes = dict(slots=slots, chunk=chunk)
        return model.apply({"params": params}, batch, **sizes, method="prefill")

    def decode(params, tokens, cache):
        return model.apply({"params": params}, tokens, cache, method="decode")

    return jax.jit(prefill), jax.jit(decode)


@functools.cache
def _forward(model: lmm.LMM):
    """One program per plan: the last state and the logits."""

    def both(model, batch):
        state = model(batch).state
        return state, model.predict(state, batch)

    return jax.jit(
        lambda params, batch: model.apply({"params": params}, batch, method=both)
    )
