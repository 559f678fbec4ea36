"""What XLA is told of the devices that it compiles an update for."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from lmm_jax import experiment
from lmm_jax.compiled import programs
from lmm_jax.parallel import overlap
from tests.small import small_config


def test_only_kinds_that_can_are_told():
    v5e, v5p = (SimpleNamespace(device_kind=f"TPU v5{x}") for x in (" lite", ""))
    assert "xla_enable_async_all_reduce" in overlap.options(v5e)
    assert overlap.options(v5p) is None
    assert overlap.options(jax.devices()[0]) is None


@pytest.mark.parametrize("wanted", [True, False])
def test_an_update_is_compiled_with_what_its_devices_are_told(
    wanted, tmp_path, monkeypatch
):
    """An option that no compiler has is refused by name, if it comes there."""
    monkeypatch.setitem(overlap.OPTIONS, "cpu", {"xla_none_such": "true"})
    config = small_config(tmp_path, "llava")
    config.train.overlap = wanted
    lowered = programs.lower(experiment.build(config, jax.devices()[:1]), "update")
    if wanted:
        with pytest.raises(jax.errors.JaxRuntimeError, match="xla_none_such"):
            lowered.program.compile()
    else:
        lowered.program.compile()
