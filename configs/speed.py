"""Is FastV faster? A random model of 60 M parameters, nearly all in its language stack.

python -m lmm_jax.bench --config=configs/speed.py --train
"""

from lmm_jax import config, presets


def get_config(arg=None):
    a = config.parse(arg, layer=2, keep=576)
    c = presets.llava(language="speed-lm", vision="speed-vit")
    c.name = "speed"
    c.workdir = "runs/speed"
    c.model.remat, c.model.unroll = "none", 0  # XLA on CPU runs unrolled layers faster
    c.text.update(tokenizer="characters", prefix=0, suffix=64)
    c.eval.suffix = 64
    if a.keep < 576:
        c.strategy.fastv = dict(layer=a.layer, keep=a.keep)
    c.data.batch_size = 1
    c.bench.variants = (":keep=288", ":keep=144", ":keep=58")
    return c
