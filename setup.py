"""Packaging: the folder ``kernels/`` installs as the import package ``dq_kernels``."""

import re
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "dq_runtime" / "__init__.py").read_text(), re.MULTILINE)[1]
TRITON = 'triton>=3.5; sys_platform == "linux"'  # elsewhere the package runs on CPUs alone
GPU = [TRITON, 'triton-windows>=3.5; sys_platform == "win32"']
DOCS = ["mkdocs-material", "mkdocstrings[python]"]
EVALUATION = ["scikit-image", "matplotlib"]
EXAMPLES = [*EVALUATION, "scikit-learn"]
TEST = [*EXAMPLES, "pytest", "pytest-benchmark", "pytest-xdist", "ruff", "mypy", "build", "transformers", "peft"]

setup(
    name="dq-runtime",
    version=VERSION,
    description="Packed-INT4 diffusion UNets on Triton kernels: DilateQuant for diffusers.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[
        "dq_runtime",
        "dq_runtime.architectures",
        "dq_runtime.calibration",
        "dq_runtime.cli",
        "dq_runtime.evaluation",
        "dq_kernels",
        "dq_kernels.cpu",
        "dq_kernels.triton",
    ],
    package_dir={"dq_kernels": "kernels"},
    package_data={"dq_runtime": ["py.typed"], "dq_kernels": ["py.typed", "triton/tuning/*.json", "cpu/*.cpp"]},
    install_requires=[
        "torch>=2.9",
        TRITON,
        "diffusers>=0.36",
        "numpy",
        "safetensors",
        "tqdm",
        "accelerate",
        "pillow",
        "typer>=0.20",
        "rich>=13.9",
    ],
    entry_points={"console_scripts": ["dq-runtime = dq_runtime.cli.app:app"]},
    extras_require={"gpu": GPU, "evaluation": EVALUATION, "examples": EXAMPLES, "docs": DOCS, "test": TEST},
)
