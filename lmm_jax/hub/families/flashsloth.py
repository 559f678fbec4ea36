"""FlashSloth as its own code stores it: LLaVA's original layout, a tower that ends with the
layer whose features are read, and what pools and asks beside it.

Its `config.json` is that of its language model, so it says nothing of the strategy, which
has the authors' arguments.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from lmm_jax.hub.families import llava_original
from lmm_jax.hub.fields import Fields
from lmm_jax.models.specs import LMMSpec, VisionSpec
from lmm_jax.nn.params import Param
from lmm_jax.nn.query import EmbeddedQuery
from lmm_jax.strategies import Chosen
from lmm_jax.strategies.flashsloth import AttentionPool

KINDS = {"flashsloth": "phi"}  # our name -> its model type, that of its language model
ARCHITECTURE = "FlashSlothForCausalLM"
ARGUMENTS = {"anchor": 764}  # " ." of Phi-2; the others are defaults
MODES = {"square": "stretch", "pad": "pad"}
TOLD = ("own", "mode", "crops", "pinpoints", "fine")  # of a spec, by this layout alone
IGNORED = (
    *llava_original.IGNORED,
    # The last of a whole tower, in what a run from SigLIP's own folder writes.
    r"\.vision_model\.(encoder\.layers\.26|post_layernorm)\.",
)
fused = llava_original.fused


def read(f: Fields) -> LMMSpec:
    """The spec of a config; the strategy and its views are the model's own.

    Raises:
        ValueError: as `llava_original.read`; another model with Phi's model type.
    """
    f.only("architectures", [ARCHITECTURE])
    f.only("mm_vision_select_layer", -2)
    mode, crops = MODES[f.only("image_aspect_ratio", *MODES)], 0
    if f.take("image_hd", False):
        mode, crops = "quadrants", 4
    spec = llava_original.read(f, KINDS)
    return dataclasses.replace(
        spec,
        vision=_cut(spec.vision),
        own=(Chosen.of("flashsloth", ARGUMENTS),),
        mode=mode,
        crops=crops,
        kind="flashsloth",
    )


def rows(spec: LMMSpec) -> tuple[Param, ...]:
    """Rows in the keys of the original code."""
    pool, ask = "strategy_flashsloth_pool/", "strategy_flashsloth_query/"
    return (
        *llava_original.rows(spec),
        *(row.under(pool, "model.pooling.") for row in AttentionPool.params()),
        *(row.under(ask, "model.") for row in EmbeddedQuery.params()),
    )


def config(spec: LMMSpec) -> dict[str, Any]:
    """A `config.json` from which `read` gives `spec` again, its tower cut.

    Raises:
        ValueError: as `llava_original.config`; a model without FlashSloth, or with one that
            the layout has no names for.
    """
    whole = dataclasses.replace(spec.vision, depth=spec.vision.run + 1)
    ratios = {mode: ratio for ratio, mode in MODES.items()}
    fields = {
        **llava_original.config(dataclasses.replace(spec, vision=whole), KINDS),
        "model_type": "phi",
        "architectures": [ARCHITECTURE],
        "image_aspect_ratio": ratios.get(spec.mode, "square"),
        "image_hd": spec.mode == "quadrants",
    }
    again = read(Fields({**fields, "model_type": "flashsloth"}))
    if any(getattr(spec, name) != getattr(again, name) for name in TOLD):
        said = ", ".join(f"{name}={getattr(spec, name)}" for name in TOLD)
        raise ValueError(
            f"FlashSloth's layout knows flashsloth with {ARGUMENTS} alone, on images that "
            f"are stretched, padded, or quadrants; this model has {said}: train it so."
        )
    return fields


def _cut(tower: VisionSpec) -> VisionSpec:
    """The tower without what lies behind its features."""
    return dataclasses.replace(tower, depth=tower.run, post_norm=False)
