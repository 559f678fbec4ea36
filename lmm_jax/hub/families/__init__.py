"""One file per family of architectures. Each has

KINDS      model types of `config.json` that it reads
IGNORED    patterns of keys that it does not need
ALIASES    (pattern, replacement): other spellings of its keys (optional)
read       fields -> spec
rows       spec -> parameter rows in its keys
IMAGE_TOKEN  text that marks an image, where tokenizers may lack it (optional)
fused      spec -> tensors that are stored as one (optional)
config     spec -> `config.json`
"""

from lmm_jax.hub.families import (
    deepstack,
    flashsloth,
    llama,
    llava,
    llava_next,
    llava_original,
    meter,
    phi,
    phi3,
    qwen3_vl,
    vilt,
    vilt_original,
    vision,
)

ALL = (
    llama,
    phi,
    phi3,
    vision,
    llava,
    llava_next,
    llava_original,
    deepstack,
    flashsloth,
    qwen3_vl,
    vilt,
    vilt_original,
    meter,
)
FAMILIES = {kind: f for f in ALL for kind in f.KINDS}
