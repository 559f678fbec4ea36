"""Which layers a pruned model has left: a field of ours, which other readers pass over."""

from __future__ import annotations

from collections.abc import Mapping
import dataclasses
from typing import Any

from lmm_jax.hub.fields import Fields
from lmm_jax.models.specs import LMMSpec

FIELD = "lmm_jax"


def read(spec: LMMSpec, config: Mapping[str, Any], where: str) -> LMMSpec:
    """The spec with the layers that a config says are left, itself if it says nothing.

    Raises:
        ValueError: fields that we do not know.
    """
    if FIELD not in config:
        return spec
    own = Fields(config[FIELD], f"{where}: {FIELD}")
    kept, region = (tuple(own.take(name, ())) for name in ("kept_layers", "region"))
    own.done()
    language = dataclasses.replace(
        spec.language, depth=len(kept), kept=kept, region=region
    )
    return dataclasses.replace(spec, language=language)


def fields(spec: Any) -> dict[str, Any]:
    """The inverse of `read`; {} of a model that was not pruned."""
    if not isinstance(spec, LMMSpec) or not spec.language.kept:
        return {}
    kept, region = spec.language.kept, spec.language.region
    return {FIELD: {"kept_layers": list(kept), "region": list(region)}}
