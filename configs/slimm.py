"""SliMM (github.com/MengLcool/SliMM): follow-ups of DeepStack without hi-res views.

python -m lmm_jax.depth.plan --config=configs/slimm.py:form=e
python -m lmm_jax.train --config=configs/slimm.py:form=m,stage=pretrain
python -m lmm_jax.train --config=configs/slimm.py:form=m,stage=middle \\
    --config.init.run=runs/slimm_m-qwen2-0.5b-pretrain
python -m lmm_jax.train --config=configs/slimm.py:form=m \\
    --config.init.run=runs/slimm_m-qwen2-0.5b-middle

`form=m` stacks inner vision layers, `form=v1` single patches, `form=e` merged tokens on a
quarter of them. Rates and lengths are those of its 0.5 B model, whose tower is Qwen2-VL's;
ours is CLIP-L, with the layers at the same shares of its depth.
"""

from lmm_jax import config, presets

FORMS = {  # arguments, names of what they learn, tokens in the context
    "m": (dict(taps=(5, 11, 17, 21)), ("slimm_merger", "slimm_m"), 144),
    "v1": (dict(), ("slimm_merger", "slimm_v1"), 144),
    "e": (dict(), ("slimm_e_context", "slimm_e"), 36),
}
# File and examples of LLaVA-OneVision's sets; their mixtures are not published as one file.
DATA = {
    "middle": ("llava_onevision_mid", 4_000_000),
    "finetune": ("llava_onevision_single", 3_200_000),
}


def get_config(arg=None):
    a = config.parse(
        arg, form="m", lm="qwen2-0.5b", stage="finetune", start=1, interval=1
    )
    if a.form not in FORMS:
        raise ValueError(f"form={a.form!r}: use one of {', '.join(FORMS)}.")
    if a.stage not in ("pretrain", *DATA):
        raise ValueError(f"stage={a.stage!r}: use one of pretrain, {', '.join(DATA)}.")
    arguments, learned, tokens = FORMS[a.form]
    mergers = tuple(f"strategy_{name}" for name in learned)
    preset = "pretrain" if a.stage == "pretrain" else "finetune"
    c = presets.llava(language=a.lm, stage=preset)
    c.name = f"slimm_{a.form}"
    c.workdir = f"runs/{c.name}-{a.lm}-{a.stage}"
    c.image.mode = "stretch"
    c.strategy[c.name] = dict(start=a.start, interval=a.interval, **arguments)
    c.train.learn = mergers  # they are the connector
    if a.stage == "pretrain":
        return c
    file, examples = DATA[a.stage]
    c.data.sources = (dict(path=f"data/{file}.json", images="data/images"),)
    c.data.batch_size = 256  # that of the first stage; the others' is not published
    c.train.steps = examples // c.data.batch_size
    c.text.suffix = 4096 - tokens - c.text.prefix
    c.train.learn = (*mergers, "language")
    if a.stage == "finetune":
        c.train.learn = (*c.train.learn, "vision")
        c.optim.lr = 1e-5
        c.optim.lr_scale.vision = 1e-6 / c.optim.lr
    for name in mergers:
        c.optim.lr_scale[name] = 5e-3 / c.optim.lr
    return c
