"""Ahead-of-time compilation: what it counts, and what it says to do."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import jax
import pytest

from lmm_jax import aot, train
from lmm_jax.aot import Setting
from lmm_jax.compiled import programs, report
from lmm_jax.compiled.report import Memory, Report
from lmm_jax.compiled.tpu import Slice
from lmm_jax.depth.cost import cost, train_flops
from tests.parallel.test_sharding import on_mesh
from tests.small import small_config

SLICE = Slice("v5e", (2, 4))
GIB = report.GIB


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    """An experiment on eight devices."""
    return on_mesh(small_config(tmp_path_factory.mktemp("aot")), "fsdp")


@pytest.fixture(scope="module")
def reports(fsdp):
    """Its programs, as if the devices of CPU were those of a slice."""
    chips = [SimpleNamespace(coords=divmod(i, 4)) for i in range(8)]
    return {
        name: report.compile_for(programs.lower(fsdp, name), SLICE, chips)
        for name in programs.NAMES
    }


def test_memory_of_a_step_is_what_its_program_holds(fsdp, reports):
    memory = reports["update"].memory
    program = programs.lower(fsdp, "update").program.compile()  # kept by JAX's cache
    # The host keeps what the program does not read, such as roles.
    arguments = program.memory_analysis().argument_size_in_bytes
    assert 0.95 * sum(memory.held.values()) < arguments <= sum(memory.held.values())
    assert memory.temporary > 0
    assert memory.output < 2000  # scalars: the state is overwritten
    learning = jax.tree.leaves(train.make_parts(fsdp).abstract_state.learning)
    whole = sum(x.size * x.dtype.itemsize for x in learning)
    assert 1 / 8 <= memory.held["parameters that learn"] / whole < 1 / 4
    # Adam keeps two moments of each.
    assert memory.held["optimizer state"] >= 2 * memory.held["parameters that learn"]


def test_products_are_those_of_the_cost_table(fsdp, reports):
    """A row on each device; what is computed is all pairs, seen or not."""
    counted = cost(fsdp.plan(train=False), pairs="all")
    found = {name: each.work.flops for name, each in reports.items()}
    assert found["prefill"] == pytest.approx(counted.prefill, rel=0.01)
    # A token reads the slots of all the answer, filled or not.
    assert found["decode"] == pytest.approx(counted.decode, rel=0.1)
    learning = fsdp.learns(train.make_parts(fsdp).abstract_state.learning)
    learned = train_flops(fsdp.plan(train=True), learning, pairs="all")
    assert found["update"] == pytest.approx(learned, rel=0.1)
    assert {each.work.unknown for each in reports.values()} == {0}


def test_parameters_are_gathered_layer_by_layer(fsdp, reports):
    """In the loops over layers, forward and backward; never a whole stack before."""
    found = [
        op
        for op in reports["update"].work.collectives
        if op.kind == "all-gather" and "stack." in op.scope
    ]
    stack = fsdp.placed_params(fsdp.model(train=True))["language"]["stack"]
    kernels = [x for x in jax.tree.leaves(stack) if x.ndim > 2]
    layer = {x.size // len(x) * x.dtype.itemsize for x in kernels}
    assert layer <= {op.moved for op in found if op.loops}
    # Runs of a single layer are no loops.
    assert max(op.moved for op in found) <= max(layer)


def test_each_device_keeps_the_cache_of_its_own_rows(fsdp, reports):
    """Also the part that is still empty."""
    generator, *prompts = programs._prompts(fsdp)
    _, cache = jax.eval_shape(generator.prefill, *prompts)
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    assert reports["decode"].memory.held["cache"] == pytest.approx(whole / 8, rel=0.01)


def test_a_report_says_it_all(reports):
    text = report.table(reports["update"])
    for said in ("optimizer state", "all-gather", "utilisation", ": fits"):
        assert said in text
    assert "cache" in report.table(reports["decode"])
    record = reports["update"].record()
    assert record["collectives"]["all-gather"]["count"] > 0
    assert record["seconds"]["step"] == reports["update"].estimate.step
    assert json.loads(json.dumps(record)) == record


def test_what_another_compiler_wrote_is_refused_with_a_remedy():
    def as_text():
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nmore")

    with pytest.raises(ValueError, match=r"RET_CHECK failure\): pip install 'jax\[tpu"):
        report.text_of(SimpleNamespace(as_text=as_text))


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("memory required for HLO temporaries (293.49G) exceeds available", 293.49),
        ("Used 20.1G of 15.7G hbm. Total: reserved 1M, program 19.5G, args 1G", 19.5),
    ],
)
def test_an_overflow_tells_what_was_needed(text, size):
    error = RuntimeError(f"RESOURCE_EXHAUSTED: {text}")
    assert report.needed(error) == int(size * GIB)
    with pytest.raises(RuntimeError, match="INTERNAL"):
        report.needed(RuntimeError("INTERNAL: something else"))


def overflowing(held: float) -> Report:
    """Of so many GiB that are there before a step."""
    memory = Memory({"parameters that learn": int(held * GIB)}, 20 * GIB)
    return Report(SLICE, memory, 1.0, 8, 1e12)


def test_what_does_not_fit_gets_a_remedy(tmp_path):
    exp = on_mesh(small_config(tmp_path), "one")
    assert "does not fit" in report.table(overflowing(1))
    assert "more chips" in aot.remedy(exp, "update", overflowing(15))
    assert "model.remat=full" in aot.remedy(exp, "update", overflowing(1))
    full = Setting(1, "full", 2).of(exp)
    assert "train.accumulate=4" in aot.remedy(full, "update", overflowing(1))
    assert "eval.chunk" in aot.remedy(exp, "prefill", overflowing(1))
    exp = on_mesh(small_config(tmp_path), "fsdp")
    many = Setting(1, "full", 8).of(exp)
    assert "1 rows at a time" in aot.remedy(many, "update", overflowing(1))


def test_a_sweep_skips_what_cannot_be_and_what_cannot_be_faster(tmp_path, monkeypatch):
    exp = on_mesh(small_config(tmp_path), "fsdp")
    done = overflowing(1)
    fits = dataclasses.replace(done, memory=Memory({}, GIB), work=())

    def compiled(exp, name, chips):
        return fits if exp.config.train.accumulate >= 2 else done

    monkeypatch.setattr(aot, "compiled", compiled)
    choices = dict(tensor=[1, 2, 3], remat=["full"], accumulate=[4, 2, 1])
    found = [
        (s.tensor, s.accumulate) for s, _ in aot.sweep(exp, "update", SLICE, **choices)
    ]
    assert found == [(1, 1), (2, 1), (2, 2)]  # 8 rows; 3 does not divide 8 chips
