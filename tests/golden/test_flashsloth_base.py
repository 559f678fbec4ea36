"""SigLIP and Phi-2 of FlashSloth, read from folders that hold the reference's weights."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from lmm_jax import hub, losses
from lmm_jax.checkpoint.params import to_published
from lmm_jax.hub.families import phi
from tests.golden import reference
from tests.hub import test_language as language
from tests.hub import test_vision as vision

CLOSE = dict(rtol=1e-5, atol=1e-5)


def opened(name: str, folder, **kind):
    """A fixture as a folder of the hub: its numbers, sizes and parameters."""
    f = reference.load(f"flashsloth/base_{name}")
    known = set(f.meta["config"]) - {
        *("batch", "grid", "weights_bf16_representable"),
        *("rotary_dim", "head_dim", "padding", "lengths"),
    }
    fields = {name: f.meta["config"][name] for name in known}
    (folder / "config.json").write_text(json.dumps({**fields, **kind}))
    save_file(f.params, folder / "model.safetensors")
    return f, hub.Folder(folder)


@pytest.mark.parametrize("name", ["siglip_g6", "siglip_g7_odd"])
def test_siglip(name, tmp_path):
    f, folder = opened(name, tmp_path, model_type="siglip_vision_model")
    full = hub.tower_spec(folder.path, -1)
    pixels = f["in/pixel_values"].transpose(0, 2, 3, 1)
    params = hub.load(folder, full, vision.abstract(full))
    for layers in range(1, full.depth + 1):
        spec = hub.tower_spec(folder.path, layers)
        ours = vision.features(spec, params, pixels)
        np.testing.assert_allclose(ours, f[f"out/hidden_{layers}"], **CLOSE)
    theirs = hub.tower_spec(folder.path, -2)  # as the authors cut it
    ours = vision.features(theirs, params, pixels)
    np.testing.assert_allclose(ours, f["out/flashsloth_tower"], **CLOSE)
    spare = full.image % full.patch
    if spare:
        other = pixels.copy()
        other[:, -spare:], other[:, :, -spare:] = 9.0, 9.0
        np.testing.assert_array_equal(vision.features(theirs, params, other), ours)


@pytest.mark.parametrize("name", ["phi_rot05", "phi_rot04", "phi_long"])
def test_phi(name, tmp_path):
    f, folder = opened(name, tmp_path, model_type="phi", tie_word_embeddings=False)
    spec = hub.read_spec(folder.config, folder.path)
    params = hub.load(folder, spec, language.abstract(spec))
    tokens, valid = f["in/input_ids"], f["in/attention_mask"] > 0
    states, logits = language.forward(spec, params, tokens, valid)
    for i, ours in enumerate(states):
        np.testing.assert_allclose(ours[valid], f[f"out/hidden_{i}"][valid], **CLOSE)
    np.testing.assert_allclose(logits[valid], f["out/logits"][valid], **CLOSE)

    def loss(params):
        _, logits = language.forward(spec, params, tokens, valid)
        mask = (f["in/labels"] >= 0).astype(np.float32)[:, 1:]
        return losses.next_token(logits[:, :-1], tokens[:, 1:], mask)[0]

    np.testing.assert_allclose(loss(params), f["out/loss"], **CLOSE)
    mute = {**params, "head": {**params["head"], "bias": 0 * params["head"]["bias"]}}
    assert abs(loss(mute) - f["out/loss"]) > 1e-3
    ours = to_published(jax.grad(loss)(params), phi.rows(spec))
    for key, right in f.arrays.items():
        if key.startswith("grad/param/"):
            found, bound = ours[key[11:]], 1e-4 * np.abs(right).max()
            np.testing.assert_allclose(found, right, rtol=0, atol=bound, err_msg=key)


def test_phi_continues(tmp_path):
    """All tokens in one pass; that a cache changes nothing is a law."""
    f, folder = opened("phi_rot04", tmp_path, model_type="phi")
    spec = hub.read_spec(folder.config, folder.path)
    params = hub.load(folder, spec, language.abstract(spec))
    asked, said = f["in/input_ids"], f["out/greedy_tokens"]
    assert (f["in/attention_mask"] > 0).all()
    tokens = np.concatenate([asked, said[:, :-1]], axis=1)
    _, logits = language.forward(spec, params, tokens, np.ones_like(tokens, bool))
    ours = logits[:, asked.shape[1] - 1 :]
    np.testing.assert_allclose(ours, f["out/greedy_logits"], **CLOSE)
    np.testing.assert_array_equal(np.argmax(ours, -1), said)
