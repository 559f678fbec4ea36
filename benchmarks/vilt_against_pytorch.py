"""Is ViLT as fast as PyTorch's? And with PuMer?

    python benchmarks/vilt_against_pytorch.py

A ViLT-B/32 of random weights is made and saved by `transformers` and loaded by
`lmm_jax.hub`: the same weights, 32 text tokens and an image of 384 x 384 pixels, float32,
up to the scores of 3129 answers. All ways run in turn, see `rounds`. `transformers` has
one attention for ViLT; "fused" is the same with PyTorch's fused one in its place.
"""

from __future__ import annotations

from collections.abc import Callable
import copy
import functools
import tempfile

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np
from rounds import CORES, Ways, conditions, fastest, measured, seconds
import torch
from torch.nn.functional import scaled_dot_product_attention
import transformers
from transformers.models.vilt.modeling_vilt import ViltSelfAttention

from lmm_jax import classify, hub, weights
from lmm_jax.depth import make_plan
from lmm_jax.depth.cost import cost
from lmm_jax.eval.latency import spread
from lmm_jax.models import encoders, vilt
from lmm_jax.strategies import pumer

_BATCHES = flags.DEFINE_list("batches", ["1", "8", "32"], "Examples at once.")

TEXT, IMAGE, ANSWERS = 32, 384, 3129
CUTS = {"whole": None, "pumer": pumer.RELEASED["vilt_vqav2"]}


def eager() -> transformers.ViltForQuestionAnswering:
    """Random weights in the sizes of ViLT-B/32."""
    torch.manual_seed(0)
    config = transformers.ViltConfig(num_labels=ANSWERS)
    return transformers.ViltForQuestionAnswering(config).eval()


def fused(
    model: transformers.ViltForQuestionAnswering,
) -> transformers.ViltForQuestionAnswering:
    """The same with another attention."""

    def attend(layer: ViltSelfAttention, x, attention_mask=None, *_):
        shape = (*x.shape[:-1], layer.num_attention_heads, layer.attention_head_size)
        parts = layer.query(x), layer.key(x), layer.value(x)
        q, k, v = (part.view(shape).transpose(1, 2) for part in parts)
        out = scaled_dot_product_attention(q, k, v, attention_mask)
        return (out.transpose(1, 2).flatten(2),)

    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, ViltSelfAttention):
            layer.forward = functools.partial(attend, layer)
    return model


class Ours:
    """A folder, loaded by `lmm_jax.hub`."""

    def __init__(self, path: str):
        folder = hub.Folder(path)
        spec = hub.read_spec(folder.config, path)
        sizes = vilt.geometry(spec, text=TEXT)
        self.models = {
            name: vilt.Vilt(
                spec, make_plan(sizes, pumer.edits(sizes, **c) if c else ())
            )
            for name, c in CUTS.items()
        }
        whole = self.models["whole"]
        abstract = jax.eval_shape(lambda k: encoders.init(whole, k), jax.random.key(0))
        params = jax.tree.map(jnp.asarray, hub.load(folder, spec, abstract))
        self._params = weights.prepared(params)
        self._predict = {
            name: classify.predictor(model) for name, model in self.models.items()
        }

    def way(self, name: str, text: np.ndarray, pixels: np.ndarray) -> Callable:
        batch = {
            "images": jnp.asarray(pixels.transpose(0, 2, 3, 1)[:, None]),
            "tokens": jnp.asarray(text),
            "valid": jnp.ones(text.shape, bool),
        }
        return functools.partial(self._predict[name], self._params, batch)


def theirs(model, text: np.ndarray, pixels: np.ndarray) -> Callable:
    inputs = {"input_ids": torch.tensor(text), "pixel_values": torch.tensor(pixels)}

    @torch.no_grad()
    def run():
        return model(**inputs).logits

    return run


def cases(ours: Ours, models: dict[str, torch.nn.Module]) -> dict[str, Ways]:
    """What is measured, and the ways to do it; without cuts, their scores are equal."""
    rng, found = np.random.default_rng(0), {}
    for size in map(int, _BATCHES.value):
        text = rng.integers(3, 30_000, (size, TEXT), np.int32)
        pixels = rng.normal(size=(size, 3, IMAGE, IMAGE)).astype(np.float32)
        ways = {name: ours.way(name, text, pixels) for name in CUTS}
        ways |= {name: theirs(m, text, pixels) for name, m in models.items()}
        same = [np.asarray(run()) for way, run in ways.items() if way != "pumer"]
        apart = max(np.abs(x - same[0]).max() for x in same) / np.abs(same[0]).max()
        print(f"batch {size}: scores differ by {apart:.1e} of the largest", flush=True)
        found[f"{size}"] = {
            way: functools.partial(seconds, run) for way, run in ways.items()
        }
    return found


def report(times: dict[str, dict[str, list[float]]], promised: float) -> None:
    """Prints a table; the speed-up is over PyTorch's fastest way."""
    print(f"\n{conditions()}; PuMer computes {promised:.3f} of the FLOPs\n")
    print("| batch | lmm_jax ms | PyTorch ms | its fastest way | speed-up |", end="")
    print(" with PuMer ms | ratio | of the speed-up |")
    print("|--:|--:|--:|---|--:|--:|--:|--:|")
    for case, ways in times.items():
        whole, cut = (ways.pop(name) for name in CUTS)
        way, best = fastest(ways)
        faster = spread([b / w for b, w in zip(best, whole)])
        ratios = [c / w for c, w in zip(cut, whole)]
        reached = spread([100 * promised / ratio for ratio in ratios])
        ms = [spread(spent, 1e3) for spent in (whole, best, cut)]
        print(f"| {case} | {ms[0]} | {ms[1]} | {way} | {faster} |", end="")
        print(f" {ms[2]} | {spread(ratios)} | {reached} % |")


def main(argv) -> None:
    torch.set_num_threads(CORES)
    model = eager()
    with tempfile.TemporaryDirectory() as path:
        model.save_pretrained(path)
        ours = Ours(path)
    costs = [cost(ours.models[name].plan).prefill for name in CUTS]
    times = measured(cases(ours, {"eager": model, "fused": fused(model)}))
    report(times, costs[1] / costs[0])


if __name__ == "__main__":
    app.run(main)
