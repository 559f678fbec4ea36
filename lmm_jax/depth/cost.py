"""What a plan costs: FLOPs, cache bytes, parameters read. Counts only, no arrays.

One multiply-add is two FLOPs. A causal query pays for the keys that it sees, which is what
block-skipping kernels execute; `pairs="all"` counts every query-key pair, which is what a
plain masked matrix product executes.

Letters: T tokens, D width, N query heads, K key heads, H head width, F MLP width.
"""

from __future__ import annotations

from collections.abc import Iterator
import dataclasses
from typing import Literal

from lmm_jax.depth.geometry import Geometry, StackGeometry
from lmm_jax.depth.layout import Layout
from lmm_jax.depth.planner import Cut, Fold, Layer, Plan, Step

Pairs = Literal["visible", "all"]


@dataclasses.dataclass(frozen=True)
class StepCost:
    """One step of the language stack.

    Attributes:
        step: of the plan.
        visual, text: tokens that enter it.
        flops: of its layers, for one prompt (all rows of an example).
        kv_bytes: keys and values that it leaves for decoding, for one prompt.
    """

    step: Step
    visual: int
    text: int
    flops: float
    kv_bytes: int


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one prompt, and of each token decoded after it.

    Attributes:
        vision, connector, head: FLOPs of the vision stack over all views, of the
            projector, and of the logits of the last token, or of what an encoder predicts.
        words: FLOPs of the text's own tower, if it has one.
        steps: the language stack.
        decode: FLOPs of the first decoded token, head included; 0 in an encoder.
    """

    vision: float
    connector: float
    head: float
    steps: tuple[StepCost, ...]
    decode: float
    words: float = 0.0

    @property
    def language(self) -> float:
        """FLOPs of the language stack in prefill."""
        return sum(step.flops for step in self.steps)

    @property
    def prefill(self) -> float:
        towers = self.vision + self.words
        return towers + self.connector + self.language + self.head

    @property
    def kv_bytes(self) -> int:
        return sum(step.kv_bytes for step in self.steps)

    @property
    def visual_per_layer(self) -> tuple[int, ...]:
        """Visual tokens alive in each language layer."""
        return tuple(
            step.visual
            for step in self.steps
            if not isinstance(step.step, Cut)
            for _ in range(step.step.start, step.step.stop)
        )

    @property
    def visual_average(self) -> float:
        """Mean over layers of the visual tokens alive."""
        layers = self.visual_per_layer
        return sum(layers) / max(len(layers), 1)


def cost(
    plan: Plan,
    *,
    text: int | None = None,
    bytes_per_value: int = 2,
    pairs: Pairs = "visible",
) -> Cost:
    """Counts what one example costs.

    Args:
        text: text tokens of the prompt; None counts all slots of the plan's geometry.
        bytes_per_value: of the key-value cache.
        pairs: which query-key pairs count.
    """
    g = plan.geometry
    words = g.prefix + g.suffix if text is None else text
    connector = 2.0 * g.rows * g.images * _projected(plan)
    steps = tuple(_steps(plan, words, bytes_per_value, pairs))
    head = 2.0 * (g.language.width * g.vocab if g.head is None else g.head)
    keys = [s.visual + s.text + 1 for s in steps for _ in range(_layers(s.step))]
    decode = head + sum(
        weight_flops(g.language) + pair_flops(g.language) * count for count in keys
    )
    decode = decode if g.language.causal else 0.0
    vision, own = _vision_flops(plan, pairs), _text_flops(g, words, pairs)
    return Cost(vision, connector, head, steps, decode, own)


def _projected(plan: Plan) -> int:
    """Multiply-adds of all projectors for one image."""
    g, connect = plan.geometry, plan.connect
    passes = [(edit.projects, edit.weights) for edit in plan.injects]
    first = (connect.to, connect.weights) if connect else (g.visual_tokens, None)
    return sum(
        tokens * (g.connector if weights is None else weights)
        for tokens, weights in (first, *passes)
    )


def layer_flops(stack: StackGeometry, tokens: int, pairs: Pairs = "visible") -> float:
    """One layer over a sequence."""
    pair = _seen(stack, tokens, pairs) * pair_flops(stack)
    return tokens * weight_flops(stack) + pair


def _seen(stack: StackGeometry, tokens: int, pairs: Pairs) -> float:
    """Pairs of query and key."""
    if stack.causal and pairs == "visible":
        return tokens * (tokens + 1) / 2
    return tokens * tokens


def weight_flops(stack: StackGeometry) -> float:
    """Matrix products of one token with the weights of one layer."""
    projections = 2 * stack.heads + 2 * stack.kv_heads
    attention = stack.width * projections * stack.head_dim * (2 if stack.cross else 1)
    mlp = (3 if stack.gated else 2) * stack.width * stack.hidden
    return 2.0 * (attention + mlp)


def pair_flops(stack: StackGeometry) -> float:
    """One query with one key: the logit and the weighted value, all heads."""
    return 4.0 * stack.heads * stack.head_dim


def kv_bytes(stack: StackGeometry, tokens: int, bytes_per_value: int) -> int:
    """Keys and values of one layer; an encoder keeps none."""
    if not stack.causal:
        return 0
    return 2 * tokens * stack.kv_heads * stack.head_dim * bytes_per_value


@dataclasses.dataclass(frozen=True)
class Learns:
    """What learns, beside what a plan says of layers.

    Attributes:
        vision: anything of the vision stack.
        connector: the projector, or what a strategy learns.
        words: embeddings, or the text's own tower.
        head: the matrix of the logits, or of what an encoder predicts.
        kernels: the matrices of the language layers that learn.
        adapters: entries of the adapters (LoRA) of such a layer; 0 without.
    """

    vision: bool = True
    connector: bool = True
    words: bool = True
    head: bool = True
    kernels: bool = True
    adapters: int = 0


def train_flops(plan: Plan, learns: Learns, *, pairs: Pairs = "visible") -> float:
    """Model FLOPs of a training step per example: forward, and what it takes backward.

    A product with weights costs as much again for the gradient of its input, if anything
    before it learns, and for that of the weights, if they do; below the lowest layer that
    learns there is no backward pass. Recomputation is not counted (model FLOPs, not
    hardware FLOPs).
    """
    g, c = plan.geometry, cost(plan, pairs=pairs)
    head = c.head * (g.prefix + g.suffix if g.language.causal else 1)
    total = c.prefill - c.head + head
    reached = False
    for step, flops, seen in _vision_steps(plan, pairs):
        learning = learns.vision and step.learns
        reached = reached or learning
        total += _backward(flops, seen, reached, learning)
    total += _patch_flops(plan) * learns.vision + 2.0 * c.words * learns.words
    total += c.connector * (learns.vision + learns.connector)
    reached = learns.vision or learns.connector or learns.words
    for step in c.steps:
        learning = reached if isinstance(step.step, Cut) else step.step.learns
        reached = reached or learning
        tokens, layers = step.visual + step.text, _layers(step.step) * g.rows
        seen = layers * _seen(g.language, tokens, pairs) * pair_flops(g.language)
        total += _backward(step.flops, seen, reached, learning and learns.kernels)
        total += 6.0 * learns.adapters * tokens * layers * learning
    return total + head * (reached + learns.head)


def _backward(flops: float, seen: float, reached: bool, learning: bool) -> float:
    """FLOPs backwards of what costs `flops` forwards.

    Args:
        seen: those of them for pairs of query and key, which have no weights and two
            gradients.
        reached: whether its output depends on anything that learns.
        learning: whether its weights learn.
    """
    return (flops + seen) * reached + (flops - seen) * learning


def _vision_flops(plan: Plan, pairs: Pairs) -> float:
    layers = (flops for _, flops, _ in _vision_steps(plan, pairs))
    return _patch_flops(plan) + sum(layers)


def _patch_flops(plan: Plan) -> float:
    g = plan.geometry
    views = g.rows * g.images * g.views * g.passes
    return 2.0 * views * g.patches * g.patch * g.vision.width


def _vision_steps(plan: Plan, pairs: Pairs) -> Iterator[tuple[Step, float, float]]:
    """Steps with layers, their FLOPs over all views, and those of them for pairs."""
    g = plan.geometry
    views = g.rows * g.images * g.views * g.passes
    tokens = g.patches + g.class_token
    for step in plan.vision:
        if isinstance(step, Fold):
            views //= step.views
        else:
            layers = views * _layers(step)
            seen = layers * _seen(g.vision, tokens, pairs) * pair_flops(g.vision)
            yield step, layers * layer_flops(g.vision, tokens, pairs), seen


def _text_flops(g: Geometry, words: int, pairs: Pairs) -> float:
    """The text's own tower and what brings its width to that of the language stack."""
    if g.text is None:
        return 0.0
    layers = g.text.depth * layer_flops(g.text, words, pairs)
    return layers + 2.0 * words * g.text.width * g.language.width


def _steps(
    plan: Plan, text: int, bytes_per_value: int, pairs: Pairs
) -> Iterator[StepCost]:
    stack = plan.geometry.language
    before = (plan.entrance, *plan.layouts[:-1])
    for step, layout, after in zip(plan.language, before, plan.layouts):
        visual = layout.count("visual")
        words = text - _gone(plan, layout)
        if isinstance(step, Cut):
            asked = sum(query.op.flops(words) for query in step.queries)
            left = text - _gone(plan, after)
            yield StepCost(step, after.count("visual"), left, asked, 0)
            continue
        tokens = visual + words
        flops = _layers(step) * layer_flops(stack, tokens, pairs)
        if isinstance(step, Layer) and step.between:
            left = text - _gone(plan, after), after.count("visual")
            flops -= _spared(stack, (words, visual), left)
        flops *= plan.geometry.rows
        kept = _layers(step) * kv_bytes(stack, tokens, bytes_per_value)
        yield StepCost(step, visual, words, flops, kept)


def _gone(plan: Plan, layout: Layout) -> int:
    """Text slots that cuts have removed so far."""
    slots, left = (x.length - x.count("visual") for x in (plan.entrance, layout))
    return slots - left


def _layers(step: Step) -> int:
    return 0 if isinstance(step, Cut) else step.stop - step.start


def _spared(
    stack: StackGeometry, before: tuple[int, int], after: tuple[int, int]
) -> float:
    """What a cut between attention and MLP spares its layer.

    Args:
        before, after: text and visual tokens. In two streams the cut lies in the text's
            block, so the image's block is shorter as a whole.
    """
    (words, visual), (left, patches) = before, after
    mlp = 2.0 * (3 if stack.gated else 2) * stack.width * stack.hidden
    spared = mlp * (words - left + visual - patches)
    if stack.cross:
        own, keys = (
            4.0 * stack.width * n * stack.head_dim
            for n in (stack.heads, stack.kv_heads)
        )
        read = left if stack.cross == "sequential" else words
        spared += (visual - patches) * (2 * own + keys) + (words - read) * keys
        pairs = visual * (visual + words) - patches * (patches + read)
        spared += pairs * pair_flops(stack)
    return spared
