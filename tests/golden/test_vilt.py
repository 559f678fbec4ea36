"""ViLT, plain and reduced by PuMer, against the reference implementations."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lmm_jax import strategies
from lmm_jax.checkpoint.params import from_published
from lmm_jax.depth import Context, Layer, Layout, Reduce, Scan, inside, make_plan
from lmm_jax.depth.planner import Plan
from lmm_jax.hub.families import vilt as family
from lmm_jax.hub.families import vilt_original
from lmm_jax.hub.fields import Fields
from lmm_jax.hub.fused import Split
from lmm_jax.models import encoders, vilt
from lmm_jax.models.specs import vit_block
from lmm_jax.nn import attention, block
from lmm_jax.nn.block import Block
from lmm_jax.nn.stack import LayerStack
from lmm_jax.strategies import pumer
from tests.golden import reference
from tests.golden import vilt as golden
from tests.golden.test_pumer_ops import state

LAYERS = (
    "released_vqa",
    "cap",
    "fractional_mask",
    "prune_only",
    "prune_merge_image",
    "no_reduction",
)


def close(ours, theirs, bound: float = 1e-5) -> None:
    """To `bound` of the largest entry."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    largest = max(np.abs(theirs).max(), 1e-6)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound * largest)


class OneLayer:
    """A fixture of one block with a reducer inside."""

    def __init__(self, case: str):
        self.f = f = reference.load(f"pumer/vilt_layer_{case}")
        c = f.meta["config"]
        width, text, visual = c["dim"], c["text_len"], c["image_len"]
        made = vit_block(
            width, c["heads"], c["mlp_ratio"] * width, "gelu", norm_eps=c["ln_eps"]
        )
        self.spec = dataclasses.replace(made, soft_mask=True)
        sizes = vilt.geometry(golden.spec(reference.load("pumer/vilt_vqa_a")), text=1)
        sizes = dataclasses.replace(
            sizes,
            language=self.spec.geometry(1),
            prefix=text,
            patches=visual - 1,
            fixed_grid=(1, visual - 1),
        )
        self.plan = make_plan(
            sizes, pumer.edits(sizes, layers=(0,), **golden.shares(c))
        )
        mask = f["in/mask"][:, :text]
        self.state = state(text, visual, f["in/x"], mask)
        self.stack = LayerStack(self.spec, 1)
        rows = block.params(self.spec, "", vilt_original.NAMES.block)
        self.rows = [row.under("", "") for row in rows]

    def params(self, kind: str = "param/"):
        abstract = jax.eval_shape(
            lambda k: self.stack.init(k, method=lambda m: m.layers)["params"],
            jax.random.key(0),
        )
        parts = {
            f"attn.qkv.{leaf}": tuple(
                (f"attn.{x}.{leaf}", self.spec.width) for x in "qkv"
            )
            for leaf in ("weight", "bias")
        }
        given = {
            key.removeprefix(kind): value
            for key, value in self.f.arrays.items()
            if key.startswith(kind)
        }
        return from_published(Split(given, parts), self.rows, abstract)

    def after(self, params, x):
        before = self.state.replace(hidden=x)
        run = functools.partial(self.stack.apply, {"params": params}, method="run")
        return run(before, self.plan.language, Context()).state


@pytest.mark.parametrize("case", LAYERS)
def test_one_layer_and_its_gradients(case):
    this = OneLayer(case)
    f, params = this.f, this.params()
    after = jax.jit(this.after)(params, f["in/x"])
    close(after.hidden, f["out/x"])
    close(after.place.share, f["out/mask"])
    assert after.layout.count("prefix") == f["out/text_len"]

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(params, x):
        return (this.after(params, x).hidden * f["in/cotangent"]).sum()

    to_params, to_x = gradients(params, jnp.asarray(f["in/x"]))
    close(to_x, f["grad/x"], 5e-5)
    theirs = this.params("grad/param/")
    largest = max(np.abs(x).max() for x in jax.tree.leaves(theirs))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-5 * largest),
        to_params,
        theirs,
    )


@pytest.mark.parametrize("case", [c for c in LAYERS if c != "no_reduction"])
def test_what_one_layer_chooses(case):
    """Ranks and slots, exactly."""
    this = OneLayer(case)
    f, before = this.f, this.state
    (step,) = this.plan.language
    layer = jax.tree.map(lambda p: p[0], this.params()["layers"])

    @jax.jit
    def choose(layer):
        own = attention.sight(before.place, before.place, causal=False, soft=True)
        attend = functools.partial(Block(this.spec).apply, method="attend")
        _, keys, q = attend({"params": layer}, before.hidden, None, own)
        seen = attention.observe(q, keys, own, before, step.observe)
        cuts = {e.span: e.op(before, seen, Context()) for e in step.between}
        return step.between[0].op.scores(before, seen), cuts

    scores, cuts = choose(layer)
    close(scores, f["out/saliency"])
    decision, kept = cuts["visual"], f["out/top_idx"]
    if "out/image_assign" not in f.arrays:
        np.testing.assert_array_equal(decision.index, kept)
        return
    slots = slots_of(decision)
    np.testing.assert_array_equal(
        np.take_along_axis(slots, kept, 1), f["out/image_assign"]
    )
    assert (np.asarray(decision.weights) > 0).sum() == kept.size
    if "prefix" in cuts:
        np.testing.assert_array_equal(slots_of(cuts["prefix"]), f["out/text_assign"])


def slots_of(mix) -> np.ndarray:
    """The row of each old token; those of none are 0."""
    return (np.asarray(mix.weights) > 0).argmax(axis=1)


def single(plan: Plan) -> list:
    """The steps, layer by layer."""
    found = []
    for step in plan.language:
        if isinstance(step, Layer):
            found.append(step)
        else:
            found += [Scan(i, i + 1) for i in range(step.start, step.stop)]
    return found


def every_layer(model, params, batch, steps=None):
    """The entrance, the state after each layer, and what comes of the last one."""
    steps = single(model.plan) if steps is None else steps

    def run(model, batch):
        states = [model.enter(batch)]
        for step in steps:
            out = model.stack.run(states[-1], (step,), Context())
            states.append(out.state)
        pooled = model.pooled(states[-1])
        return states, model.norm(states[-1].hidden), pooled, model.head(pooled)

    return jax.jit(functools.partial(model.apply, method=run))(
        {"params": params}, batch
    )


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize(
    "case", ["vqa_a", "vqa_b", "vqa_padded_image", "nlvr2_a", "irtr_a"]
)
def test_whole_model(case, reduced):
    f = reference.load(f"pumer/vilt_{case}")
    spec = golden.spec(f)
    model = vilt.Vilt(spec, golden.plan(f, spec, reduced=reduced))
    params, batch = golden.params(f, model), golden.batch(f, spec.vision.patch)
    states, last, pooled, head = every_layer(model, params, batch)
    kind, count = "pumer" if reduced else "plain", spec.head.images
    columns, whole = model.plan.geometry.grid[1], states[0].hidden.shape[1]
    checked = 0
    for i in range(count):
        image = f"image{i + 1}." if count > 1 else ""

        def compare(name, ours, image=image, i=i):
            nonlocal checked
            if (key := f"out/{kind}.{image}{name}") not in f.arrays:
                return
            ours = np.asarray(ours)[i::count]
            if ours.shape[1] == whole and ours.ndim == 3:
                ours = golden.ordered(f, ours, columns)
            close(ours, f[key])
            checked += 1

        compare("embeddings", states[0].hidden)
        for number, after in enumerate(states[1:]):
            compare(f"layer{number}", after.hidden)
            compare(f"layer{number}_mask", after.place.share)
        compare("last_hidden", last)
    assert checked >= 2
    name = "pooled_concat" if count > 1 else "pooled"
    close(pooled.reshape(f[f"out/{kind}.{name}"].shape), f[f"out/{kind}.{name}"])
    close(head["logits"], f[f"out/{kind}.logits"])
    if spec.head.match:
        close(head["match"], f[f"out/{kind}.itm_logits"])


def test_merging_text_and_image_as_one():
    """The baseline that knows no modalities: one span of all tokens."""
    f = reference.load("pumer/vilt_tome_baseline")
    spec, count = golden.spec(f), f.meta["config"]["merge_count_per_block"]
    model = vilt.Vilt(spec, golden.plan(f, spec, reduced=False))
    params, batch = golden.params(f, model), golden.batch(f, spec.vision.patch)
    length = f["out/embeddings"].shape[1]

    def run(model, batch):
        state = model.enter(batch)
        state = state.replace(layout=Layout.of({"prefix": length, "visual": 0}))
        states = [state]
        for layer in range(spec.depth):
            to = length - count * (layer + 1)
            op = pumer.Text(to + count, to, safe=False)
            cut = Reduce("all", inside(layer), to, op, ("keys",), "prefix")
            step = Layer(layer, ("keys",), (cut,))
            states.append(model.stack.run(states[-1], (step,), Context()).state)
        return states, model.head(model.pooled(states[-1]))

    apply = jax.jit(functools.partial(model.apply, method=run))
    states, head = apply({"params": params}, batch)
    for layer, after in enumerate(states[1:]):
        close(after.hidden, f[f"out/layer{layer}"])
        close(after.place.share, f[f"out/layer{layer}_mask"])
    close(head["logits"], f["out/logits"])


@pytest.mark.parametrize("case", ["vqa_ragged", "nlvr2"])
def test_transformers(case):
    """Images of different size on one canvas, in the keys of `transformers`."""
    f = reference.load(f"pumer/hf_vilt_{case}")
    c = f.meta["config"]
    known = family.config(dataclasses.replace(vilt.b_32(), text_eps=1e-6))
    fields = {name: value for name, value in c.items() if name in known}
    classes = dict(enumerate(range(c["num_labels"])))
    fields |= {"id2label": classes, "architectures": [f.meta["source"].split()[-1]]}
    if case == "nlvr2":
        fields["num_images"] = 2
    spec = family.read(Fields(fields))
    height, width = f["in/pixel_values"].shape[-2:]
    canvas = height // spec.vision.patch, width // spec.vision.patch
    sizes = vilt.geometry(spec, text=f["in/input_ids"].shape[1], canvas=canvas)
    model = vilt.Vilt(spec, make_plan(sizes, ()))
    abstract = jax.eval_shape(lambda k: encoders.init(model, k), jax.random.key(0))
    params = from_published(f.params, family.rows(spec), abstract)
    batch = golden.batch(f, spec.vision.patch)
    if case == "nlvr2":
        images = f["in/pixel_values"].transpose(0, 1, 3, 4, 2)
        batch["images"] = images
    states, last, pooled, head = every_layer(model, params, batch)
    close(head["logits"], f["out/logits"])
    if case == "nlvr2":
        for i in range(2):
            close(pooled[i::2], f[f"out/image{i + 1}.pooled"])
            close(last[i::2], f[f"out/image{i + 1}.last_hidden"])
        return
    close(pooled, f["out/pooled"])
    shown = np.concatenate([f["in/attention_mask"], f["out/image_mask"]], axis=1) > 0
    kinds = {f"layer{i}": x.hidden for i, x in enumerate(states[1:])}
    for name, ours in {"embeddings": states[0].hidden, **kinds}.items():
        ours = golden.ordered(f, np.asarray(ours), canvas[1])
        close(ours[shown], f[f"out/{name}"][shown])


def test_released_arguments_are_those_of_the_config():
    fields = {
        "model_type": "vilt_original",
        "architectures": ["ViltForVisualEntailment"],
        "reduce_layers": [2, 4, 6, 8],
        "prune_r": 0.1,
        "merge_r": 0.3,
        "merge_text": 0.2,
        "max_text_len": 40,
    }
    spec = vilt_original.read(Fields(fields))
    sizes = vilt.geometry(spec, text=40)
    (own,) = (edits(sizes) for edits in spec.own)
    chosen = {"pumer": pumer.RELEASED["vilt_snli_ve"] | {"preset": "reference"}}
    assert own == strategies.build(chosen, sizes)
