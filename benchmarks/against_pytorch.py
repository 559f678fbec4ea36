"""As fast as PyTorch? The same weights and inputs through `transformers` and through us.

    python benchmarks/against_pytorch.py

A LLaVA of random weights in the sizes of CLIP-B/16 and SmolLM2-135M (221 M parameters) is
made and saved by `transformers` and loaded by `lmm_jax.hub`. float32, two cores, one
process. All cases run in turn, round after round, so the ratios hold on a noisy machine;
the first round, which compiles, is thrown away. PyTorch runs eagerly with sdpa attention;
its reference for decoding is the fastest of `generate` and hand-written loops over a
dynamic and a static cache.

    prefill   prompts of 196 visual and 60 text tokens: logits of the first new token
    decode    one more token for each prompt, greedy, after prefill; with int8 weights too
              (against PyTorch's float32)
    train     forward, backward and AdamW on all parameters but those of the vision tower
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import tempfile
import time

from absl import app, flags
import jax
import jax.numpy as jnp
import numpy as np
from rounds import CORES, conditions, fastest, measured, seconds
import torch
import transformers

from lmm_jax import hub, optim, partition, quantize, train
from lmm_jax.decode import Generator
from lmm_jax.depth import make_plan
from lmm_jax.eval.latency import spread
from lmm_jax.models import lmm
from lmm_jax.objectives import NextToken
from lmm_jax.sections import TrainConfig
from lmm_jax.weights import prepared

_BATCHES = flags.DEFINE_list("batches", ["1", "4"], "Prompts at once.")
_TRAIN = flags.DEFINE_integer("train_batch", 2, "Conversations in a training step.")
_TOKENS = flags.DEFINE_integer("new_tokens", 32, "Tokens decoded.")

TEXT, PATCHES = 60, 196
IMAGE_TOKEN = 49150
LEARN = ("connector", "language")


def llava() -> transformers.LlavaForConditionalGeneration:
    """Random weights in the sizes of CLIP-B/16 and SmolLM2-135M."""
    vision = transformers.CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
    )
    language = transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    config = transformers.LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=PATCHES,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.set_attn_implementation("sdpa")
    return model.eval()


class Theirs:
    """`transformers` in eager mode."""

    def __init__(self, model: transformers.LlavaForConditionalGeneration):
        self.model = model
        model.model.vision_tower.requires_grad_(False)
        learning = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            learning, lr=1e-5, weight_decay=0.0, fused=True
        )

    def inputs(self, text: np.ndarray, pixels: np.ndarray) -> dict[str, torch.Tensor]:
        image = np.full((len(text), PATCHES), IMAGE_TOKEN)
        ids = torch.tensor(np.concatenate([image, text], axis=1))
        return {"input_ids": ids, "pixel_values": torch.tensor(pixels)}

    @torch.no_grad()
    def prefill(self, inputs, cache=None):
        out = self.model(
            **inputs, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return out.logits[:, -1].argmax(-1), out.past_key_values

    def dynamic(self, inputs) -> tuple[float, np.ndarray]:
        return self._loop(inputs, transformers.DynamicCache())

    def static(self, inputs) -> tuple[float, np.ndarray]:
        length = inputs["input_ids"].shape[1] + _TOKENS.value + 1
        config = self.model.config.text_config
        return self._loop(
            inputs, transformers.StaticCache(config=config, max_cache_len=length)
        )

    def generate(self, inputs) -> tuple[float, np.ndarray]:
        """Seconds of decoding are those of all less those of the first token."""

        def run(count: int):
            start = time.perf_counter()
            ids = self.model.generate(
                **inputs, do_sample=False, max_new_tokens=count, min_new_tokens=count
            )
            return time.perf_counter() - start, ids

        first, _ = run(1)
        whole, ids = run(1 + _TOKENS.value)
        return whole - first, ids[:, inputs["input_ids"].shape[1] :].numpy()

    @torch.no_grad()
    def _loop(self, inputs, cache) -> tuple[float, np.ndarray]:
        token, cache = self.prefill(inputs, cache)
        said, start = [token], time.perf_counter()
        for _ in range(_TOKENS.value):
            out = self.model(
                input_ids=token[:, None], past_key_values=cache, use_cache=True
            )
            token = out.logits[:, -1].argmax(-1)
            said.append(token)
        return time.perf_counter() - start, torch.stack(said, 1).numpy()

    def update(self, inputs) -> float:
        ids = inputs["input_ids"]
        labels = torch.where(ids == IMAGE_TOKEN, -100, ids)
        loss = self.model(**inputs, labels=labels).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


class Ours:
    """The same folder, loaded by `lmm_jax.hub`."""

    def __init__(self, path: str):
        folder = hub.Folder(path)
        spec = hub.read_spec(folder.config, path)
        sizes = lmm.geometry(spec, images=1, crops=0, prefix=0, suffix=TEXT)
        self.model = lmm.LMM(spec, make_plan(sizes, ()))
        abstract = jax.eval_shape(lambda k: lmm.init(self.model, k), jax.random.key(0))
        params = jax.tree.map(jnp.asarray, hub.load(folder, spec, abstract))
        self.params = prepared(params)
        self.rounded = prepared(quantize.int8(params, spec))
        self.generator = Generator(self.model, 1 + _TOKENS.value, end=-1)
        selection = partition.select(params, LEARN)
        settings = TrainConfig(steps=1000, learn=LEARN)
        learning, self.frozen = partition.split(params, selection)
        transform, _ = optim.make(
            optim.OptimConfig(lr=1e-5, schedule="constant"), settings.steps, learning
        )
        # Loops over layers are slow on CPU; its configs say unroll=0, and so do we.
        unrolled = self.model.clone(spec=dataclasses.replace(spec, unroll=0))
        update = train.make_update(
            NextToken(unrolled, 1, {}), selection, transform, settings
        )
        self._update = jax.jit(update, donate_argnums=0)
        learning = jax.tree.map(jnp.copy, learning)
        self.state = train.TrainState(
            jnp.zeros((), jnp.int32), learning, transform.init(learning)
        )

    def inputs(self, text: np.ndarray, pixels: np.ndarray) -> dict[str, jax.Array]:
        batch = {
            name: np.zeros(x.shape, x.dtype)
            for name, x in lmm.abstract_batch(self.model, len(text)).items()
        }
        visual = self.model.plan.tokens_per_image
        batch["images"] = pixels.transpose(0, 2, 3, 1)[:, None, None]
        batch["tokens"] = text.astype(np.int32)
        batch["positions"] += visual + np.arange(TEXT, dtype=np.int32)
        batch["visual_positions"] += np.arange(visual, dtype=np.int32)
        batch["loss_mask"] += 1
        for name in ("valid", "visual_valid", "views"):
            batch[name][:] = True
        return jax.tree.map(jnp.asarray, batch)

    def prefill(self, batch):
        return self.generator.prefill(self.params, batch, jax.random.key(0))

    def decode(self, batch, params=None) -> tuple[float, np.ndarray]:
        params = params or self.params
        token, cache = jax.block_until_ready(self.prefill(batch))
        start = time.perf_counter()
        said = self.generator.loop(params, token, cache, jax.random.key(0))
        said = np.asarray(said)
        return time.perf_counter() - start, said

    def update(self, batch) -> float:
        self.state, scalars = self._update(self.state, self.frozen, batch)
        return float(scalars["loss"])


def main(argv) -> None:
    torch.set_num_threads(CORES)
    model = llava()
    with tempfile.TemporaryDirectory() as path:
        model.save_pretrained(path)
        ours, theirs = Ours(path), Theirs(model)
    report(measured(cases(ours, theirs)))


def cases(ours: Ours, theirs: Theirs) -> dict[str, dict[str, Callable[[], float]]]:
    """What is measured, and the ways to do it: functions that return seconds."""
    rng = np.random.default_rng(0)

    def data(size: int):
        text = rng.integers(3, IMAGE_TOKEN, (size, TEXT))
        pixels = rng.normal(size=(size, 3, 224, 224)).astype(np.float32)
        return ours.inputs(text, pixels), theirs.inputs(text, pixels)

    found = {}
    for size in map(int, _BATCHES.value):
        mine, other = data(size)
        same = (ours.decode(mine)[1] == theirs.dynamic(other)[1]).mean()
        print(f"batch {size}: {same:.1%} of the greedy tokens are equal", flush=True)
        found[f"prefill, batch {size}"] = {
            "lmm_jax": lambda x=mine: seconds(lambda: ours.prefill(x)),
            "forward": lambda x=other: seconds(lambda: theirs.prefill(x)),
        }
        found[f"decode, batch {size}"] = {
            "lmm_jax": lambda x=mine: ours.decode(x)[0],
            "lmm_jax int8": lambda x=mine: ours.decode(x, ours.rounded)[0],
            "dynamic cache": lambda x=other: theirs.dynamic(x)[0],
            "static cache": lambda x=other: theirs.static(x)[0],
            "generate": lambda x=other: theirs.generate(x)[0],
        }
    mine, other = data(_TRAIN.value)
    found[f"train, batch {_TRAIN.value}"] = {
        "lmm_jax": lambda: seconds(lambda: ours.update(mine)),
        "step": lambda: seconds(lambda: theirs.update(other)),
    }
    return found


def report(times: dict[str, dict[str, list[float]]]) -> None:
    """Prints a table; the speed-up is over PyTorch's fastest way."""
    print(f"\n{conditions()}\n")
    print("| | lmm_jax ms | PyTorch ms | its fastest way | speed-up |")
    print("|---|--:|--:|---|--:|")
    for case, ways in times.items():
        steps = _TOKENS.value if case.startswith("decode") else 1
        other = {way: spent for way, spent in ways.items() if "lmm_jax" not in way}
        theirs, best = fastest(other)
        for way in [way for way in ways if way not in other]:
            ratios = [b / m for b, m in zip(best, ways[way])]
            ms = [spread(spent, 1e3 / steps) for spent in (ways[way], best)]
            name = case + way.removeprefix("lmm_jax")
            print(f"| {name} | {ms[0]} | {ms[1]} | {theirs} | {spread(ratios)} |")


if __name__ == "__main__":
    app.run(main)
