"""What does tuning a quarter of the layers save? A random Llama of 230 M parameters.

    python -m lmm_jax.bench --config=configs/speed_region.py --train

Eight layers of Qwen2-1.5B's width behind 576 patches: all of them learn, or two, spread or
on top; the last without the projector, so that the backward pass ends at the lower one.
"""

from lmm_jax import config, presets, region
from lmm_jax.models.specs import named


def get_config(arg=None):
    a = config.parse(arg, layers="all", projector=True)
    c = presets.llava(language="speed-region", vision="speed-vit")
    c.name = "speed"
    c.workdir = "runs/speed-region"
    c.model.remat = "none"  # loops stay loops: unrolled, XLA on CPU copies every layer
    c.text.update(tokenizer="characters", prefix=0, suffix=64)
    c.eval.suffix = 64
    layers = region.select(a.layers, named("language", "speed-region").depth)
    learn = (region.pattern(layers),) if layers else ()
    c.train.learn = ("connector", *learn) if a.projector else learn
    c.data.batch_size = 1
    c.bench.variants = (":layers=uniform", ":layers=top", ":layers=top,projector=false")
    return c
