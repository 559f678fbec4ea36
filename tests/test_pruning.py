"""Pruning: what is removed, what stays as it was, and who reads the result."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import transformers

from lmm_jax import convert, evaluate, experiment, hub, pruning, runs, train
from lmm_jax.depth import Plan
from lmm_jax.depth.cost import cost
from lmm_jax.pruning import keep_layers, revert_layers
from tests.hub.test_llava import IMAGE_TOKEN, compare, folder, ours
from tests.small import small_config
from tests.test_train import command, final, same
from tests.tiny import SPEC, Tiny

__all__ = ["folder"]  # a fixture

REGION = (1, 4)
DEPTH = SPEC.language.depth


# --- Which layers ---------------------------------------------------------------------

SCORES = np.array([0.5, 0.2, 0.2, 0.9, 0.1, 0.3])


def fixed(left, block):
    """The same scores whatever is left; of blocks, their sums."""
    return np.convolve(SCORES[list(left)], np.ones(block), "valid")


@pytest.mark.parametrize(
    ("mode", "count", "protect", "gone"),
    [
        ("independent", 0, (), ()),
        ("independent", 1, (), (4,)),
        ("independent", 2, (4,), (1, 2)),
        ("independent", 2, (2, 4), (1, 5)),
        ("independent", 4, REGION, (0, 2, 3, 5)),
        ("contiguous", 2, (), (1, 2)),
        ("contiguous", 2, REGION, (2, 3)),
        ("greedy", 2, (), (1, 4)),
        ("greedy", 3, REGION, (0, 2, 5)),
    ],
)
def test_the_least_needed_are_chosen(mode, count, protect, gone):
    assert pruning.choose(fixed, DEPTH, count, protect, mode) == gone


def test_greedy_scores_what_is_left():
    asked = []

    def score(left, block):
        asked.append(tuple(left))
        return np.array([abs(layer - 2.6) for layer in left])

    assert pruning.choose(score, 5, 3, (0,), "greedy") == (2, 3, 4)
    assert asked == [(0, 1, 2, 3, 4), (0, 1, 2, 4), (0, 1, 4)]


@pytest.mark.parametrize(
    ("mode", "count", "says"),
    [
        ("independent", 5, "5 layers to remove, but only 4 of 6 are not protected"),
        ("greedy", 5, "only 4 of 6"),
        ("contiguous", 3, r"no 3 layers side by side without one of \[1, 4\]"),
    ],
)
def test_protected_layers_are_never_removed(mode, count, says):
    with pytest.raises(ValueError, match=says):
        pruning.choose(fixed, DEPTH, count, REGION, mode)


def test_criteria_that_need_no_model():
    last = pruning.by_number(DEPTH, seed=0)["reverse_order"]
    assert pruning.choose(last, DEPTH, 2, (5,), "independent") == (3, 4)
    drawn = {
        pruning.choose(
            pruning.by_number(DEPTH, seed)["random"], DEPTH, 2, (), "independent"
        )
        for seed in range(8)
    }
    assert len(drawn) > 3


# --- What is left, in memory ----------------------------------------------------------


class Fewer(Tiny):
    """Tiny with some of its layers."""

    @classmethod
    def of(cls, tiny: Tiny, left) -> Fewer:
        language = tiny.geometry.language
        language = dataclasses.replace(language, depth=len(left))
        geometry = dataclasses.replace(tiny.geometry, language=language)
        return cls(geometry, keep_layers(tiny.params, left))

    def model(self, plan: Plan):
        left = range(self.geometry.language.depth)
        language = SPEC.language.left(left)
        return super().model(plan, dataclasses.replace(SPEC, language=language))


def with_layers(tiny: Tiny, change) -> Tiny:
    """The same with other kernels; `change` gets copies of them by name."""
    language = tiny.params["language"]
    layers = language["stack"]["layers"]
    kernels = {k: x["kernel"].copy() for k, x in layers.items() if "kernel" in x}
    change(kernels)
    layers = layers | {k: layers[k] | {"kernel": x} for k, x in kernels.items()}
    language = language | {"stack": {"layers": layers}}
    return dataclasses.replace(tiny, params=tiny.params | {"language": language})


def test_layers_that_do_nothing_may_go(tiny):
    def idle(kernels):
        for name in ("o", "down"):
            kernels[name][[2, 3]] = 0

    tiny = with_layers(tiny, idle)
    less = Fewer.of(tiny, [0, 1, 4, 5])
    batch = tiny.batch(tiny.plan())
    whole = tiny.logits(tiny.plan(), batch)
    np.testing.assert_array_equal(less.logits(less.plan(), batch), whole)


def test_decoding_without_layers_equals_the_whole_pass(tiny):
    less = Fewer.of(tiny, [0, 2, 3, 5])
    plan = less.plan()
    batch = less.batch(plan)
    found, slots = less.decoded(plan, batch, 3)
    whole = np.take_along_axis(less.logits(plan, batch), slots[..., None], axis=1)
    np.testing.assert_allclose(found, whole, atol=2e-4)


def test_no_layer_removed_or_all_reverted_is_the_identity(tiny):
    same(keep_layers(tiny.params, range(DEPTH)), tiny.params)
    assert SPEC.language.left(range(DEPTH)) == SPEC.language
    rng = np.random.default_rng(0)

    def noise(kernels):
        for name, x in kernels.items():
            kernels[name] = x + rng.normal(size=x.shape).astype(np.float32)

    tuned = with_layers(tiny, noise).params
    same(revert_layers(tuned, tiny.params, range(DEPTH)), tiny.params)
    some = revert_layers(tuned, tiny.params, [0, 3])
    same(keep_layers(some, [0, 3]), keep_layers(tiny.params, [0, 3]))
    same(keep_layers(some, [1, 2, 4, 5]), keep_layers(tuned, [1, 2, 4, 5]))
    # What was not tuned is what it was.
    same(revert_layers(some, tiny.params, [0, 3]), some)


def test_cost_and_cache_fall_by_the_share_of_layers(tiny):
    whole, less = (cost(Fewer.of(tiny, left).plan()) for left in (range(6), (0, 2, 5)))
    assert less.kv_bytes == whole.kv_bytes / 2
    assert less.language == pytest.approx(whole.language / 2)


def test_numbers_are_those_of_the_first_model():
    once = SPEC.language.left([0, 1, 3, 5], region=(1,))
    twice = once.left([0, 2, 3], region=once.region)
    assert twice == SPEC.language.left([0, 3, 5], region=(1,))
    assert pruning.indices(twice.numbers, ["5", "0"]) == (0, 2)
    with pytest.raises(ValueError, match="layers 1: there are 0,3,5"):
        pruning.indices(twice.numbers, ["1"])
    assert pruning.listed(twice.numbers, ["5"], (3,)) == (2,)
    with pytest.raises(ValueError, match=r"layers \[3\] are protected"):
        pruning.listed(twice.numbers, ["5", "3"], (3,))
    spec = dataclasses.replace(SPEC, language=twice)
    config = hub.model_config(spec, "llava")
    assert config["text_config"]["num_hidden_layers"] == 3
    assert hub.read_spec(config, "here") == spec
    config["text_config"]["num_hidden_layers"] = 4
    with pytest.raises(ValueError, match="keeps 3 layers, but num_hidden_layers is 4"):
        hub.read_spec(config, "here")


@pytest.mark.parametrize(
    ("strategy", "left", "says"),
    [
        ("fastv", [0, 1, 3, 4, 5], None),
        ("fastv", [0, 2, 3, 4, 5], r"fastv acts before or at layer 2, .*below \(0,1\)"),
        ("pumer", [0, 1, 2, 4, 5], r"pumer.*below \(0,1,2,3\)"),
        ("deepstack", [0, 1, 2, 3, 4], None),
        ("deepstack", [0, 1, 3, 4, 5], r"deepstack .*below \(0,1,2,3\)"),
        ("flashsloth", [0, 2, 3, 4, 5], r"flashsloth_query .*below \(0,1,2\)"),
        ("fastv", [0, 1], r"fastv.layer=2: .* use 1..1"),
    ],
)
def test_edits_stay_where_they_act_or_are_refused(tiny, strategy, left, says):
    def check():
        less = Fewer.of(tiny, left)
        edits = less.strategy(strategy)
        plan = tiny.plan(tiny.strategy(strategy))
        pruning.check_edits(plan, less.plan(edits), left)

    if says is None:
        check()
        return
    with pytest.raises(ValueError, match=says):
        check()


# --- On disk --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has tuned its region alone."""
    region = f"language/stack/layers[{REGION[0]},{REGION[1]}]"
    folder = tmp_path_factory.mktemp("region")
    config = small_config(folder, "llava", steps=2, learn=("connector", region))
    train.train(config)
    return config


@pytest.fixture(scope="module")
def less(run):
    """The directory of that run without two layers, and what the command said."""
    to = Path(run.workdir).parent / "less"
    flags = ("--count=2", "--mode=greedy", "--samples=9", f"--to={to}")
    done = command("lmm_jax.prune", f"--config.workdir={run.workdir}", *flags)
    assert done.returncode == 0, done.stderr
    return to, done.stdout


def test_a_pruned_run_is_a_run(run, less):
    to, said = less
    config = runs.load_run(to)
    kept = json.loads((to / "sizes.json").read_text())["lmm_jax"]["kept_layers"]
    assert len(kept) == 4 and set(REGION) <= set(kept)
    assert "0..3" in said and f"4 layers, {', '.join(map(str, kept))}" in said
    same(final(config), keep_layers(final(run), kept))
    config.eval.update(limit=2, max_new_tokens=2)
    (record, *_) = evaluate.evaluate(experiment.build(config))
    assert record.steps == 2


def test_pruning_again_counts_from_the_first_model(run, less):
    to, _ = less
    exp, first = (experiment.build(runs.load_run(x)) for x in (to, run.workdir))
    assert pruning.protected(exp, ["region"]) == REGION
    params, whole = final(runs.load_run(to)), final(run)
    more = next(i for i, n in enumerate(exp.spec.language.numbers) if n not in REGION)
    twice, two = pruning.without(exp, params, [more], REGION)
    left = twice.spec.language.numbers
    once, one = pruning.without(first, whole, set(range(DEPTH)) - set(left), REGION)
    assert once.spec == twice.spec
    same(one, two)


def test_what_heals_a_pruned_run_stays_pruned(less, tmp_path):
    to, _ = less
    config = small_config(tmp_path, "llava", steps=2, learn=("connector",))
    config.init.run = str(to)
    train.train(config)
    language = experiment.build(runs.load_run(config.workdir)).spec.language
    assert language.depth == 4 and language.region == REGION
    same(final(config)["language"], final(runs.load_run(to))["language"])


def test_a_pruned_run_goes_to_transformers_and_back(less, tmp_path):
    to, _ = less
    convert.to_hub(to, tmp_path / "hf")
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert theirs.config.text_config.num_hidden_layers == 4
    at = "language_model.model.layers."
    keys = [key for key in hub.Folder(tmp_path / "hf") if key.startswith(at)]
    assert {key.removeprefix(at)[0] for key in keys} == set("0123")
    convert.from_hub(tmp_path / "hf", tmp_path / "back")
    spec = hub.lmm_spec(tmp_path / "hf")
    assert spec.language.kept == experiment.build(runs.load_run(to)).spec.language.kept
    again = json.loads((tmp_path / "back" / "sizes.json").read_text())
    assert hub.read_spec(again, "back") == spec


@pytest.mark.parametrize("folder", [("clip", "phi3")], indirect=True, ids="-".join)
def test_an_exported_model_computes_the_same(folder, tmp_path):
    path, _ = folder
    model, params, _ = ours(path)
    spec = dataclasses.replace(model.spec, language=model.spec.language.left([0, 2]))
    ids = {"image_token_index": IMAGE_TOKEN, "pad_token_id": 65}
    less = keep_layers(params, [0, 2])
    to = hub.save(tmp_path / "hf", spec, less, kind="llava", config=ids)
    compare(to, transformers.LlavaForConditionalGeneration.from_pretrained(to).eval())


def test_layers_writes_scores_and_a_plot(run, less):
    to, _ = less
    flags = ("--method=parameter_change", f"--base={to}")
    done = command("lmm_jax.layers", f"--config.workdir={to}", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads((to / "layers" / "parameter_change.json").read_text())
    assert found["scores"] == [0.0] * 4
    kept = experiment.build(runs.load_run(to)).spec.language.kept
    assert tuple(found["ranking"]) == tuple(found["layers"]) == kept
    image = (to / "layers" / "parameter_change.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
