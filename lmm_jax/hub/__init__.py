"""Models as the hub stores them: a folder of `config.json` and safetensors.

`families/` says, one file each, how an architecture's fields and keys map on ours;
`folder` reads and writes the files; `load` and `save` put the two together.
"""

from lmm_jax.hub import pruned
from lmm_jax.hub.adapter import save_adapter
from lmm_jax.hub.folder import Folder, read_json
from lmm_jax.hub.models import (
    branches,
    image_token,
    language_spec,
    lmm_spec,
    load,
    model_config,
    read_spec,
    save,
    tower_spec,
)
from lmm_jax.hub.processor import PROCESSOR, image_spec, processor_config

__all__ = [
    "PROCESSOR",
    "Folder",
    "branches",
    "image_spec",
    "image_token",
    "language_spec",
    "lmm_spec",
    "load",
    "model_config",
    "processor_config",
    "pruned",
    "read_json",
    "read_spec",
    "save",
    "save_adapter",
    "tower_spec",
]
