"""Every config at its real size, without its memory."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lmm_jax import experiment, train
from lmm_jax.decode import Generator
from lmm_jax.depth import Cut, Fold, Layer, Scan
from lmm_jax.models import encoders, lmm, specs

CONFIGS = Path(__file__).parents[1] / "configs"
ONE = (jax.devices()[0],)


def get_config(name: str, argument: str = ""):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


def build(name: str, argument: str = "") -> experiment.Experiment:
    return experiment.build(get_config(name, argument), ONE)


def traced_update(exp):
    parts = train.make_parts(exp)
    batch = lmm.abstract_batch(parts.model, 2)
    return parts, parts.update.trace(parts.abstract_state, parts.abstract_frozen, batch)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("deepstack", "lm=vicuna-7b"),
        ("deepstack", "lm=vicuna-13b"),
        ("deepstack", "form=v,lm=vicuna-7b"),
        ("deepstack", "form=v,lm=vicuna-13b"),
        ("deepstack", "form=hd,lm=vicuna-7b"),
        ("deepstack", "form=hd,lm=vicuna-13b"),
        ("deepstack", "lm=phi-3-mini"),
        ("deepstack", "lm=qwen3-8b"),
        ("slimm", "form=m,lm=qwen2-7b"),
        ("fastv", "lm=vicuna-7b"),
        ("llava", "lm=vicuna-7b,stage=pretrain"),
        ("llava", "lm=vicuna-13b,stage=finetune-lora"),
        ("bunny", "lm=phi-2"),
        ("bunny", "lm=llama-3-8b,tower=true"),
        ("bunny", "lm=phi-3-mini,stage=pretrain"),
        ("visual_region", "lm=vicuna-13b,mode=full"),
        ("visual_region", "lm=llama-3-8b,deepstack=true,keep=144"),
        ("speed_region", "layers=uniform"),
        ("region_documents", ""),
        ("llava_hires", ""),
        ("average_pool", ""),
        ("baselines", "strategy=random"),
        ("compose", ""),
        ("llava_next", ""),
        ("flashsloth", "stage=pretrain"),
        ("flashsloth", "hd=true"),
        ("quickstart", ""),
        ("speed", "keep=144"),
        *(("quickstart", f"strategy={s}") for s in ("llava", "llava_hires")),
    ],
)
def test_a_train_step_and_generation_trace(name, argument):
    exp = build(name, argument)
    parts, traced = traced_update(exp)
    state, scalars = traced.out_info
    assert jax.tree.structure(state) == jax.tree.structure(parts.abstract_state)
    assert scalars["loss"].shape == ()

    model = exp.model(train=False)
    params = exp.abstract_params(model)
    batch = lmm.abstract_batch(model, 2)
    answers = jax.eval_shape(Generator(model, 8, end=2), params, batch)
    assert answers.shape == (2, 8) and answers.dtype == jnp.int32


@pytest.mark.parametrize("task", ["vqav2", "nlvr2", "flickr30k"])
@pytest.mark.parametrize("model", ["vilt", "meter"])
def test_a_train_step_and_predictions_of_encoders_trace(model, task):
    """With a teacher, which is frozen and whole."""
    config = get_config("pumer", f"model={model},task={task}")
    config.data.batch_size, config.task.negatives = 2, 3
    config.init.teacher = "whole"
    exp = experiment.build(config, ONE)
    parts = train.make_parts(exp)
    batch = exp.abstract_batch(parts.model)
    assert set(parts.abstract_frozen) == {"teacher"}
    traced = parts.update.trace(parts.abstract_state, parts.abstract_frozen, batch)
    state, scalars = traced.out_info
    assert jax.tree.structure(state) == jax.tree.structure(parts.abstract_state)
    assert scalars["loss"].shape == ()
    assert "distillation" in scalars

    plain = exp.model(train=False)
    shown = encoders.abstract_batch(plain, 2)

    def logits(params, batch):
        return plain.apply({"params": params}, batch, method="score")[0]["logits"]

    found = jax.eval_shape(logits, exp.abstract_params(plain), shown)
    assert found.shape == (2, exp.spec.head.outputs)


def loops(text: str) -> int:
    return text.count("stablehlo.while")


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("llava", ""),
        ("deepstack", ""),
        ("deepstack", "form=v"),
        ("fastv", ""),
        ("compose", ""),
    ],
)
def test_one_loop_per_scan_of_the_plan_whatever_the_depth(name, argument):
    """Program size does not grow with depth: 7B's 32 layers and 12 give the same."""
    sizes = []
    for depth in (12, 32):
        exp = build(name, argument)
        language = dataclasses.replace(exp.spec.language, depth=depth)
        spec = dataclasses.replace(exp.spec, language=language)
        exp.__dict__["spec"] = spec  # the cached sizes
        model = exp.model(train=False)
        params = exp.abstract_params(model)
        batch = lmm.abstract_batch(model, 1)

        def run(params, batch, model=model):
            return model.apply({"params": params}, batch).state.hidden

        text = jax.jit(run).lower(params, batch).as_text()
        steps = (*model.plan.vision, *model.plan.language)
        scans = [step for step in steps if isinstance(step, Scan)]
        assert loops(text) == len(scans)
        sizes.append(text.count("\n"))
        assert all(isinstance(s, Scan | Layer | Cut | Fold) for s in steps)
    assert abs(sizes[1] - sizes[0]) < 0.03 * sizes[0]  # a slice more or less


def test_named_specs_agree_with_their_names():
    with pytest.raises(ValueError, match=r"not a named size; use one of .*vicuna-7b"):
        specs.named("language", "vicuna-8b")
