"""FlashSloth (arXiv:2412.04317): 81 visual tokens, or 405, and 9 that read the question.

python -m lmm_jax.depth.plan --config=configs/flashsloth.py:hd=true
python -m lmm_jax.train --config=configs/flashsloth.py:stage=pretrain
python -m lmm_jax.train --config=configs/flashsloth.py \\
    --config.init.run=runs/flashsloth-phi-2-pretrain

`hd=true` adds the quadrants of the image. `pool=average`, `pool=none`, `window` and
`queries=0` are ablations. The authors' code starts the pooling anew in the second stage;
here, as in their paper, it goes on from the first, unless `anew=true`. On 16 chips of TPU
v5e the second stage needs `--config.train.accumulate=8`: 10.3 of 16 GiB each.
"""

from lmm_jax import config, presets

FULL_STOP = {"phi-2": 764}  # " .", whose embedding the authors add to all queries


def get_config(arg=None):
    a = config.parse(
        arg,
        lm="phi-2",
        stage="finetune",
        hd=False,
        pool="attention",
        window=3,
        queries=9,
        layer=7,
        anew=False,
    )
    c = presets.llava(language=a.lm, vision="siglip-so400m-384", stage=a.stage)
    c.name = "flashsloth"
    c.workdir = f"runs/flashsloth-{a.lm}-{a.stage}" + ("-hd" if a.hd else "")
    c.strategy.flashsloth = dict(
        pool=a.pool,
        window=a.window,
        queries=a.queries,
        layer=a.layer,
        anchor=FULL_STOP.get(a.lm, -1),
    )
    c.image.mode = "quadrants" if a.hd else "stretch"
    c.image.crops = 4 if a.hd else 0
    c.text.prefix = 0
    if a.pool == "attention":
        c.train.learn = (*c.train.learn, "strategy_flashsloth_pool")
    if a.anew:
        c.init.fresh = ("strategy_flashsloth_pool",)
    if a.stage == "pretrain":
        return c  # behind a caption, queries could only change the end of its line
    if a.queries:
        c.train.learn = (*c.train.learn, "strategy_flashsloth_query")
    c.text.template = "flashsloth"
    c.text.suffix = 3072  # the authors' limit, too, does not count visual tokens
    return c
