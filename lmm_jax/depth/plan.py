"""Prints the depth plan of a config; allocates nothing.

python -m lmm_jax.depth.plan --config=configs/fastv.py:keep=144
"""

from __future__ import annotations

from absl import flags
import jax

from lmm_jax import cli, experiment
from lmm_jax.depth.table import table

_TEXT = flags.DEFINE_integer("text", 128, "Text tokens of the prompt.")
_TRAIN = flags.DEFINE_bool("train", False, "The plan for learning, not for running.")


def main(argv: list[str], config) -> None:
    exp = experiment.build(config)
    model = exp.model(train=_TRAIN.value)
    plan = model.plan
    leaves = jax.tree.leaves(exp.abstract_params(model))
    count = sum(leaf.size for leaf in leaves)
    visual = plan.geometry.images * plan.tokens_per_image
    print(
        f"{exp.config.name}: {exp.called}, {count:,} parameters\n"
        f"prompt of {_TEXT.value} text + {visual} visual tokens, bfloat16 cache"
    )
    print(table(plan, text=_TEXT.value))


if __name__ == "__main__":
    cli.run(main)
