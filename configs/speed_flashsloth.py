"""What does pooling save? A random Phi of 180 M parameters behind 729 patches.

    python -m lmm_jax.bench --config=configs/speed_flashsloth.py --train

FlashSloth's rows (arXiv:2412.04317): all patches in the context, the mean of 3 x 3 windows,
spatial attention pooling, and that with nine embedded queries.
"""

from lmm_jax import config, presets


def get_config(arg=None):
    a = config.parse(arg, pool="none", queries=0)
    c = presets.llava(language="speed-phi", vision="speed-vit")
    c.name = "speed"
    c.workdir = "runs/speed-flashsloth"
    c.model.update(image_size=384, remat="none", unroll=0)  # sooner on a CPU
    c.image.mode = "stretch"
    c.text.update(tokenizer="characters", prefix=0, suffix=64 + a.queries)
    c.eval.suffix = 64 + a.queries
    c.strategy.flashsloth = dict(pool=a.pool, queries=a.queries, layer=3)
    if a.pool == "attention":
        c.train.learn = (*c.train.learn, "strategy_flashsloth_pool")
    if a.queries:
        c.train.learn = (*c.train.learn, "strategy_flashsloth_query")
    c.data.batch_size = 1
    pooled = (":pool=average", ":pool=attention", ":pool=attention,queries=9")
    c.bench.variants = pooled
    return c
