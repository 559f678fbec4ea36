"""METER of a fixture: its spec, its parameters in ours, its batch."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from lmm_jax.checkpoint.params import from_published
from lmm_jax.hub.families import meter as family
from lmm_jax.hub.fused import Split
from lmm_jax.models import encoders, heads
from lmm_jax.models.meter import Meter, MeterSpec, co_block
from lmm_jax.models.roberta import TextSpec
from lmm_jax.models.specs import VisionSpec, vit_block
from tests.golden.reference import Fixture

TEXT = "param/meter.text_transformer.embeddings.position_embeddings.weight"


def block(f: Fixture, order: str):
    """Of the co-attention layers; masks are soft in PuMer's code alone."""
    c = f.meta["config"]
    hidden = c["hidden"] * c["mlp_ratio"]
    soft = order == "sequential"
    made = co_block(c["hidden"], c["heads"], hidden, soft_mask=soft)
    eps = c.get("cross_ln_eps", c.get("ln_eps"))
    return dataclasses.replace(made, norm_eps=eps)


def spec(f: Fixture) -> MeterSpec:
    c = f.meta["config"]
    width, count = c["hidden"], c["heads"]
    image = vit_block(width, count, 4 * width, "quick_gelu", norm_eps=c["image_ln_eps"])
    text = vit_block(
        width, count, c["text_mlp_ratio"] * width, "gelu", norm_eps=c["text_ln_eps"]
    )
    depth, order = c["image_layers"], c["coattn"]
    head = heads.head({"vqa": "vqav2"}.get(c["task"], c["task"]), width)
    if c["task"] == "vqa":
        head = dataclasses.replace(head, outputs=c["num_labels"])
    return MeterSpec(
        VisionSpec(c["image"], c["patch"], image, depth, depth),
        TextSpec(
            c["vocab_size"],
            len(f[TEXT]),
            dataclasses.replace(text, post_norm=True),
            c["text_layers"],
            pad=c["pad_id"],
        ),
        block(f, order),
        c["coattn_layers"],
        order,
        c["token_types"],
        head,
        kind="meter",
    )


def batch(f: Fixture) -> dict[str, np.ndarray]:
    names = [n for n in ("in/pixel_values1", "in/pixel_values2") if n in f.arrays]
    images = [f[n].transpose(0, 2, 3, 1) for n in names or ["in/pixel_values"]]
    return {
        "images": np.stack(images, axis=1),
        "tokens": f["in/input_ids"],
        "valid": f["in/attention_mask"] > 0,
    }


def params(f: Fixture, model: Meter) -> dict:
    abstract = jax.eval_shape(lambda key: encoders.init(model, key), jax.random.key(0))
    rows = family.rows(model.spec)
    tensors = Split(f.params, family.fused(model.spec))
    return from_published(tensors, rows, abstract)
