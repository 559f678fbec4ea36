"""Visual-token-efficient large multimodal models in JAX and Flax.

Start at `lmm_jax.depth` (the vocabulary), `lmm_jax.strategies` (one file each) and
`lmm_jax.train` (the story from config to checkpoint).
"""

__version__ = "0.1.0"
