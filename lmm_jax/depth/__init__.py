"""The depth plan: what happens to the token set along the depth of a network."""

from lmm_jax.depth.edits import (
    CONNECTOR,
    Connect,
    Edit,
    Inject,
    Project,
    Query,
    Reduce,
    ReduceOp,
    Site,
    Tune,
    before,
    inside,
)
from lmm_jax.depth.geometry import Geometry, StackGeometry
from lmm_jax.depth.layout import Layout, Span
from lmm_jax.depth.planner import Cut, Feed, Fold, Layer, Plan, Scan, make_plan
from lmm_jax.depth.roles import Role
from lmm_jax.depth.state import (
    Context,
    Keep,
    Keys,
    Memory,
    Mix,
    Observation,
    Place,
    TokenState,
    VisionFeatures,
)

__all__ = [
    "CONNECTOR",
    "Connect",
    "Context",
    "Cut",
    "Edit",
    "Feed",
    "Fold",
    "Geometry",
    "Inject",
    "Keep",
    "Keys",
    "Layer",
    "Layout",
    "Memory",
    "Mix",
    "Observation",
    "Place",
    "Plan",
    "Project",
    "Query",
    "Reduce",
    "ReduceOp",
    "Role",
    "Scan",
    "Site",
    "Span",
    "StackGeometry",
    "TokenState",
    "Tune",
    "VisionFeatures",
    "before",
    "inside",
    "make_plan",
]
