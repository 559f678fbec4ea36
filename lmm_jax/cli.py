"""What every command shares: the config flag, plain errors, the compilation cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import logging as std_logging
import os
from pathlib import Path
import sys
import traceback

from absl import app, flags, logging
import jax
import ml_collections
from ml_collections import config_flags

from lmm_jax import run_config
from lmm_jax.parallel.mesh import start_processes
from lmm_jax.runs import load_run

OVERRIDE = "--config."
_WORKDIR = f"{OVERRIDE}workdir"
# How ml_collections reports an unknown field, a wrong type or a missing file.
_ILL_TOLD = (flags.Error, AttributeError, KeyError, TypeError, FileNotFoundError)

_LOST = (
    "another process of the job has probably ended; its own log says why. Started again on "
    "all hosts, the same command goes on from the last checkpoint."
)


def run(main: Callable[[list[str], ml_collections.ConfigDict], None]) -> None:
    """Runs a command with `--config=FILE[:arguments]` and `--config.field=value`.

    Without a file, `--config.workdir=DIR` takes the config that the run in DIR was made
    with. Expected failures (ValueError, CheckpointError, OSError ...) end with one
    message and exit code 1; `LMM_JAX_TRACEBACK=1` shows where they came from.
    """
    flag = config_flags.DEFINE_config_file("config", default=_default_config(sys.argv))

    def guarded(argv: list[str]) -> None:
        logging.set_verbosity(logging.INFO)
        # On a machine without a TPU, JAX says so at length, and that is all.
        std_logging.getLogger("jax._src.xla_bridge").setLevel(std_logging.WARNING)
        start_processes()
        enable_compilation_cache()
        if flag.value is None:
            _fail("no config: give --config=FILE, or --config.workdir=DIR of a run")
        try:
            main(argv, flag.value)
        except EXPECTED as error:
            if os.environ.get("LMM_JAX_TRACEBACK"):
                traceback.print_exc()
            _fail(str(error))
        except Exception as error:
            if not jax.distributed.is_initialized():
                raise
            traceback.print_exc()
            if isinstance(error, jax.errors.JaxRuntimeError):
                _fail(_LOST)
            _leave(1)

    try:
        app.run(guarded, flags_parser=_parse_flags)
    except EXPECTED as error:
        _fail(str(error))


def read_config(words: Sequence[str]) -> ml_collections.ConfigDict:
    """The config that these words of a command line name.

    Args:
        words: `--config=FILE[:arguments]`, then any `--config.field=value`.

    Raises:
        ValueError: a file or a field that does not exist, or a value of another type.
    """
    own = flags.FlagValues()
    flag = config_flags.DEFINE_config_file("config", flag_values=own, sys_argv=words)
    try:
        own(["", *words])
    except _ILL_TOLD as error:
        raise ValueError(_told(error)) from error
    return flag.value


def told() -> tuple[str, list[str]]:
    """What this command was told, to pass it on: FILE[:arguments] of `--config`, and a word
    `--config.field=value` for every override."""
    flag = flags.FLAGS["config"]
    changed = config_flags.get_override_values(flag)
    words = [f"{OVERRIDE}{field}={value}" for field, value in changed.items()]
    return flag.config_filename, words


def enable_compilation_cache() -> None:
    """Keeps compiled programs between starts, unless the user chose a place."""
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(cache / "lmm_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except _ILL_TOLD as error:
        _fail(_told(error))


def _told(error: Exception) -> str:
    plain = isinstance(error, flags.Error) or not error.args
    told = error if plain else error.args[0]
    if isinstance(told, KeyError) and " " not in str(told):  # it says no more than that
        name = str(told).strip("\"'")
        return f"the config has no field {name!r} there; config.json of a run shows all"
    return str(told)


def _default_config(argv: list[str]) -> str | None:
    """The config of the run in `--config.workdir`, unless a file is given."""
    if any(word.startswith(("--config=", "-config=")) for word in argv):
        return None
    words = iter(argv)
    for word in words:
        name, equals, workdir = word.partition("=")
        if name == _WORKDIR:
            workdir = workdir if equals else next(words, "")
            try:
                load_run(workdir)  # a flag's own error would come with a traceback
            except ValueError as error:
                _fail(str(error))
            return f"{run_config.__file__}:{workdir}"
    return None


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    _leave(1)


def _leave(code: int) -> None:
    """Ends this process. One of several must not wait for the others, which may be waiting
    for it in a collective: they learn of its end from its silence."""
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def _expected() -> tuple[type[BaseException], ...]:
    from lmm_jax.checkpoint.state import CheckpointError
    from lmm_jax.data.pipeline import BadRecord, TooManyBadRecords
    from lmm_jax.metrics import NonFiniteLoss

    own = (CheckpointError, BadRecord, TooManyBadRecords, NonFiniteLoss)
    return (ValueError, OSError, *own)


EXPECTED = _expected()
