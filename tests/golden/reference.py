"""Reads fixtures, and turns the reference's inputs into ours."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lmm_jax.checkpoint.params import from_published
from lmm_jax.depth import Plan, Role
from lmm_jax.models import decoder, lmm, specs

IMAGE = -200


@dataclasses.dataclass(frozen=True)
class Fixture:
    """One file."""

    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]

    def __getitem__(self, key: str) -> np.ndarray:
        return self.arrays[key]

    @property
    def params(self) -> dict[str, np.ndarray]:
        return {
            key.removeprefix("param/"): value
            for key, value in self.arrays.items()
            if key.startswith("param/")
        }


def load(name: str) -> Fixture:
    """`name` is "<system>/<file>", below LMM_JAX_GOLDEN_DIR or this folder."""
    root = Path(os.environ.get("LMM_JAX_GOLDEN_DIR", Path(__file__).parent))
    with np.load(root / f"{name}.npz", allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files if key != "meta"}
        return Fixture(arrays, json.loads(str(file["meta"])))


def language_spec(c: dict[str, Any]) -> specs.LanguageSpec:
    """A Llama from a Hugging Face style config."""
    block = specs.llama_block(
        c["hidden_size"],
        c["num_attention_heads"],
        c["intermediate_size"],
        kv_heads=c["num_key_value_heads"],
        base=c["rope_theta"],
    )
    block = dataclasses.replace(block, norm_eps=c["rms_norm_eps"])
    return specs.LanguageSpec(c["vocab_size"], block, c["num_hidden_layers"])


def lmm_spec(config: dict[str, Any]) -> specs.LMMSpec:
    """The LLaVA of a DeepStack fixture."""
    v = config["vision"]
    block = specs.vit_block(
        v["hidden_size"],
        v["num_attention_heads"],
        v["intermediate_size"],
        v["hidden_act"],
    )
    block = dataclasses.replace(block, norm_eps=v["layer_norm_eps"])
    depth = v["num_hidden_layers"] + v.get("post_encoder_layers", 0)
    vision = specs.VisionSpec(
        v["image_size"],
        v["patch_size"],
        block,
        depth=depth,
        run=depth + 1 + v["select_layer"],  # entry -2 is the input of the last block
    )
    return specs.LMMSpec(vision, language_spec(config["llm"]))


def lmm_params(fixture: Fixture, model: lmm.LMM) -> dict[str, Any]:
    abstract = jax.eval_shape(lambda k: lmm.init(model, k), jax.random.key(0))
    return from_published(fixture.params, lmm.params(model.spec), abstract)


def decoder_params(fixture: Fixture, spec: specs.LanguageSpec) -> dict[str, Any]:
    module = decoder.Decoder(spec)

    def init(module):
        module.embed(np.zeros((1, 1), np.int32))
        return module.logits(np.zeros((1, 1, spec.block.width), np.float32)), (
            module.stack.layers
        )

    abstract = jax.eval_shape(
        lambda k: module.init(k, method=init)["params"], jax.random.key(0)
    )
    return from_published(fixture.params, decoder.params(spec), abstract)


def batch(
    fixture: Fixture, plan: Plan, ids: np.ndarray, mask: np.ndarray
) -> dict[str, np.ndarray]:
    """Places `<image>` placeholders and text; `pixel_values_i` is the i-th placeholder.

    Text goes to the slots in the order of storage, all of it behind the pictures.
    """
    g, per_image = plan.geometry, plan.tokens_per_image
    rows, width = ids.shape
    pixels = [
        fixture[f"in/pixel_values_{i}"].transpose(0, 2, 3, 1)
        for i in range(int((ids == IMAGE).sum()))
    ]
    side = pixels[0].shape[1]
    out = {
        "images": np.zeros((rows, g.images, 1 + g.crops, side, side, 3), np.float32),
        "views": np.zeros((rows, g.images, 1 + g.crops), bool),
        "grid": np.zeros((rows, g.images, 2), np.int32),
        "tokens": np.zeros((rows, width), np.int32),
        "positions": np.zeros((rows, width), np.int32),
        "valid": np.zeros((rows, width), bool),
        "segment": np.zeros((rows, width), np.int32),
        "role": np.full((rows, width), Role.USER, np.int8),
        "turn": np.zeros((rows, width), np.int32),
        "loss_mask": np.zeros((rows, width), np.float32),
        "visual_positions": np.zeros((rows, g.images * per_image), np.int32),
        "visual_valid": np.zeros((rows, g.images * per_image), bool),
        "visual_segment": np.zeros((rows, g.images * per_image), np.int32),
    }
    number = 0
    for row in range(rows):
        at = slot = image = 0
        for token in ids[row][mask[row] > 0]:
            if token == IMAGE:
                views = pixels[number]
                out["images"][row, image, : len(views)] = views
                out["views"][row, image, : len(views)] = True
                out["grid"][row, image] = fixture["in/grids_wh"][number]
                span = slice(image * per_image, (image + 1) * per_image)
                out["visual_positions"][row, span] = at + np.arange(per_image)
                out["visual_valid"][row, span] = True
                at, image, number = at + per_image, image + 1, number + 1
                continue
            out["tokens"][row, slot] = token
            out["positions"][row, slot] = at
            out["valid"][row, slot] = True
            at, slot = at + 1, slot + 1
    return out


def run(model: lmm.LMM, params, batch, chunk: int = 0):
    """The state after the last layer, and logits of all its tokens."""

    def both(model, batch):
        state = model(batch, chunk=chunk).state
        return state, model.logits(state.hidden)

    apply = functools.partial(model.apply, method=both)
    return jax.jit(lambda p, b: apply({"params": p}, b))(params, batch)


def in_order(values, state) -> list[np.ndarray]:
    """Rows of [B, T, ...] in the order of positions, padding left out."""
    values, valid = np.asarray(values), np.asarray(state.valid)
    positions = np.asarray(state.positions)
    return [
        values[row][valid[row]][np.argsort(positions[row][valid[row]])]
        for row in range(len(values))
    ]
