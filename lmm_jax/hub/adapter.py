"""Adapters as the PEFT library stores them: what a LoRA run learned, without its base."""

from __future__ import annotations

from collections.abc import Mapping
import json
from pathlib import Path
import re
from typing import Any

import jax
from safetensors.numpy import save_file

from lmm_jax.checkpoint.params import flatten, published
from lmm_jax.hub.families import llava
from lmm_jax.hub.fused import fused_of
from lmm_jax.models.specs import LMMSpec

# PEFT names parameters as the model holds them in memory, not as it stores them.
_IN_MEMORY = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
)
_PROJECTOR = "multi_modal_projector"


def save_adapter(
    path: str | Path, spec: LMMSpec, learned: Mapping[str, Any], *, base: str
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` for a LLaVA folder.

    Args:
        path: made when missing.
        spec: of the adapted model.
        learned: what the run has learned: adapters, and the projector if it did.
        base: name or folder of the model that is adapted.

    Raises:
        ValueError: no adapters, something else was learned too, or the base is no
            LLaVA-1.5, or stores projections as one that we adapt apart (Phi-3).
    """
    lora = spec.language.block.lora
    others = {p for p in flatten(learned) if not re.search(r"/lora_[ab]$", p)}
    others = sorted(p for p in others if not p.startswith("connector/"))
    named = spec.kind in llava.KINDS and not fused_of(llava, spec)
    if lora is None or others or not named:
        reason = f"learned {others[0]} too" if others else "has no place in PEFT"
        reason = "has no adapters" if lora is None else reason
        raise ValueError(f"the run {reason}: export it merged, without --adapter.")
    rows = llava.rows(spec)
    tensors = {}
    for key, value in published(learned, rows):
        for pattern, replacement in _IN_MEMORY:
            key = re.sub(pattern, replacement, key)
        tensors[f"base_model.model.{key}"] = value
    adapted = {
        row.key.removesuffix(".lora_A.weight").rsplit(".", 1)[-1]
        for row in rows
        if row.path.endswith("lora_a")
    }
    few = "|".join(map(str, lora.layers or ()))
    layers = rf".*\.layers\.({few})\." if few else ""
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        # Not `layers_to_transform`: the vision tower has layers and projections of the
        # same names, and PEFT takes that only beside plain names.
        "target_modules": rf".*language_model{layers}.*\.({'|'.join(sorted(adapted))})",
        "modules_to_save": [_PROJECTOR] if "connector" in learned else None,
        "bias": "none",
        "inference_mode": True,
    }
    if jax.process_index():  # it has taken part in gathering
        return
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
