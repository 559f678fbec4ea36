"""DeepStack as its own code stores it: LLaVA's original layout, what is stacked beside it.

One layout for both forms; `is_anyres_deepstack` says that it is DeepStack-HD, which has a
newline.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from lmm_jax.data.images import candidates
from lmm_jax.hub.families import llava_original
from lmm_jax.hub.fields import Fields
from lmm_jax.models.specs import LMMSpec
from lmm_jax.nn.params import Param
from lmm_jax.strategies import Chosen

# model type -> model type of its language model
KINDS = {"deepstack_llama": "llama", "deepstack_phi": "phi3"}
ARCHITECTURES = {
    "deepstack_llama": "DeepstackLlamaForCausalLM",
    "deepstack_phi": "DeepstackPhiForCausalLM",
}
TOLD = ("own", "mode", "crops", "pinpoints", "fine")  # of a spec, by this layout alone
IGNORED = llava_original.IGNORED
NEWLINE = Param("strategy_anyres/newline", "embed", "model.image_newline", "embed")
fused = llava_original.fused


def read(f: Fields) -> LMMSpec:
    """The spec of a config; the strategy and its views are the model's own.

    Raises:
        ValueError: as `llava_original.read`; one of the authors' ablations.
    """
    kind = f.take("model_type")
    f.take("image_aspect_ratio")  # without it nothing would be stacked
    f.only("image_aspect_ratio", "deepstack")
    f.only("deepstack_args_for_ablation", "")
    f.only("twoviews_unshare", False)
    f.only("hires", False)
    budget, tiled = f.take("num_crops"), f.take("is_anyres_deepstack", False)
    arguments = {
        "start": f.take("deepstack_start_id", 1),
        "interval": f.take("deepstack_interval", 1),
    }
    if tiled:
        f.only("deepstack_sampling", "2d")
        name = "deepstack_hd"
        views = dict(pinpoints=candidates(budget), fine=math.isqrt(budget))
    else:
        arguments["order"] = f.only("deepstack_sampling", "2d", "1d", "grid")
        name, views = "deepstack", dict(crops=budget)
    return dataclasses.replace(
        llava_original.read(f, KINDS),
        own=(Chosen.of(name, arguments),),
        mode="stretch",
        kind=kind,
        **views,
    )


def rows(spec: LMMSpec) -> tuple[Param, ...]:
    """Rows in the keys of the original code."""
    return (*llava_original.rows(spec), *([NEWLINE] if spec.fine else []))


def config(spec: LMMSpec) -> dict[str, Any]:
    """A `config.json` from which `read` gives `spec` again.

    Raises:
        ValueError: as `llava_original.config`; a model without DeepStack, or with one that
            the layout has no names for.
    """
    form = "deepstack_hd" if spec.fine else "deepstack"
    stacks = (own for own in spec.own if isinstance(own, Chosen) and own.name == form)
    given = dict(getattr(next(stacks, None), "arguments", ()))
    fields = llava_original.config(spec, KINDS)
    fields |= {
        "architectures": [ARCHITECTURES[fields["model_type"]]],
        "image_aspect_ratio": "deepstack",
        "num_crops": max([spec.crops, *(c * r for c, r in spec.pinpoints)]),
        "is_anyres_deepstack": bool(spec.fine),
        "deepstack_start_id": given.get("start"),
        "deepstack_interval": given.get("interval"),
        "deepstack_sampling": given.get("order", "2d"),
    }
    if any(getattr(spec, name) != getattr(read(Fields(fields)), name) for name in TOLD):
        said = ", ".join(f"{name}={getattr(spec, name)}" for name in TOLD)
        raise ValueError(
            "DeepStack's layout knows deepstack and deepstack_hd alone, with all their "
            f"groups, the grids of a budget and stretched views; this model has {said}: "
            "use kind='llava', or train it so."
        )
    return fields
