"""The table of `docs/scale.md`: programs compiled for TPU slices that are not there.

    python benchmarks/scale_table.py --out=scale
    python benchmarks/scale_table.py --out=scale --only=v5p

Each row is a command `python -m lmm_jax.aot`, one after the other, since one process may
use the TPU compiler at a time; its JSON stays in the folder, and a row that is there
already is not compiled again.
"""

from __future__ import annotations

import json
from pathlib import Path
import re
import subprocess
import sys

from absl import app, flags

_OUT = flags.DEFINE_string("out", "scale", "Folder for the JSON of every row.")
_ONLY = flags.DEFINE_string("only", "", "Rows whose name contains this.")

BIG = "lm=vicuna-13b"
NONE = "--config.model.remat=none"
DOTS, FULL = "--config.model.remat=dots", "--config.model.remat=full"
XLA = "--config.model.attention=xla"
PREFILL = ("--program=prefill", "--config.model.param_dtype=bfloat16")


def batch(size: int) -> str:
    return f"--config.data.batch_size={size}"


def tensor(size: int) -> str:
    return f"--config.mesh.tensor={size}"


def context(size: int) -> str:
    return f"--config.mesh.context={size}"


def prompts(size: int) -> tuple[str, ...]:
    return (*PREFILL, f"--config.eval.batch_size={size}")


def region(layers: str, lm: str = "vicuna-7b") -> str:
    return f"visual_region.py:lm={lm},mode=full,layers={layers}"


# 4 images of 16 views each: 38336 tokens.
LONG = ("llava_hires.py:views=15", ("--config.text.images=4", FULL))
# Name, topology, config, and what else is said. Batches of v5e-256 are one row a chip.
ROWS = (
    ("LLaVA 7B", "v5e-256", "llava.py", (batch(256), DOTS)),
    ("LLaVA 7B, 4 layers", "v5e-256", "llava.py", (batch(256), DOTS, "--depth=4")),
    ("DeepStack 7B", "v5e-256", "deepstack.py", (batch(256), DOTS)),
    (
        "DeepStack 7B, 4 layers",
        "v5e-256",
        "deepstack.py",
        (batch(256), DOTS, "--depth=4"),
    ),
    ("DeepStack 7B, tensor 2", "v5e-256", "deepstack.py", (tensor(2), FULL)),
    ("DeepStack 7B, XLA attention", "v5e-256", "deepstack.py", (tensor(2), FULL, XLA)),
    ("All tokens in context 7B", "v5e-256", "llava_hires.py", (batch(256), FULL)),
    ("FlashSloth", "v5e-256", "flashsloth.py", (batch(256), DOTS)),
    ("LLaVA 13B", "v5e-256", f"llava.py:{BIG}", (batch(256), DOTS)),
    ("DeepStack 13B", "v5e-256", f"deepstack.py:{BIG}", (batch(256), DOTS)),
    ("DeepStack 13B, remat full", "v5e-256", f"deepstack.py:{BIG}", (batch(256), FULL)),
    ("Region 7B, all layers", "v5e-256", region("all"), (batch(256),)),
    ("Region 7B, 8 of 32", "v5e-256", region("paper"), (batch(256),)),
    ("Region 7B, 8 of 32, dots", "v5e-256", region("paper"), (batch(256), DOTS)),
    ("Region 8B, all layers", "v5e-256", region("all", "llama-3-8b"), (batch(256),)),
    ("Region 8B, 8 of 32", "v5e-256", region("paper", "llama-3-8b"), (batch(256),)),
    ("Region 13B, all layers", "v5e-256", region("all", "vicuna-13b"), (batch(256),)),
    ("Region 13B, 9 of 40", "v5e-256", region("paper", "vicuna-13b"), (batch(256),)),
    ("FastV 7B, prefill", "v5e-256", "fastv.py", prompts(256)),
    ("FastV 13B, prefill", "v5e-256", f"fastv.py:{BIG}", prompts(256)),
    ("38k tokens 7B", "v5e-256", LONG[0], (*LONG[1], batch(256))),
    (
        "38k tokens 7B, context 16",
        "v5e-256",
        LONG[0],
        (*LONG[1], batch(16), context(16)),
    ),
    ("LLaVA 7B", "v5p-128", "llava.py", (DOTS,)),
    ("DeepStack 7B", "v5p-128", "deepstack.py", (DOTS,)),
    ("FlashSloth", "v5p-128", "flashsloth.py", (DOTS,)),
    ("LLaVA 13B", "v5p-128", f"llava.py:{BIG}", (DOTS,)),
    ("DeepStack 13B", "v5p-128", f"deepstack.py:{BIG}", (DOTS,)),
    ("Region 7B, 8 of 32", "v5p-128", region("paper"), (NONE,)),
    ("Region 13B, 9 of 40", "v5p-128", region("paper", "vicuna-13b"), (DOTS,)),
    ("FastV 7B, prefill", "v5p-128", "fastv.py", prompts(64)),
    ("FastV 13B, prefill", "v5p-128", f"fastv.py:{BIG}", prompts(64)),
)
HEAD = """\
| program | slice | examples | tensor, remat | HBM | TFLOP | moved | step | MFU | built |
|---|---|--:|---|--:|--:|--:|--:|--:|--:|"""


def record(file: Path, topology: str, config: str, words: tuple[str, ...]) -> dict:
    """Of a file, or of the command that writes it."""
    if not file.exists():
        command = [sys.executable, "-m", "lmm_jax.aot", f"--config=configs/{config}"]
        command += [f"--topology={topology}", f"--json={file}", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(file.read_text())[0]


def line(name: str, topology: str, found: dict) -> str:
    """A row of the table, sizes and times of one chip."""
    shown = [name, topology, f"{found['examples']}"]
    shown.append(f"{found['tensor']}, {found['remat']}")
    gib = sum(found["memory"].values()) / 2**30
    shown.append(f"{gib:.1f} GiB ({found['memory_share']:.0%})")
    if found["fits"]:
        moved = sum(kind["bytes"] for kind in found["collectives"].values())
        shown += [f"{found['flops'] / 1e12:.1f}", f"{moved / 1e9:.1f} GB"]
        shown.append(f"{found['seconds']['step']:.3f} s")
        shown.append(f"{found['utilisation']:.0%}")
    else:
        shown += ["", "", "does not fit", ""]
    shown.append(f"{found['compile_seconds']:.0f} s")
    return f"| {' | '.join(shown)} |"


def main(argv: list[str]) -> None:
    folder = Path(_OUT.value)
    folder.mkdir(parents=True, exist_ok=True)
    print(HEAD, flush=True)
    for name, topology, config, words in ROWS:
        row = f"{name} {topology}"
        if _ONLY.value in row:
            file = folder / f"{re.sub(r'[^a-z0-9]+', '-', row.lower())}.json"
            print(
                line(name, topology, record(file, topology, config, words)), flush=True
            )


if __name__ == "__main__":
    app.run(main)
