"""Sums of gradients over devices, beside products instead of between them.

The TPU compiler can run a sum in pieces while products go on, on v5e only ("continuation
fusion"; it refuses to elsewhere), and does so if it is told to. Sums that it has merged
into one must wait, so it may merge small ones alone. On 256 chips this takes a tenth off a
step of 7B, as estimated (`docs/scale.md`).
"""

from __future__ import annotations

import jax

OPTIONS = {  # by kind of device
    "TPU v5 lite": {
        "xla_enable_async_all_reduce": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
        "xla_jf_crs_combiner_threshold_in_bytes": str(16 * 2**20),
    }
}


def options(device: jax.Device) -> dict[str, str] | None:
    """For `compiler_options` of `jax.jit`; None where there is nothing to say."""
    return OPTIONS.get(device.device_kind)
