"""Models as the hub stores them: a folder of `config.json` and safetensors.

`families/` says, one file each, how an architecture's fields and keys map on ours;
`folder` reads and writes the files; `load` and `save` put the two together.
"""

from lmm_jax.hub.folder import Folder
from lmm_jax.hub.models import load, read_spec, save

__all__ = ["Folder", "load", "read_spec", "save"]
