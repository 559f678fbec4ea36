"""Plans: what is cut where, and every refusal."""

from __future__ import annotations

import dataclasses

import pytest

from lmm_jax import strategies
from lmm_jax.depth import (
    CONNECTOR,
    Connect,
    Cut,
    Feed,
    Fold,
    Inject,
    Layer,
    Reduce,
    Scan,
    Site,
    Tune,
    before,
    inside,
    make_plan,
)
from lmm_jax.depth.table import table
from lmm_jax.models import lmm
from lmm_jax.models.specs import LMMSpec, named


def geometry(crops=4, **changes):
    spec = LMMSpec(named("vision", "clip-l-336"), named("language", "vicuna-7b"))
    g = lmm.geometry(spec, images=1, crops=crops, prefix=64, suffix=64)
    return dataclasses.replace(g, **changes)


def nothing(*args):
    raise AssertionError("a plan never calls an op")


def cut(layer=2, to=100, observe=(), name="a", span="visual"):
    return Reduce(name, before(layer), to, nothing, observe, span)


def test_no_edits_is_one_scan():
    plan = make_plan(geometry(), ())
    assert plan.language == (Scan(0, 32),)
    assert plan.vision == (Scan(0, 23),)
    assert plan.tokens_per_image == 576


def test_a_cut_observes_the_layer_before_it_alone():
    plan = make_plan(geometry(), (cut(2, 144, ("last_attention",)),))
    kinds = [type(step) for step in plan.language]
    assert kinds == [Scan, Layer, Cut, Scan]
    assert plan.language[1].index == 1
    assert [layout.count("visual") for layout in plan.layouts] == [576, 576, 144, 144]


def test_a_cut_without_observation_leaves_scans_whole():
    plan = make_plan(geometry(), (cut(7),))
    assert plan.language == (Scan(0, 7), Cut((cut(7),)), Scan(7, 32))


def test_a_cut_inside_a_layer():
    edit = Reduce("a", inside(5), 99, nothing)
    plan = make_plan(geometry(), (edit,))
    assert plan.language[1] == Layer(5, (), (edit,))
    assert plan.layouts[1].count("visual") == 99


@pytest.mark.parametrize(
    ("layers", "scans"),
    [
        ((1, 2, 3, 4), [(0, 1, 1, None), (1, 5, 1, (0, 4)), (5, 32, 1, None)]),
        ((0, 1), [(0, 2, 1, (0, 2)), (2, 32, 1, None)]),
        ((1, 3, 5, 7), [(0, 1, 1, None), (1, 9, 2, (0, 4)), (9, 32, 1, None)]),
        (
            (4, 5, 9),
            [
                (0, 4, 1, None),
                (4, 6, 1, (0, 2)),
                (6, 9, 1, None),
                (9, 10, 1, (2, 3)),
                (10, 32, 1, None),
            ],
        ),
        ((30, 31), [(0, 30, 1, None), (30, 32, 1, (0, 2))]),
    ],
)
def test_injections_ride_along_as_scanned_operands(layers, scans):
    plan = make_plan(geometry(), (Inject("x", layers, nothing),))
    expected = tuple(
        Scan(start, stop, period, (Feed("x", *rows),) if rows else ())
        for start, stop, period, rows in scans
    )
    assert plan.language == expected


@pytest.mark.parametrize(
    ("layers", "before", "after"),
    [
        ((0, 1), (), (Scan(0, 2, 1, (Feed("x", 0, 2),)), Scan(2, 23))),
        ((4,), (Scan(0, 4),), (Scan(4, 5, 1, (Feed("x", 0, 1),)), Scan(5, 23))),
        (
            (20, 21, 22, 23),
            (Scan(0, 20),),
            (Scan(20, 23, 1, (Feed("x", 0, 3),)), Cut(feeds=(Feed("x", 3, 4),))),
        ),
        ((23,), (Scan(0, 23),), (Cut(feeds=(Feed("x", 0, 1),)),)),
    ],
)
def test_views_end_where_they_are_stacked_into_the_vision_layers(layers, before, after):
    edit = Inject("x", layers, nothing, stack="vision")
    plan = make_plan(geometry(), (edit,))
    assert plan.vision == (*before, Fold(5, edit), *after)
    assert plan.language == (Scan(0, 32),)
    assert plan.injects == ()


def test_the_vision_stack_is_cut_where_features_are_read():
    edits = (
        Inject("x", (1, 2), nothing, taps=(7, 3)),
        Inject("y", (4,), nothing, taps=(3, 22)),
    )
    plan = make_plan(geometry(), edits)
    assert plan.taps == (3, 7, 22)
    assert plan.vision == (Scan(0, 4), Scan(4, 8), Scan(8, 23))


@pytest.mark.parametrize("first", range(5))
@pytest.mark.parametrize("second", range(5, 9))
def test_every_layer_runs_once_and_every_row_is_fed_once(first, second):
    edits = (
        Inject("x", tuple(range(first, 30, 3)), nothing),
        Inject("y", (second, second + 1, second + 7), nothing),
        cut(first + 1, 300, ("last_attention",)),
        cut(second + 3, 100, name="b"),
    )
    plan = make_plan(geometry(), edits)
    layers, fed = [], []
    for step in plan.language:
        if isinstance(step, Cut):
            continue
        layers += range(step.start, step.stop)
        period = getattr(step, "period", 1)
        for feed in step.feeds:
            for i, row in enumerate(range(feed.start, feed.stop)):
                fed.append((feed.source, row, step.start + i * period))
    assert layers == list(range(32))
    wanted = [
        (e.name, row, layer)
        for e in edits
        if isinstance(e, Inject)
        for row, layer in enumerate(e.layers)
    ]
    assert sorted(fed) == sorted(wanted)


def test_learning_layers_get_scans_of_their_own():
    plan = make_plan(geometry(), (Tune("language", (4, 5, 12)),))
    edges = [(step.start, step.stop) for step in plan.language]
    assert edges == [(0, 4), (4, 6), (6, 12), (12, 13), (13, 32)]
    learns = [step.learns for step in plan.language]
    assert learns == [False, True, False, True, False]
    assert all(step.learns for step in plan.vision)


def test_a_stack_of_which_nothing_learns_is_one_frozen_scan():
    tunes = Tune("language", ()), Tune("vision", (20, 21, 22, 23))
    plan = make_plan(geometry(), tunes)
    (scan,) = plan.language
    assert table(plan).count("frozen") == 1
    assert (scan.start, scan.stop, scan.learns) == (0, 32, False)
    vision = [(step.start, step.stop, step.learns) for step in plan.vision]
    assert vision == [(0, 20, False), (20, 23, True)]  # the last layer does not run


def test_connector_reductions_chain():
    edits = (
        Connect("c", 144, nothing),
        Reduce("a", CONNECTOR, 72, nothing),
    )
    plan = make_plan(geometry(), edits)
    assert plan.tokens_per_image == 72
    assert make_plan(geometry(), edits, mode="mask").entrance.count("visual") == 144


def test_plans_are_hashable_and_equal():
    one, two = (make_plan(geometry(), (cut(),)) for _ in range(2))
    assert one == two and hash(one) == hash(two)


STACKED = Inject("s", (20, 21), nothing, stack="vision")
PARALLEL = dataclasses.replace(geometry().language, parallel=True)


@pytest.mark.parametrize(
    ("edits", "changes", "says"),
    [
        ((cut(2, 700),), {}, "keeps 700 visual tokens, but only 576 are alive"),
        ((cut(2, 9), cut(4, 10, name="b")), {}, "only 9 are alive before language"),
        ((cut(32),), {}, r"use a\s+layer in 0..31|layer in 0..31"),
        ((cut(-1),), {}, "layer in 0..31"),
        ((cut(2, -1),), {}, "keeps -1"),
        ((cut(0, 9, ("last_attention",)),), {}, "no attention has run yet"),
        ((cut(2, 9, ("dreams",)),), {}, "attention can show last_attention"),
        ((cut(), cut()), {}, "must be unique"),
        ((cut(), cut(name="b")), {}, "both cut 'visual' at before language layer 2"),
        ((Reduce("a", inside(2), 9, nothing),), {"language": PARALLEL}, "are parallel"),
        ((Reduce("a", Site("vision", 2), 9, nothing),), {}, "placed in the 'vision'"),
        (
            (Reduce("a", CONNECTOR, 9, nothing, ("last_attention",)),),
            {},
            "at the connector, where no language layer has run",
        ),
        ((Inject("a", (31, 33), nothing),), {}, r"before layers \[33\]"),
        ((Inject("a", (3, 2), nothing),), {}, "must ascend"),
        ((Inject("a", (24,), nothing, stack="vision"),), {}, "the stack has 23"),
        (
            (STACKED, Inject("a", (1,), nothing)),
            {},
            "s ends them before vision layer 20",
        ),
        ((STACKED, Connect("a", 9, nothing)), {}, "a may read hi-res views"),
        (
            (STACKED, Inject("a", (3,), nothing, stack="vision")),
            {},
            "a ends them before vision layer 3",
        ),
        ((STACKED,), {"passes": 5}, "choose another vision tower"),
        ((STACKED,), {"fixed_grid": None}, "choose another vision tower"),
        (
            (Inject("a", (1,), nothing, taps=(3, 23)),),
            {},
            r"a reads features after vision layers \[23\], but 23 run",
        ),
        (
            (Inject("a", (1,), nothing, taps=(3,)),),
            {"passes": 5},
            "choose another vision tower",
        ),
        (
            (Connect("a", 9, nothing), Connect("b", 9, nothing)),
            {},
            "both replace the connector",
        ),
        ((Tune("language", (40,)),), {}, r"layers \[40\]"),
        ((Tune("fusion", (1,)),), {}, "'fusion'"),
        ((Tune("vision", (1,)), Tune("vision", (2,))), {}, "two Tunes .* vision"),
    ],
)
def test_refusals_name_the_edit_and_the_remedy(edits, changes, says):
    with pytest.raises(ValueError, match=says):
        make_plan(geometry(**changes), edits)


@pytest.mark.parametrize(
    ("chosen", "crops", "says"),
    [
        (
            {"fast_v": {}},
            4,
            "strategy 'fast_v' does not exist; there are anyres, average_pool",
        ),
        ({"fastv": {"keeps": 3}}, 4, "no argument keeps; it takes layer, keep, score"),
        ({"fastv": {"layer": 0}}, 4, r"use 1..31"),
        ({"fastv": {"score": "best"}}, 4, "'last' or 'mean'"),
        ({"deepstack": {}}, 0, "image.crops=0"),
        ({"deepstack": {"interval": 0}}, 4, "interval >= 1"),
        ({"deepstack": {"groups": 5}}, 4, "groups=5"),
        ({"deepstack_hd": {}}, 4, "image.fine=0"),
        ({"deepstack_v": {}}, 0, "deepstack_v stacks hi-res views, but image.crops=0"),
        ({"deepstack_v": {"start": -1}}, 4, "deepstack_v.start=-1"),
        ({"llava_hires": {}}, 0, "image.crops=0"),
        ({"average_pool": {"factor": 5}}, 0, "does not divide the 24 x 24"),
    ],
)
def test_strategies_refuse_with_the_remedy(chosen, crops, says):
    with pytest.raises(ValueError, match=says):
        strategies.build(chosen, geometry(crops=crops))


def test_groups_behind_the_last_layer_are_left_out():
    (edit,) = strategies.build({"deepstack": {"start": 30}}, geometry())
    assert edit.layers == (30, 31)
    assert strategies.build({"deepstack": {"start": 32}}, geometry()) == ()
    (edit,) = strategies.build({"deepstack_v": {"start": 21}}, geometry())
    assert edit.layers == (21, 22, 23)
    assert strategies.build({"deepstack_v": {"start": 24}}, geometry()) == ()


def test_table():
    edits = strategies.build({"fastv": {"keep": 144}}, geometry(crops=0))
    text = table(make_plan(geometry(crops=0), edits), text=128)
    lines = text.split("\n")
    assert lines[1].split() == ["scan", "0", "576", "128", "289.0", "11.0"]
    assert lines[2].endswith("shows last_attention")
    assert lines[3].endswith("keep 144 visual")
    assert "0.422 x / 0.425 x of the baseline" in lines[5]
    assert "on average: 171" in text
    masked = make_plan(geometry(crops=0), edits, mode="mask")
    assert "nothing is saved" in table(masked)


def test_the_table_says_where_views_are_stacked():
    edits = strategies.build({"deepstack_v": {}}, geometry())
    (vision,) = (
        line
        for line in table(make_plan(geometry(), edits)).split("\n")
        if line.startswith("vision")
    )
    assert vision.endswith(
        "5 views before layer 20, from there on 1 + deepstack_v[0:4]"
    )
