"""DeepStack's ablations (arXiv:2406.04334, Tables 4 to 7, Figure 3) on generated documents.

    python -m lmm_jax.compare --config=configs/ablations.py --seeds=3

All start from one model that has learned to read small print from hi-res tokens in its
context, and learn for 150 steps what their own arrangement of these tokens asks for. Six
language layers and three vision layers bound the places.
"""

from lmm_jax import config, presets

BASE = "read"
ARRANGEMENTS = {
    BASE: {"llava_hires": {}},
    "low-res": {"llava": {}},
    "sequence": {"llava_hires": {}},
    "dummy": {"deepstack_whole": {"start": 0, "groups": 4}},
    "depth": {"deepstack": {"start": 0}},
    "start-1": {"deepstack": {"start": 1}},
    "start-2": {"deepstack": {"start": 2}},
    "interval-2": {"deepstack": {"start": 0, "interval": 2}},
    "groups-1": {"deepstack": {"start": 0, "groups": 1}},
    "groups-2": {"deepstack": {"start": 0, "groups": 2}},
    "order-1d": {"deepstack": {"start": 0, "order": "1d"}},
    "order-grid": {"deepstack": {"start": 0, "order": "grid"}},
    "vision": {"deepstack_v": {"start": 0}},
}
WITHOUT_VIEWS = {"llava", "deepstack_whole"}  # they read the whole image only


def get_config(arg=None):
    a = config.parse(arg, strategy="depth", steps=150, base_steps=800, seed=0)
    if a.strategy not in ARRANGEMENTS:
        raise ValueError(
            f"strategy={a.strategy!r}: use one of {', '.join(ARRANGEMENTS)}."
        )
    steps = a.base_steps if a.strategy == BASE else a.steps
    c = presets.documents(steps=steps, seed=a.seed)
    c.name = a.strategy
    c.workdir = f"runs/ablations-{a.strategy}"
    if not WITHOUT_VIEWS & set(ARRANGEMENTS[a.strategy]):
        presets.hires_views(c, 4, grid="square")
    c.strategy.update(ARRANGEMENTS[a.strategy])
    names = tuple(name for name in ARRANGEMENTS if name != BASE)
    c.compare.update(strategies=names, base=BASE, category="hires")
    return c
