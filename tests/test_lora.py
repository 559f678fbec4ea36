"""Low-rank adaptation: nothing at first, the same merged, and alone in learning."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lmm_jax import convert, experiment, hub, partition, train, weights
from lmm_jax.checkpoint.params import check_rows, flatten
from lmm_jax.depth import Tune, make_plan
from lmm_jax.lora import LEARNS, LoraConfig, merged
from lmm_jax.models import lmm
from lmm_jax.nn.lora import NOISE, Lora, LoraLinear
from tests.small import small_config
from tests.test_full_size import build
from tests.test_train import command, final, interrupt, same
from tests.tiny import SPEC

CONFIG = LoraConfig(rank=3, alpha=7.0, dropout=0.25)
ADAPTED = CONFIG.applied(SPEC)


def adapted(tiny, *, fresh: bool):
    """Tiny's parameters with adapters beside; B is zero where they are fresh."""
    model = lmm.LMM(ADAPTED, tiny.plan())
    params = flatten(jax.jit(lambda key: lmm.init(model, key))(jax.random.key(1)))
    params |= flatten(tiny.params)
    if not fresh:
        rng = np.random.default_rng(0)
        for path in partition.matching(LEARNS, params):
            shape = params[path].shape
            params[path] = rng.normal(size=shape).astype(np.float32) * 0.1
    return traverse_util.unflatten_dict(params, sep="/")


@functools.partial(jax.jit, static_argnums=0)
def scored(model, params, batch, rng=None):
    return model.apply({"params": params}, batch, rng, method="score")[0]


@pytest.mark.parametrize("strategy", ["deepstack", "fastv"])
def test_fresh_adapters_change_nothing_bit_for_bit(tiny, strategy):
    plan = tiny.plan(tiny.strategy(strategy))
    batch, params = tiny.batch(plan), adapted(tiny, fresh=True)
    plain = scored(lmm.LMM(SPEC, plan), tiny.params, batch)
    noisy = scored(lmm.LMM(ADAPTED, plan), params, batch, jax.random.key(3))
    np.testing.assert_array_equal(noisy, plain)


@pytest.mark.parametrize("strategy", ["deepstack", "fastv"])
def test_merged_equals_beside(tiny, strategy):
    plan = tiny.plan(tiny.strategy(strategy))
    batch, params = tiny.batch(plan), adapted(tiny, fresh=False)
    beside = scored(lmm.LMM(ADAPTED, plan), params, batch)
    plain = scored(
        lmm.LMM(SPEC, plan), merged(params, ADAPTED.language.block.lora), batch
    )
    base = scored(lmm.LMM(SPEC, plan), tiny.params, batch)
    scale = np.abs(plain).max()
    np.testing.assert_allclose(beside, plain, rtol=0, atol=1e-5 * scale)
    assert np.abs(base - plain).max() > 1e-2 * scale


def test_every_layer_and_projection_drops_on_its_own(tiny):
    """With dropout the logits are random, and those of a key do not depend on the plan."""
    batch, params = tiny.batch(tiny.plan()), adapted(tiny, fresh=False)
    keys = [jax.random.key(i) for i in (0, 0, 1)]
    one_scan = lmm.LMM(ADAPTED, tiny.plan())
    first, again, other = (scored(one_scan, params, batch, key) for key in keys)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    # A cut that keeps everything splits the scan in three.
    kept = tiny.plan(tiny.strategy("fastv", layer=2, keep=32))
    cut = scored(lmm.LMM(ADAPTED, kept), params, batch, keys[0])
    valid = batch["valid"] & (batch["positions"] > 0)
    np.testing.assert_allclose(
        np.asarray(cut)[valid], np.asarray(first)[valid], atol=2e-5
    )


def test_dropout_acts_on_the_input_of_the_adapter_alone():
    x = jnp.ones((4096, 8))
    spec = Lora(rank=2, alpha=4.0, dropout=0.25, names=())
    layer = LoraLinear((8,), (5,), False, "float32", lora=spec)
    params = layer.init(jax.random.key(0), x)["params"]
    params["lora_a"], params["lora_b"] = jnp.eye(8, 2), jnp.eye(2, 5)

    def run(**rngs):
        y = layer.apply({"params": params}, x, rngs=rngs)
        return np.asarray(y - x @ params["kernel"])

    added = run(**{NOISE: jax.random.key(1)})
    values = np.unique(added[:, :2].round(4))
    np.testing.assert_allclose(values, [0, 2 / 0.75], atol=1e-3)
    np.testing.assert_allclose((added[:, :2] == 0).mean(), 0.25, atol=0.02)
    assert not added[:, 2:].any()
    np.testing.assert_allclose(run()[:, :2], 2.0, rtol=1e-5)


def test_a_starts_kaiming_uniform_and_b_at_zero():
    spec = Lora(rank=16, alpha=4.0, dropout=0.0, names=())
    layer = LoraLinear((4, 25), (6,), False, "float32", "bfloat16", lora=spec)
    params = layer.init(jax.random.key(0), jnp.ones((1, 4, 25)))["params"]
    a = params["lora_a"]
    assert params["kernel"].dtype == jnp.bfloat16 and a.dtype == jnp.float32
    assert a.shape == (4, 25, 16) and params["lora_b"].shape == (16, 6)
    assert not params["lora_b"].any()
    np.testing.assert_allclose(np.abs(a).max(), 0.1, rtol=0.01)  # 1 / sqrt(100)
    np.testing.assert_allclose(np.std(a), 0.1 / math.sqrt(3), rtol=0.05)


def test_adapters_of_few_layers_are_rows_of_those_of_all(tiny):
    """Along a plan that gives them scans of their own, and along one that does not."""
    layers = (1, 2, 4)
    few = dataclasses.replace(CONFIG, layers=layers).applied(SPEC)
    params, rows = flatten(adapted(tiny, fresh=False)), {}
    for path in partition.matching(LEARNS, params):
        rows[path] = params[path][np.array(layers)]
        others = [i for i in range(SPEC.language.depth) if i not in layers]
        params[path][np.array(others)] = 0
    whole, part = (
        traverse_util.unflatten_dict(x, sep="/") for x in (params, params | rows)
    )
    batch, key = tiny.batch(tiny.plan()), jax.random.key(3)
    right = scored(lmm.LMM(ADAPTED, tiny.plan()), whole, batch, key)
    for plan in (tiny.plan((Tune("language", layers),)), tiny.plan()):
        found = scored(lmm.LMM(few, plan), part, batch, key)
        np.testing.assert_allclose(
            found, right, rtol=0, atol=1e-5 * np.abs(right).max()
        )
    same(
        merged(part, few.language.block.lora),
        merged(whole, ADAPTED.language.block.lora),
    )
    own = {name: x for name, x in part.items() if not name.startswith("strategy_")}
    check_rows(lmm.params(few), own)


PHI = dataclasses.replace(
    SPEC.language.block, norm="layer", bias="all", gated=False, parallel=True
)


@pytest.mark.parametrize("block", [SPEC.language.block, PHI], ids=["llama", "phi"])
def test_rows_and_parameters_match_one_to_one(block):
    language = dataclasses.replace(SPEC.language, block=block)
    spec = CONFIG.applied(dataclasses.replace(SPEC, language=language))
    sizes = lmm.geometry(spec, images=1, crops=0, prefix=0, suffix=4)
    model = lmm.LMM(spec, make_plan(sizes, ()))
    abstract = jax.eval_shape(lambda key: lmm.init(model, key), jax.random.key(0))
    check_rows(lmm.params(spec), abstract)
    kernels = partition.matching(r"language/stack/.*/kernel", flatten(abstract))
    assert len(partition.matching(LEARNS, flatten(abstract))) == 2 * len(kernels)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("language",), ("down", "gate", "k", "o", "q", "up", "v")),
        (("language/.*/(q|v)",), ("q", "v")),
        (("language/.*/q", "language/.*/up"), ("q", "up")),
    ],
)
def test_targets(targets, names):
    spec = LoraConfig(rank=2, targets=targets).applied(SPEC)
    assert spec.language.block.lora.names == names


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(targets=("language/.*/query",)), "matches no parameter"),
        (dict(targets=("vision",)), "tree starts with: language/stack"),
        (dict(rank=-1), "rank=-1 must be at least 0"),
        (dict(dropout=1.0), r"dropout=1.0 in \[0, 1\)"),
        (dict(layers=(1, 6)), r"layers \[6\] of \[1, 6\] .* use 0..5"),
        (dict(layers=(4, 1)), "must ascend"),
    ],
)
def test_what_cannot_be_adapted(fields, says):
    with pytest.raises(ValueError, match=says):
        LoraConfig(**dict(rank=2) | fields).applied(SPEC)


# --- Training -----------------------------------------------------------------------


def lora_config(folder: Path, **fields):
    config = small_config(folder, "llava", steps=4, learn=("connector",), **fields)
    config.lora.update(rank=3, alpha=6.0, dropout=0.1)
    config.optim.lr_scale = {"connector": 0.1}
    config.checkpoint.every = 2
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    config = lora_config(tmp_path_factory.mktemp("lora"))
    train.train(config)
    return config


def test_the_base_has_no_optimizer_state_and_does_not_move(whole):
    exp = experiment.build(whole)
    parts = train.make_parts(exp)
    learning = parts.abstract_state.learning
    assert set(learning) == {"connector", "language"}
    assert not partition.matching("language/.*/kernel", flatten(learning))
    moments = sum(x.size for x in jax.tree.leaves(parts.abstract_state.opt_state))
    assert moments < 2 * sum(x.size for x in jax.tree.leaves(learning)) + 10

    start, frozen = train.initial_state(exp, parts)
    before = partition.join(start.learning, frozen, parts.selection)
    after = final(whole)  # merged
    same(after["vision"], before["vision"])
    same(after["language"]["embed"], before["language"]["embed"])
    layers = [p["language"]["stack"]["layers"] for p in (before, after)]
    for name, part in layers[1].items():
        moved = np.abs(part.get("kernel", 0) - layers[0][name].get("kernel", 0)).max()
        assert (moved > 0) == (name in ADAPTED.language.block.lora.names), name
    first = [p["connector"]["first"]["kernel"] for p in (before, after)]
    assert np.abs(first[0] - first[1]).max() > 0


def test_resuming_equals_no_interruption_bit_for_bit(whole, tmp_path, monkeypatch):
    config = lora_config(tmp_path)
    interrupt(monkeypatch, at=4)
    with pytest.raises(KeyboardInterrupt):
        train.train(config)
    monkeypatch.undo()
    train.train(config)
    same(final(config), final(whole))


def test_another_stage_starts_from_merged_weights(whole, tmp_path):
    """A plain run and a second LoRA run both see the model that was trained."""
    trained = final(whole)
    plain = small_config(tmp_path, "llava")
    again = lora_config(tmp_path)
    for config in (plain, again):
        config.init.run = whole.workdir
        exp = experiment.build(config)
        model = exp.model(train=True)
        start = jax.device_get(weights.initial(exp, model))
        same(merged(start, model.spec.language.block.lora), trained)
    assert not flatten(start)["language/stack/layers/q/lora_b"].any()


def test_a_run_is_exported_merged_or_as_an_adapter(whole, tmp_path):
    convert.to_hub(whole.workdir, tmp_path / "hf")
    folder, spec = hub.Folder(tmp_path / "hf"), hub.lmm_spec(tmp_path / "hf")
    trained = final(whole)
    same(hub.load(folder, spec, trained), trained)

    to = tmp_path / "adapter"
    flags = (f"--from={whole.workdir}", f"--to={to}", "--adapter", "--base=some/llava")
    done = command("lmm_jax.convert", *flags)
    assert done.returncode == 0, done.stderr
    config = json.loads((to / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 6.0)
    assert config["base_model_name_or_path"] == "some/llava"
    assert config["modules_to_save"] == ["multi_modal_projector"]
    tensors = load_file(to / "adapter_model.safetensors")
    layer = "base_model.model.model.language_model.layers.5.mlp.down_proj"
    assert tensors[f"{layer}.lora_A.weight"].shape == (3, 96)
    assert tensors[f"{layer}.lora_B.weight"].shape == (48, 3)
    assert len(tensors) == 6 * 7 * 2 + 4  # and the projector


def test_adapters_of_few_layers_are_all_that_is_trained_kept_and_exported(tmp_path):
    config = lora_config(tmp_path)
    config.lora.layers = (1, 4)
    config.train.steps = 2
    train.train(config)
    exp = experiment.build(config)
    parts = train.make_parts(exp)
    rows = flatten(parts.abstract_state.learning)
    a, connector = rows["language/stack/layers/q/lora_a"], "connector/first/kernel"
    assert a.shape == (2, 48, 3)
    moments = sum(x.size for x in jax.tree.leaves(parts.abstract_state.opt_state))
    assert moments < 2 * sum(x.size for x in rows.values()) + 10
    assert not partition.matching(LEARNS, flatten(parts.abstract_frozen))
    assert [
        (step.start, step.stop) for step in parts.model.plan.language if step.learns
    ] == [(1, 2), (4, 5)]

    start, frozen = train.initial_state(exp, parts)
    start = partition.join(start.learning, frozen, parts.selection)
    before, after = flatten(start), flatten(final(config))
    for name in ADAPTED.language.block.lora.names:
        path = f"language/stack/layers/{name}/kernel"
        moved = np.abs(after[path] - before[path]).reshape(6, -1).max(axis=1) > 0
        assert list(np.flatnonzero(moved)) == [1, 4], name
    assert np.abs(after[connector] - before[connector]).max() > 0

    convert.to_adapter(config.workdir, tmp_path / "adapter", "some/llava")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    layers = {
        name.split(".layers.")[1].split(".")[0] for name in tensors if "lora" in name
    }
    assert layers == {"1", "4"}
    config.lora.layers = (1, 3)
    with pytest.raises(ValueError, match=r"holds a run with lora=.*\(1, 4\)"):
        train.train(config)


def test_a_workdir_with_other_adapters_is_refused(whole, tmp_path):
    config = lora_config(tmp_path)
    config.workdir, config.lora.rank = whole.workdir, 2
    with pytest.raises(ValueError, match="holds a run with lora="):
        train.train(config)


# --- Cost ---------------------------------------------------------------------------


def opt_bytes(exp) -> int:
    state = train.make_parts(exp).abstract_state
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state))


def test_optimizer_state_of_7b():
    """AdamW's two moments in float32: 54 GB for all, 2.7 GB for rank 128."""
    full = opt_bytes(build("llava", "stage=finetune"))
    exp = build("llava", "stage=finetune-lora")
    small = opt_bytes(exp)
    connector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    adapters = 32 * 128 * (4 * (4096 + 4096) + 3 * (4096 + 11_008))
    assert full == pytest.approx(8 * (6_738_415_616 + connector), abs=100)
    assert small == pytest.approx(8 * (adapters + connector), abs=100)
    # What is frozen takes two bytes (norms aside), what learns four.
    parts = train.make_parts(exp)
    frozen = jax.tree.leaves(parts.abstract_frozen)
    size = sum(x.size for x in frozen)
    stored = sum(x.size * x.dtype.itemsize for x in frozen)
    assert stored == pytest.approx(2 * size, rel=1e-3)
    learned = jax.tree.leaves(parts.abstract_state.learning)
    assert {x.dtype for x in learned} == {jnp.dtype("float32")}


def test_the_backward_pass_skips_the_gradients_of_frozen_kernels(tmp_path):
    flops, rows = {}, 2
    for rank in (0, 1):
        config = small_config(tmp_path, "llava")
        config.lora.update(rank=rank, dropout=0.0)
        config.train.learn = ("connector",) if rank else ("connector", "language")
        exp = experiment.build(config, (jax.devices()[0],))
        parts = train.make_parts(exp)
        batch = lmm.abstract_batch(parts.model, rows)
        lowered = parts.update.lower(parts.abstract_state, parts.abstract_frozen, batch)
        flops[rank] = lowered.cost_analysis()["flops"]
    # Of a scan the analysis counts one layer.
    kernels = partition.matching(
        "language/stack/.*/kernel", flatten(parts.abstract_frozen)
    )
    size = sum(flatten(parts.abstract_frozen)[k].size for k in kernels)
    tokens = rows * parts.model.plan.entrance.length
    assert flops[0] - flops[1] > 2 * tokens * size / SPEC.language.depth
