"""What XLA is told in tests: to compile quickly, which is most of what they cost.

Imported before jax, which reads the environment once.
"""

from __future__ import annotations

import functools
import importlib.util
import mmap
from pathlib import Path

_QUICK = (
    "xla_cpu_use_fusion_emitters=false",  # a gradient compiles three times as fast
    "xla_cpu_parallel_codegen_split_count=1",
    "xla_cpu_use_xnnpack=false",
)


@functools.cache
def quick() -> str:
    """Those flags that the installed jaxlib knows; one that it does not would abort it."""
    (folder,) = importlib.util.find_spec("jaxlib").submodule_search_locations
    files = [*Path(folder).glob("*.so"), *Path(folder).glob("*.dylib")]
    library = max(files, key=lambda file: file.stat().st_size)
    with library.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        known = [
            flag for flag in _QUICK if content.find(flag.split("=")[0].encode()) > 0
        ]
    return " ".join(f"--{flag}" for flag in known)
