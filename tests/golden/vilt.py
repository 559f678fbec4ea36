"""ViLT fixtures as our models and batches."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from lmm_jax.checkpoint.params import from_published
from lmm_jax.depth import Plan, make_plan
from lmm_jax.hub.families import vilt_original
from lmm_jax.hub.fused import Split
from lmm_jax.models import encoders, heads, vilt
from lmm_jax.models.specs import vit_block
from lmm_jax.models.vilt import Vilt, ViltSpec
from lmm_jax.strategies import pumer
from tests.golden.reference import Fixture

SCORES = {"mean_head": "attention", "first_head": "first_head"}
TASKS = {"vqa": "vqav2", "nlvr2": "nlvr2", "irtr": "flickr30k"}


def spec(f: Fixture) -> ViltSpec:
    """Of a model in PuMer's own code."""
    c = f.meta["config"]
    width = c["hidden"]
    block = vit_block(
        width, c["heads"], c["mlp_ratio"] * width, "gelu", norm_eps=c["ln_eps"]
    )
    block = dataclasses.replace(block, soft_mask=True)
    head = heads.head(TASKS[c["task"]], width)
    if head.task == "vqav2":
        head = dataclasses.replace(head, outputs=c["num_labels"])
    return ViltSpec(
        vision=vilt.patches(c["pos_grid"] * c["patch"], c["patch"], block),
        block=block,
        depth=c["layers"],
        vocab=c["vocab_size"],
        places=c["max_text_len"],
        types=c["token_types"],
        text_eps=c["text_ln_eps"],
        head=head,
    )


def shares(c: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the strategy, from what a fixture says of its reducers."""
    return dict(
        prune=c["prune"],
        merge=c["merge_image"],
        text=c["merge_text"],
        score=SCORES[c["score"]],
        preset="reference",
    )


def plan(f: Fixture, spec: ViltSpec, *, reduced: bool) -> Plan:
    c, patch = f.meta["config"], spec.vision.patch
    canvas = tuple(side // patch for side in c["image_hw"])
    sizes = vilt.geometry(spec, text=f["in/input_ids"].shape[-1], canvas=canvas)
    if not reduced:
        return make_plan(sizes, ())
    edits = pumer.edits(sizes, layers=c["reduce"]["layers"], **shares(c["reduce"]))
    return make_plan(sizes, edits)


def params(f: Fixture, model: Vilt) -> dict[str, Any]:
    abstract = jax.eval_shape(lambda k: encoders.init(model, k), jax.random.key(0))
    tensors = Split(f.params, vilt_original.fused(model.spec))
    return from_published(tensors, vilt_original.rows(model.spec), abstract)


def batch(f: Fixture, patch: int) -> dict[str, np.ndarray]:
    """Pixels [B, I, H, W, 3]; in a retrieval fixture each pair is an example."""
    ids, mask = f["in/input_ids"], f["in/attention_mask"]
    if "in/pixel_values1" in f.arrays:
        images = np.stack([f["in/pixel_values1"], f["in/pixel_values2"]], axis=1)
    else:
        images = f["in/pixel_values"]
        images = images[:, None] if images.ndim == 4 else images
    if ids.ndim == 3:
        pairs = ids.shape[1]
        images = np.repeat(images[:, :1], pairs, axis=0)
        ids, mask = (x.reshape(-1, x.shape[-1]) for x in (ids, mask))
    found = dict(
        images=images.transpose(0, 1, 3, 4, 2),
        tokens=ids,
        valid=mask > 0,
    )
    if "in/pixel_mask" in f.arrays:
        shown = f["in/pixel_mask"]
        shown = shown[:, None] if shown.ndim == 3 else shown
        shown = shown[:, :, ::patch, ::patch]
        sides = shown[:, :, 0].sum(-1), shown[:, :, :, 0].sum(-1)
        found["grid"] = np.stack(sides, axis=-1).astype(np.int32)
    return found


def ordered(f: Fixture, states: np.ndarray, columns: int) -> np.ndarray:
    """Our tokens [B, T, D], all of them, in the fixture's order, real patches first."""
    if "out/patch_index" not in f.arrays:
        return states
    index, text = f["out/patch_index"], f["in/input_ids"].shape[1]
    patches = text + 1 + index[..., 0] * columns + index[..., 1]
    front = np.broadcast_to(np.arange(text + 1), (len(index), text + 1))
    rows = np.concatenate([front, patches], axis=1)
    return np.take_along_axis(states, rows[..., None], axis=1)
