"""The sections of a config: what each field means, its type and its default."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lmm_jax.data import pipeline
from lmm_jax.data.pipeline import SourceConfig
from lmm_jax.lora import LoraConfig
from lmm_jax.optim import OptimConfig
from lmm_jax.parallel.axes import RULES
from lmm_jax.parallel.mesh import MeshConfig


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which model, and how it is computed.

    Attributes:
        vision, language: named sizes of `lmm_jax.models.specs`; folders named in
            `init` bring their own sizes.
        encoder: named sizes of `lmm_jax.models.encoders`, in place of the two, where
            there is a section `task`.
        vision_layer: of a tower that comes as a folder, the hidden state that is read,
            counted as LLaVA does: -2 is before the last layer.
        image_size: pixels a side of a view, 0 for the tower's own. Positions in a folder
            are interpolated for it.
        dtype: of computation; "auto" is bfloat16 on accelerators and float32 on CPU,
            where XLA's bfloat16 is many times slower.
        param_dtype: of parameters; those that learn are float32 while they do, or
            small updates would vanish.
        remat, unroll: see `LayerStack`.
        attention: what computes it in the language model (`lmm_jax.nn.kernels`); "auto"
            is "splash" on TPU, "cudnn" on GPU, "xla" on CPU.
        mode: "drop" removes tokens at cuts, "mask" only hides them.
    """

    vision: str = ""
    language: str = ""
    encoder: str = ""
    vision_layer: int = -2
    image_size: int = 0
    dtype: str = "auto"
    param_dtype: str = "float32"
    remat: Literal["none", "full", "dots"] = "none"
    unroll: int = 1
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    mode: Literal["drop", "mask"] = "drop"


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """How images become views; see `ImageSpec`. The vision encoder gives the size. Mode
    "auto" is that of the model in the folder of `init`, or of its image processor, whose
    filter and colours hold in any mode. In the model's mode its crops and grids hold where
    none are given.
    In mode "native" larger images are scaled to an area of `max_pixels` (0: what the
    tower's table of positions was made for), smaller ones to one of `min_pixels`."""

    mode: Literal["auto", "pad", "crop", "stretch", "quadrants", "anyres", "native"] = (
        "pad"
    )
    crops: int = 0
    fine: int = 0
    grid: Literal["aspect", "square"] = "aspect"
    pinpoints: tuple[tuple[int, int], ...] = ()
    min_pixels: int = 0
    max_pixels: int = 0


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """How conversations become tokens.

    Attributes:
        tokenizer: folder of a tokenizer, or "characters".
        template: name in `lmm_jax.data.conversation`.
        prefix, suffix: text slots before and after the images.
        images: image slots per example.
        truncate: cut what is too long from the right instead of skipping it.
    """

    tokenizer: str
    template: str = "vicuna_v1"
    prefix: int = 64
    suffix: int = 448
    images: int = 1
    truncate: bool = False


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop.

    Attributes:
        steps: updates in all.
        learn: patterns of `lmm_jax.partition` that name what learns.
        seed: of initialisation and of everything drawn.
        accumulate: micro-batches per update; exactly equal to one big batch.
        loss_shards: see `lmm_jax.losses.next_token`.
        overlap: gradients are summed beside products where XLA can (TPU v5e).
        log_every: steps between two entries in the metrics.
        writers: of metrics: "jsonl", "csv", "tensorboard".
        profile: first and last step of a profile that TensorBoard shows; () for none.
        loss_weights: auxiliary term -> weight.
    """

    steps: int
    learn: tuple[str, ...]
    seed: int = 0
    accumulate: int = 1
    loss_shards: int = 1
    overlap: bool = True
    log_every: int = 10
    writers: tuple[str, ...] = ("jsonl", "csv", "tensorboard")
    profile: tuple[int, ...] = ()
    loss_weights: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.profile and not (
            len(self.profile) == 2 and 0 < self.profile[0] <= self.profile[1]
        ):
            raise ValueError(
                f"config.train.profile={self.profile}: name the first and the last step, "
                "such as (10, 12), or ()."
            )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and how many to keep."""

    every: int = 500
    keep: int = 2


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where parameters come from when the work directory has no checkpoint.

    Attributes:
        run: another run's work directory, or what `lmm_jax.convert` wrote; its parameters
            are loaded, shape by shape.
        load: a LLaVA's or an encoder's folder in the hub's layout: sizes and all
            parameters. An encoder of another task needs a head that starts fresh.
        vision, language: folders of one part each: its sizes and parameters; what no
            folder holds (the projector) starts fresh.
        fresh: patterns of parameters that start fresh although they are there.
        teacher: run or hub folder of the unreduced encoder that is imitated, or "start",
            which is `run` or `load`; "" for none.
    """

    run: str = ""
    load: str = ""
    vision: str = ""
    language: str = ""
    fresh: tuple[str, ...] = ()
    teacher: str = ""


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """What is asked.

    Attributes:
        tasks: names of `lmm_jax.eval.tasks`; empty evaluates nothing.
        questions, images: JSONL file and image root, if not the task's own.
        choices: folder or file of multiple choice, if not the task's own.
        batch_size: prompts at once.
        suffix: text slots after the images for prompts; 0 takes those of training.
        buckets: smaller numbers of slots for batches of short prompts, each with its own
            programs; () is powers of two from 64 on.
        chunk: tokens of a prompt that a language layer reads at a time; 0 is all.
        weights: "int8" rounds the language model's matrices; `generate` heeds it too.
        limit: number of questions, the first; 0 asks all.
        max_new_tokens: if not the task's own (0).
        groups: name -> categories that are averaged together.
        after_training: evaluate when training ends.
    """

    tasks: tuple[str, ...] = ()
    questions: str = ""
    images: str = ""
    choices: str = ""
    batch_size: int = 32
    suffix: int = 0
    buckets: tuple[int, ...] = ()
    chunk: int = 0
    weights: Literal["float", "int8"] = "float"
    limit: int = 0
    max_new_tokens: int = 0
    groups: dict = dataclasses.field(default_factory=dict)
    after_training: bool = False

    def __post_init__(self):
        if self.chunk < 0:
            raise ValueError(
                f"config.eval.chunk={self.chunk}: use a number of tokens, or 0 to read "
                "prompts whole."
            )


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """What an encoder's head predicts, and how it learns to.

    Attributes:
        name: "vqav2", "nlvr2", "snli_ve" or "flickr30k".
        negatives: captions of other images beside each right one, for retrieval.
        augment: RandAugment on training images.
        scale: of VQAv2's loss, which is a mean over classes: ViLT and METER multiply it by
            their number, PuMer by 1.
        distill: weight of the divergence from the teacher of `init`.
        temperature: of that divergence.
        sources: what is evaluated, as in `data.sources`.
    """

    name: str
    negatives: int = 15
    augment: bool = True
    scale: float = 1.0
    distill: float = 1.0
    temperature: float = 1.0
    sources: tuple[SourceConfig, ...] = ()

    def __post_init__(self):
        made = [SourceConfig(**s) if isinstance(s, dict) else s for s in self.sources]
        object.__setattr__(self, "sources", tuple(made))


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """What `lmm_jax.compare` trains unless its flags say so.

    Attributes:
        strategies: values of the config's argument of this name.
        base: another of its values, whose parameters the others start from; "" for none.
        category: of the questions; what the plot shows.
    """

    strategies: tuple[str, ...] = ()
    base: str = ""
    category: str = "total"


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """What `lmm_jax.bench` times unless its flags say so.

    Attributes:
        variants: beside the config itself, as `--variant` says them.
    """

    variants: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class DocumentsConfig:
    """A generated document set, made on first use; see `lmm_jax.data.documents`.

    Attributes:
        directory: where; its `tokenizer` folder holds one trained on the conversations.
        train, validation: pages.
        seed: of the pages.
        vocab: tokens of the tokenizer, at most.
    """

    directory: str
    train: int
    validation: int
    seed: int = 0
    vocab: int = 512


@dataclasses.dataclass(frozen=True)
class Sections:
    """A whole config."""

    name: str
    workdir: str
    model: ModelConfig
    image: ImageConfig
    text: TextConfig
    strategy: dict
    data: pipeline.DataConfig
    optim: OptimConfig
    train: TrainConfig
    task: TaskConfig | None = None
    documents: DocumentsConfig | None = None
    lora: LoraConfig = LoraConfig()  # noqa: RUF009 (frozen)
    mesh: MeshConfig = MeshConfig()  # noqa: RUF009 (frozen)
    axes: tuple = RULES
    checkpoint: CheckpointConfig = CheckpointConfig()
    init: InitConfig = InitConfig()
    eval: EvalConfig = EvalConfig()
    compare: CompareConfig = CompareConfig()
    bench: BenchConfig = BenchConfig()
