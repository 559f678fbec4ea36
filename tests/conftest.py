"""Once for all tests: CPU with 8 virtual devices, cached compilation, exact products."""

from __future__ import annotations

import gc
import os
from pathlib import Path
import tempfile

from tests import flags

os.environ["JAX_PLATFORMS"] = "cpu"
_FLAGS = f"--xla_force_host_platform_device_count=8 {flags.quick()}"
if _FLAGS not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
# XLA's threads. Each collective of each virtual device waits in one; with as many as there
# are devices, which is the default on a small machine, two that started two collectives in
# other orders wait for each other until XLA aborts.
os.environ.setdefault("PJRT_NPROC", "32")

import jax  # noqa: E402 (after the environment is set)
import pytest  # noqa: E402

from tests.tiny import Tiny  # noqa: E402

_CACHE = Path(tempfile.gettempdir()) / f"lmm_jax-tests-{os.getuid()}"
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_default_matmul_precision", "highest")
# Compiling, not running, is what these tests cost: 2-3 x less without optimisation.
jax.config.update("jax_disable_most_optimizations", True)
# Tracing makes many objects that stay; looking through them for garbage again and again
# is a tenth of the time.
gc.set_threshold(100_000, 20, 100)


# A worker that took one of these last would work alone.
_LONG = ("test_train.py", "test_laws.py", "test_processes.py", "test_sharding.py")


def pytest_collection_modifyitems(items):
    """Files that take minutes first, in that order."""
    order = {name: place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.fixture(scope="session")
def tiny() -> Tiny:
    """A small random model and a batch with padding, a text-only row and two images."""
    return Tiny.make()


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module():
    """Thousands of compiled programs would add up to gigabytes in a worker."""
    yield
    jax.clear_caches()
    gc.collect()
