"""LLaVA-NeXT (LLaVA-1.6): any-resolution images, up to 2,928 visual tokens each.

    python -m lmm_jax.depth.plan --config=configs/llava_next.py
    python -m lmm_jax.generate --config=configs/llava_next.py --config.init.load=HF_DIR \\
        --image=page.png --prompt="What is the title?"
"""

from lmm_jax import config, presets


def get_config(arg=None):
    a = config.parse(arg, lm="vicuna-7b")
    c = presets.llava(language=a.lm)
    c.name = "llava_next"
    c.workdir = f"runs/llava-next-{a.lm}"
    c.image.mode = "anyres"
    c.image.pinpoints = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
    c.text.suffix = 1104  # with 64 before and 2928 of an image: 4096
    c.strategy.anyres = dict()
    # The published recipe tunes everything, the tower more slowly.
    c.train.learn = ("vision", "connector", "language", "strategy_anyres")
    c.optim.lr_scale = dict(vision=0.1)
    return c
