"""Times configs on this device: first token and decoding, or the outputs of an encoder,
and training; memory and cost beside.

    python -m lmm_jax.bench --config=configs/quickstart.py --train
    python -m lmm_jax.bench --config=configs/llava.py --text=128 --out=speed.json \\
        --variant=configs/fastv.py:keep=288 --variant=configs/fastv.py:keep=144
    python -m lmm_jax.bench --config=configs/pumer.py:reduce=false \\
        --variant=:reduce=true --batch=32

`--variant` says what is timed beside the config: another FILE[:arguments], or `:arguments`
more for the same file, and perhaps `--config.field=value`; a config's section `bench` may
name variants too. `--config.field=value` of the command holds for all. Every program is
compiled, and run once to warm up; then all run in turn, round after round, so ratios to
the first config hold on a machine that is busy or slows down.

Weights are random unless the config names some. Examples are noise in all slots: uint8
pixels and tokens that are on the device already; reading files is not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
import shlex
import time
from typing import Any

from absl import flags
from flax import linen as nn
import jax
import jax.numpy as jnp

from lmm_jax import (
    classify,
    cli,
    decode,
    experiment,
    run_config,
    runs,
    train,
    weights,
)
from lmm_jax.compiled.work import flops as compiled_flops
from lmm_jax.depth.cost import cost, train_flops
from lmm_jax.eval import latency
from lmm_jax.eval.latency import Report, Result, Settings, Timing
from lmm_jax.experiment import Conversing, Encoding, Experiment

# --- What is timed ------------------------------------------------------------------


def commands(
    source: str, variants: Sequence[str], overrides: Sequence[str]
) -> Iterator[tuple[str, list[str]]]:
    """A config and its variants, each as its name and the words that name its config.

    Args:
        source: `--config` value, FILE[:arguments].
        variants: as `--variant` says them.
        overrides: words `--config.field=value` for all.

    Raises:
        ValueError: a variant that is not understood.
    """
    yield _name(source), [f"--config={source}", *overrides]
    for variant in variants:
        try:
            words = shlex.split(variant)
        except ValueError:  # a quotation that does not end
            words = []
        own = [word for word in words if word.startswith(cli.OVERRIDE)]
        files = [word for word in words if not word.startswith("-")]
        if not words or len(own) + len(files) != len(words) or len(files) > 1:
            raise ValueError(
                f"variant {variant!r}: give FILE[:arguments], or :arguments for the same "
                "file, and perhaps --config.field=value."
            )
        changes = [word.removeprefix(cli.OVERRIDE) for word in own]
        name = " ".join([*map(_name, files), *changes])
        file = _joined(source, files[0]) if files else source
        yield name, [f"--config={file}", *overrides, *own]


def _joined(source: str, file: str) -> str:
    """`file`, or the source with more arguments if it names arguments only."""
    if not file.startswith(":"):
        return file
    return f"{source},{file[1:]}" if ":" in source else source + file


def _name(source: str) -> str:
    """How tables call FILE[:arguments]."""
    file, _, arguments = source.partition(":")
    if not file or file == run_config.__file__:
        return arguments
    return ":".join(filter(None, (Path(file).stem, arguments)))


# --- Timing -------------------------------------------------------------------------


def bench(experiments: Sequence[tuple[str, Experiment]], settings: Settings) -> Report:
    """Compiles the programs of all configs, then runs them in turn.

    Raises:
        ValueError: a config whose times would mean nothing, or that cannot be built.
    """
    for name, exp in experiments:
        _check(name, exp, settings)
    shared = Shared()
    cases = [Case(name, exp, settings, shared) for name, exp in experiments]
    for number in range(1 + settings.rounds):
        for case in cases:
            case.run(timed=number > 0)
    results = tuple(case.result() for case in cases)
    return Report(settings, results, runs.versions(), _device_peak())


def _check(name: str, exp: Experiment, settings: Settings) -> None:
    if exp.config.model.mode == "mask":
        raise ValueError(
            f"{name}: model.mode='mask' hides tokens and saves nothing, so its times say "
            "nothing about the strategy; use model.mode='drop'."
        )
    sizes = exp.plan(train=False).geometry
    if sizes.suffix and 0 < settings.text <= sizes.prefix:
        raise ValueError(
            f"--text={settings.text}: {name} has {sizes.prefix} text slots before the "
            "image; use more, or 0 for all slots of the config."
        )


class Shared:
    """Arrays that configs have in common: a large model is there once.

    Plans over the same parameters read the same ones; training steps hand the state on.
    """

    def __init__(self):
        self._params: dict[Any, Any] = {}
        self._states: dict[Any, Any] = {}

    def params(self, exp: Experiment, model: nn.Module) -> Mapping[str, Any]:
        """Those of a config, or random ones, as they are read fastest."""
        read = exp.config.workdir if weights.has_checkpoint(exp) else exp.config.init
        settings = read, exp.config.train.seed, exp.config.eval.weights
        key = settings, _structure(exp.placed_params(model))
        if key not in self._params:
            params = weights.to_run(exp, model, fresh=True)
            self._params[key] = weights.prepared(params)
        return self._params[key]

    def start(self, exp: Experiment, parts: train.Parts) -> None:
        """Makes a training state, unless there is one of these shapes."""
        if _trained_arrays(parts) not in self._states:
            self._states[_trained_arrays(parts)] = train.initial_state(exp, parts)

    def state(self, parts: train.Parts) -> tuple[Any, Any]:
        """The state, which an update takes over, and what is frozen."""
        return self._states[_trained_arrays(parts)]

    def keep(self, parts: train.Parts, state: Any, frozen: Any) -> None:
        """Puts an updated state in the place of the one that was taken over."""
        self._states[_trained_arrays(parts)] = state, frozen


class Case:
    """One config: how it runs and, if asked for, how it trains."""

    def __init__(self, name: str, exp: Experiment, settings: Settings, shared: Shared):
        self._name, self._exp = name, exp
        self._running = RUNNING[type(exp)](exp, settings, shared)
        self._training = Training(exp, shared) if settings.train else None

    def run(self, *, timed: bool) -> None:
        """Each program once."""
        self._running.run(timed=timed)
        if self._training:
            self._training.run(timed=timed)

    def result(self) -> Result:
        """Cost, and the times so far."""
        running, training = self._running, self._training
        model, plan = running.model, running.model.plan
        dtype = jnp.dtype(plan.geometry.dtype)
        spent, layout = cost(plan, bytes_per_value=dtype.itemsize), plan.entrance
        parameters = jax.tree.leaves(self._exp.abstract_params(model))
        return Result(
            name=self._name,
            called=self._exp.called,
            dtype=dtype.name,
            parameters=sum(x.size for x in parameters),
            text=layout.length - layout.count("visual"),
            visual=layout.count("visual"),
            language=spent.language,
            vision=spent.vision,
            words=spent.words,
            projector=spent.connector,
            token=spent.decode,
            kv_bytes=spent.kv_bytes,
            computed=cost(plan, pairs="all").prefill,
            **running.result(),
            **(training.result() if training else {}),
        )


class Answering:
    """Prefill and the decode loop of a config."""

    def __init__(self, exp: Conversing, settings: Settings, shared: Shared):
        suffix = settings.text and settings.text - exp.config.text.prefix
        self.model = exp.model(train=False, suffix=suffix)
        # No token is -1, so no answer ends early.
        generator = decode.Generator(self.model, 1 + settings.new_tokens, end=-1)
        self._params, self._key = shared.params(exp, self.model), jax.random.key(0)
        self._prompts = random_batch(exp, self.model, settings.batch, learns=False)
        read = self._params, self._prompts, self._key
        self._prefill = _Program(generator.prefill, *read)
        written = self._prefill(*read)
        self._loop = _Program(generator.loop, self._params, *written, self._key)

    def run(self, *, timed: bool) -> None:
        written = self._prefill(self._params, self._prompts, self._key, timed=timed)
        self._loop(self._params, *written, self._key, timed=timed)

    def result(self) -> dict[str, Timing]:
        """What a `Result` says of running."""
        return {"forward": self._prefill.timing(), "loop": self._loop.timing()}


class Classifying:
    """What the head of a config says."""

    def __init__(self, exp: Encoding, settings: Settings, shared: Shared):
        self.model = exp.model(train=False, suffix=settings.text)
        batch = random_batch(exp, self.model, settings.batch, learns=False)
        self._read = shared.params(exp, self.model), batch
        self._forward = _Program(classify.predictor(self.model), *self._read)

    def run(self, *, timed: bool) -> None:
        self._forward(*self._read, timed=timed)

    def result(self) -> dict[str, Timing]:
        """What a `Result` says of running."""
        return {"forward": self._forward.timing()}


RUNNING = {Conversing: Answering, Encoding: Classifying}


class Training:
    """The update of a config."""

    def __init__(self, exp: Experiment, shared: Shared):
        self._parts, self._shared = train.make_parts(exp), shared
        self._learns = exp.learns(self._parts.abstract_state.learning)
        self._size = exp.config.data.batch_size
        self._sequences = self._size * exp.candidates
        self._batch = random_batch(exp, self._parts.model, self._size, learns=True)
        shared.start(exp, self._parts)
        held = shared.state(self._parts)
        self._update = _Program(self._parts.update, *held, self._batch)

    def run(self, *, timed: bool) -> None:
        state, frozen = self._shared.state(self._parts)
        state, _ = self._update(state, frozen, self._batch, timed=timed)
        self._shared.keep(self._parts, state, frozen)

    def result(self) -> dict[str, Any]:
        """What a `Result` says of training."""
        plan = self._parts.model.plan
        state = self._parts.abstract_state
        each = train_flops(plan, self._learns, pairs="all")
        moments = jax.tree.leaves(state.opt_state)
        return {
            "train_batch": self._size,
            "train_tokens": plan.entrance.length,
            "train_computed": self._sequences * each,
            "train_compiled": compiled_flops(self._update.text),
            "learning": sum(x.size for x in jax.tree.leaves(state.learning)),
            "moments": sum(x.size * x.dtype.itemsize for x in moments),
            "update": self._update.timing(),
        }


class _Program:
    """A function compiled for its arguments, and the seconds of its calls."""

    def __init__(self, jitted: Callable, *args):
        start = time.perf_counter()
        self._compiled = jitted.lower(*args).compile()
        self._compiling = time.perf_counter() - start
        self._rounds: list[float] = []

    def __call__(self, *args, timed: bool = False):
        start = time.perf_counter()
        out = jax.block_until_ready(self._compiled(*args))
        if timed:
            self._rounds.append(time.perf_counter() - start)
        return out

    @property
    def text(self) -> str:
        """As the compiler has optimised it."""
        return self._compiled.as_text()

    def timing(self) -> Timing:
        held = self._compiled.memory_analysis()
        sizes = held.argument_size_in_bytes, held.temp_size_in_bytes
        fresh = held.output_size_in_bytes - held.alias_size_in_bytes  # not donated
        memory = sum(sizes) + fresh
        return Timing(tuple(self._rounds), self._compiling, memory, sizes[1])


def random_batch(exp: Experiment, model: nn.Module, size: int, *, learns: bool):
    """A batch for a model, on its devices."""
    return exp.place(exp.noise(model, size, learns=learns))


def _structure(abstract: Any) -> Any:
    """What two trees of arrays have in common if one may stand for the other."""
    leaves, tree = jax.tree.flatten(abstract)
    return tree, tuple((x.shape, x.dtype, x.sharding) for x in leaves)


def _trained_arrays(parts: train.Parts) -> Any:
    return _structure((parts.abstract_state, parts.abstract_frozen))


def _device_peak() -> int | None:
    found = [device.memory_stats() for device in jax.local_devices()]
    return max((stats["peak_bytes_in_use"] for stats in found if stats), default=None)


# --- The command --------------------------------------------------------------------


def main(argv: list[str], config) -> None:
    asked = flags.FLAGS
    # A program from the cache would have taken no time to compile.
    jax.config.update("jax_enable_compilation_cache", False)
    variants = asked.variant or experiment.build(config).config.bench.variants
    source, overrides = cli.told()
    named = commands(source, variants, overrides)
    experiments = [(n, experiment.build(cli.read_config(words))) for n, words in named]
    settings = Settings(
        asked.batch, asked.text, asked.new_tokens, asked.rounds, asked.train
    )
    found = bench(experiments, settings)
    print(latency.tables(found))
    if asked.out:
        found.write(asked.out)
        print(f"{asked.out} written")


if __name__ == "__main__":
    flags.DEFINE_multi_string("variant", [], "FILE[:arguments], or :arguments.")
    flags.DEFINE_integer("batch", 1, "Prompts or examples at once.", lower_bound=1)
    flags.DEFINE_integer("text", 0, "Text tokens of each; 0: all.", lower_bound=0)
    flags.DEFINE_integer("new_tokens", 32, "Tokens decoded.", lower_bound=1)
    flags.DEFINE_integer("rounds", 7, "Timed rounds.", lower_bound=1)
    flags.DEFINE_bool("train", False, "Time training steps of data.batch_size too.")
    flags.DEFINE_string("out", "", "JSON file to write.")
    cli.run(main)
