"""The numbers of the configs beside those of the papers and their published scripts."""

from __future__ import annotations

import math

import jax
import pytest

from lmm_jax import optim, region, train
from lmm_jax.partition import flatten
from tests.test_full_size import build

COMMON = dict(
    b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, warmup_ratio=0.03, final_lr_ratio=0.0
)

# LLaVA-1.5 (arXiv:2310.03744, table 9; scripts/v1_5 of its repository).
LLAVA = {
    "stage=pretrain": dict(
        records=558_128,
        batch=256,
        lr=1e-3,
        connector_lr=1e-3,
        learn={"connector"},
        template="plain",
        image="crop",
        group="none",
    ),
    "stage=finetune": dict(
        records=665_298,
        batch=128,
        lr=2e-5,
        connector_lr=2e-5,
        learn={"connector", "language"},
        template="vicuna_v1",
        image="pad",
        group="modality_length",
    ),
    "stage=finetune-lora": dict(
        records=665_298,
        batch=128,
        lr=2e-4,
        connector_lr=2e-5,
        learn={"connector", "language"},
        template="vicuna_v1",
        image="pad",
        group="modality_length",
        lora=(128, 256.0, 0.05),
    ),
}
# Bunny (arXiv:2402.11530, and the scripts of its repository).
_TUNE = dict(batch=128, image="pad", group="none", records=695_000)
_ALIGN = dict(
    batch=256,
    image="stretch",
    group="none",
    records=2_000_000,
    learn={"connector"},
    template="plain",
)
_LORA = dict(learn={"connector", "language"}, lora=(128, 256.0, 0.05))
_TOWER = dict(
    learn={"connector", "language", "vision"},
    lora=(128, 256.0, 0.05),
    records=1_400_000,
)
_PHI, _LLAMA = dict(template="bunny"), dict(template="bunny_llama_3")
BUNNY = {
    "lm=phi-2,stage=pretrain": dict(_ALIGN, lr=5e-4, connector_lr=5e-4),
    "lm=llama-3-8b,stage=pretrain": dict(_ALIGN, lr=1e-3, connector_lr=1e-3),
    "lm=phi-3-mini,stage=pretrain": dict(_ALIGN, lr=1e-3, connector_lr=1e-3),
    "lm=phi-2": _TUNE | _LORA | _PHI | dict(lr=2e-4, connector_lr=2e-5),
    "lm=llama-3-8b": _TUNE | _LORA | _LLAMA | dict(lr=2e-4, connector_lr=2e-5),
    "lm=phi-3-mini": _TUNE
    | _LORA
    | _PHI
    | dict(lr=2e-4, connector_lr=2e-5, length=4096),
    "lm=llama-3-8b,tower=true": _TUNE
    | _TOWER
    | _LLAMA
    | dict(lr=1e-4, connector_lr=1e-5),
    "lm=phi-2,stage=finetune": _TUNE
    | _PHI
    | dict(lr=2e-5, connector_lr=2e-5, learn={"connector", "language"}),
}
# DeepStack (arXiv:2406.04334, Table 10): LLaVA's data and rates, and a tower that learns.
_TOWER_TOO = dict(learn={"connector", "language", "vision"}, vision_lr=2e-6)
_STACKED = LLAVA["stage=finetune"] | dict(image="stretch")
_HD = dict(
    learn={"connector", "language", "vision", "strategy_anyres"},
    vision_lr=2e-6,
    records=748_000,
    length=4096,
)
_CHATML = dict(template="chatml")
DEEPSTACK = {
    "stage=pretrain": LLAVA["stage=pretrain"] | dict(image="stretch"),
    "form=l": _STACKED,
    "form=l,tower=true": _STACKED | _TOWER_TOO,
    "form=l,lm=phi-3-mini": _STACKED | dict(template="phi3_instruct"),
    "form=l,lm=qwen2-7b": _STACKED | _CHATML,
    "form=v": _STACKED | _TOWER_TOO,
    "form=v,stage=pretrain": LLAVA["stage=pretrain"] | dict(image="stretch"),
    "form=v,lm=vicuna-13b": _STACKED | _TOWER_TOO,
    "form=v,lm=qwen3-8b": _STACKED | _TOWER_TOO | _CHATML,
    "form=hd": _STACKED | _HD,
    "form=hd,lm=vicuna-13b": _STACKED | _HD,
    "form=hd,lm=phi-3-mini": _STACKED | _HD | dict(template="phi3_instruct"),
    "form=hd,lm=qwen2-7b": _STACKED | _HD | _CHATML,
}
# SliMM (scripts of its repository): LLaVA-OneVision's data, and mergers that learn fast.
_FAST = {
    f"strategy_slimm_{name}_lr": 5e-3
    for name in ("merger", "m", "v1", "e", "e_context")
}
_SLIMM = (
    _CHATML
    | _FAST
    | dict(batch=256, image="stretch", group="modality_length", length=4096)
)
SLIMM = {
    "form=v1,stage=pretrain": LLAVA["stage=pretrain"]
    | dict(image="stretch", learn={"strategy_slimm_merger", "strategy_slimm_v1"}),
    "form=e,stage=middle": _SLIMM
    | dict(
        records=4_000_000,
        lr=2e-5,
        learn={"strategy_slimm_e_context", "strategy_slimm_e", "language"},
    ),
    "form=m": _SLIMM
    | dict(
        records=3_200_000,
        lr=1e-5,
        vision_lr=1e-6,
        learn={"strategy_slimm_merger", "strategy_slimm_m", "language", "vision"},
    ),
}
# FlashSloth (arXiv:2412.04317; scripts of its repository): LLaVA's data and rates.
_POOLED = dict(image="stretch", learn={"connector", "strategy_flashsloth_pool"})
_TOLD = dict(
    image="stretch",
    template="flashsloth",
    learn={
        "connector",
        "language",
        "strategy_flashsloth_pool",
        "strategy_flashsloth_query",
    },
    length=3072 + 81,
)
FLASHSLOTH = {
    "stage=pretrain": LLAVA["stage=pretrain"] | _POOLED,
    "stage=finetune": LLAVA["stage=finetune"] | _TOLD,
    "hd=true": LLAVA["stage=finetune"]
    | _TOLD
    | dict(image="quadrants", length=3072 + 405),
    "queries=0,pool=average": LLAVA["stage=finetune"]
    | _TOLD
    | dict(learn={"connector", "language"}),
}
TABLE = [
    *(("llava", f"lm={lm},{a}", n) for lm in ("vicuna-7b", "vicuna-13b")
      for a, n in LLAVA.items()),
    *(("bunny", argument, n) for argument, n in BUNNY.items()),
    *(("deepstack", argument, n) for argument, n in DEEPSTACK.items()),
    *(("flashsloth", argument, n) for argument, n in FLASHSLOTH.items()),
    *(("slimm", argument, n) for argument, n in SLIMM.items()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "argument", "numbers"), TABLE)
def test_hyper_parameters(name, argument, numbers):
    exp = build(name, argument)
    c, o = exp.config, exp.config.optim
    assert {field: getattr(o, field) for field in COMMON} == COMMON
    assert (o.schedule, o.clip) == ("cosine", None)
    assert c.train.seed == c.data.seed == 42
    assert c.model.remat == "full"
    assert o.lr == numbers["lr"]
    assert c.data.batch_size == numbers["batch"]
    assert c.train.steps == math.ceil(numbers["records"] / numbers["batch"])
    assert c.text.template == numbers["template"]
    assert c.image.mode == numbers["image"]
    assert c.data.group == numbers["group"]

    tuned = c.lora
    rank = (tuned.rank, tuned.alpha, tuned.dropout) if tuned.rank else None
    assert rank == numbers.get("lora")
    learning = train.make_parts(exp).abstract_state.learning
    assert set(learning) == numbers["learn"]
    whole = not tuned.rank and "language" in numbers["learn"]
    embeds = any(path.startswith("language/embed") for path in flatten(learning))
    assert embeds == whole

    factors = flatten(optim.lr_factors(o, learning))
    rates = {
        part: {factors[path] * o.lr for path in factors if path.startswith(part)}
        for part in learning
    }
    for part, found in rates.items():
        (rate,) = found
        assert rate == pytest.approx(numbers.get(f"{part}_lr", numbers["lr"]))

    if c.text.template != "plain":
        plan = exp.plan(train=True)
        assert plan.entrance.length == numbers.get("length", 2048)


def test_deepstack_hd_has_no_stage_before_finetuning():
    with pytest.raises(ValueError, match=r"finetuned from a LLaVA-NeXT; .*init\.load"):
        build("deepstack", "form=hd,stage=pretrain")


# Visual Region (arXiv:2412.12785): parameters of the adapters, by hand, and of projectors.
REGION = {
    "lm=vicuna-7b": (79_953_920, 20_979_712, "vicuna_v1", 665_298),
    "lm=vicuna-13b": (112_656_384, 31_467_520, "vicuna_v1", 665_298),
    "lm=llama-3-8b": (83_886_080, 21_504_000, "bunny_llama_3", 695_000),
    # Theirs are 50,331,648: of fused projections.
    "lm=phi-3-mini": (59_768_832, 12_982_272, "bunny", 695_000),
}


@pytest.mark.parametrize(("argument", "numbers"), REGION.items())
def test_hyper_parameters_of_visual_region(argument, numbers):
    adapters, projector, template, records = numbers
    exp = build("visual_region", argument)
    c, o = exp.config, exp.config.optim
    assert {field: getattr(o, field) for field in COMMON} == COMMON
    assert (o.schedule, o.clip, o.lr) == ("cosine", None, 2e-4)
    assert o.lr_scale["connector"] * o.lr == pytest.approx(2e-5)
    assert c.train.seed == c.data.seed == 234
    assert (c.lora.rank, c.lora.alpha, c.lora.dropout) == (128, 256.0, 0.05)
    assert (c.data.batch_size, c.data.group, c.image.mode) == (128, "none", "pad")
    assert c.train.steps == math.ceil(records / 128)
    assert c.text.template == template
    assert exp.plan(train=True).entrance.length == 2048
    learning = train.make_parts(exp).abstract_state.learning
    sizes = {n: sum(x.size for x in jax.tree.leaves(t)) for n, t in learning.items()}
    assert sizes == {"language": adapters, "connector": projector}
    few = region.select("uniform", exp.spec.language.depth, len(c.lora.layers))
    assert c.lora.layers == few


def test_lora_adapts_every_projection_and_not_the_head():
    exp = build("llava", "stage=finetune-lora")
    names = exp.model(train=True).spec.language.block.lora.names
    assert names == ("down", "gate", "k", "o", "q", "up", "v")


# PuMer (arXiv:2305.17530; the configs of its repository): examples, batch, peak rate, and
# factors on the rates of the head and of the layers in which two streams meet.
_VILT = dict(lr=1e-4, head=10.0, layers=(2, 5, 8), prune=0.1, merge=0.3, side=384)
_METER = dict(lr=5e-6, head=50.0, cross=5.0, side=384, layers=(0, 1, 2, 3))
_VQA = dict(records=443_757, text=32)
_NLVR2 = dict(records=86_373, text=40)
_ENTAILS = dict(records=529_527, text=40)
_RANKS = dict(records=145_000, text=40, head=1.0)
_MORE = dict(prune=0.3, merge=0.5)
PUMER = {
    "model=vilt,task=vqav2": _VILT | _VQA | dict(batch=512),
    "model=vilt,task=nlvr2": _VILT | _NLVR2 | dict(batch=256),
    "model=vilt,task=snli_ve": _VILT | _ENTAILS | dict(batch=512, layers=(2, 4, 6, 8)),
    "model=vilt,task=flickr30k": _VILT | _RANKS | dict(batch=256),
    "model=meter,task=vqav2": _METER
    | _VQA
    | dict(batch=256, whole=192, prune=0.2, merge=0.2),
    "model=meter,task=nlvr2": _METER
    | _NLVR2
    | _MORE
    | dict(batch=96, layers=(1, 2, 3), side=288),
    "model=meter,task=snli_ve": _METER
    | _ENTAILS
    | _MORE
    | dict(batch=192, lr=2e-6, head=10.0),
    "model=meter,task=flickr30k": _METER
    | _RANKS
    | dict(batch=192, prune=0.2, merge=0.2),
}


@pytest.mark.parametrize("reduced", [True, False])
@pytest.mark.parametrize(("argument", "numbers"), PUMER.items())
def test_hyper_parameters_of_encoders(argument, numbers, reduced):
    exp = build("pumer", f"{argument},reduce={reduced}")
    c, o = exp.config, exp.config.optim
    known = dict(b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.01, warmup_ratio=0.1)
    assert {field: getattr(o, field) for field in known} == known
    assert (o.schedule, o.clip, o.lr) == ("linear", None, numbers["lr"])
    assert o.lr * o.final_lr_ratio == pytest.approx(1e-7)
    batch = numbers["batch"] if reduced else numbers.get("whole", numbers["batch"])
    epochs = 20 if reduced else 10
    assert c.data.batch_size == batch
    assert c.train.steps == pytest.approx(epochs * numbers["records"] / batch, abs=0.5)
    assert (c.text.prefix, exp.spec.vision.image) == (numbers["text"], numbers["side"])
    assert (c.task.scale, c.task.distill, c.task.temperature) == (1.0, 1.0, 1.0)
    assert (c.task.negatives, c.task.augment) == (15, True)
    shares = {name: numbers[name] for name in ("layers", "prune", "merge")}
    chosen = {"pumer": dict(shares, text=0.2, preset="safe")} if reduced else {}
    assert c.strategy == chosen

    learning = train.make_parts(exp).abstract_state.learning
    assert set(learning) == set(exp.abstract_params(exp.model(train=True)))
    factors = flatten(optim.lr_factors(o, learning))
    crossing = ("stack", "text_in", "image_in", "text_pooler", "image_pooler")
    for path, factor in factors.items():
        part = path.split("/")[0]
        expected = numbers["head"] if part == "head" else 1.0
        if part in crossing:
            expected = numbers.get("cross", 1.0)
        assert factor == expected, path
