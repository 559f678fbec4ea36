"""Ahead-of-time compilation: what it counts and what it refuses."""

from __future__ import annotations

import jax
import pytest

from lmm_jax import aot, train
from tests.parallel.test_sharding import on_mesh
from tests.small import small_config


@pytest.mark.parametrize("mesh", ["one", "fsdp"])
def test_memory_of_a_step_is_what_its_program_holds(mesh, tmp_path):
    exp = on_mesh(small_config(tmp_path), mesh)
    program, memory = aot.compiled(exp)
    # The host keeps what the program does not read, such as roles.
    arguments = program.memory_analysis().argument_size_in_bytes
    assert 0.95 * sum(memory.held.values()) < arguments <= sum(memory.held.values())
    assert memory.temporary > 0
    learning = jax.tree.leaves(train.make_parts(exp).abstract_state.learning)
    whole = sum(x.size * x.dtype.itemsize for x in learning)
    share = memory.held["parameters that learn"] / whole
    assert share == 1 if mesh == "one" else 1 / 8 <= share < 1 / 4
    # Adam keeps two moments of each.
    assert memory.held["optimizer state"] >= 2 * memory.held["parameters that learn"]


def test_the_table_says_whether_it_fits():
    memory = aot.Memory({"parameters that learn": 3 * 2**30}, 2**30)
    assert "3.00 GiB" in aot.table(memory, 5 * 2**30)
    assert aot.table(memory, 4 * 2**30).endswith("4.00 GiB of 4: fits")
    assert "does not fit: more chips" in aot.table(memory, 4 * 2**30 - 1)


@pytest.mark.parametrize("topology", ["v5e", "v9:2x2", ""])
def test_unknown_slices_are_refused(topology):
    with pytest.raises(ValueError, match="GENERATION:SHAPE, for example v5e:16x16"):
        aot.slice_devices(topology)
