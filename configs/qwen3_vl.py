"""Qwen3-VL (arXiv:2511.21631): images of their own size, DeepStack inside the model.

    python -m lmm_jax.generate --config=configs/qwen3_vl.py:folder=HF_DIR \\
        --image=page.png --prompt="What is the title?"
    python -m lmm_jax.depth.plan --config=configs/qwen3_vl.py:folder=HF_DIR
    python -m lmm_jax.train --config=configs/qwen3_vl.py:folder=HF_DIR
"""

from lmm_jax import config, presets


def get_config(arg=None):
    a = config.parse(arg, folder="Qwen3-VL-2B-Instruct", pixels=1024 * 1024)
    c = presets.llava(language="-", vision="-")  # the folder brings the sizes
    c.name = "qwen3_vl"
    c.workdir = "runs/qwen3-vl"
    c.init.load = a.folder
    # Slots for patches are a capacity: larger images are scaled to this area.
    c.image.update(mode="native", max_pixels=a.pixels)
    c.text.update(tokenizer=a.folder, template="qwen3_vl", suffix=1024)
    c.train.learn = ("connector", "language", "strategy_taps")
    c.optim.lr = 1e-5
    return c
