"""Packaging: three source roots (ssl/, eval/, launch/) and the recipes of configs/ make one distribution.

Settings of the tools live in pyproject.toml.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
ROOTS = {"quietvit": "ssl", "quietvit_eval": "eval", "quietvit_launch": "launch"}
FORMATS = {
    "timm": ["timm>=1.0.9"],  # the first with the vit_*_reg4_dinov2 models and local folders
    "transformers": ["transformers>=4.48"],  # the first with Dinov2WithRegistersModel
    "onnx": ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"],
}


def packages() -> list[str]:
    """Every import package of the three roots, and the recipes as quietvit.configs."""
    found = [p for name, root in ROOTS.items() for p in find_packages(str(HERE / root), include=[name, f"{name}.*"])]
    return [*found, "quietvit.configs"]


setup(
    name="quietvit",
    version="0.1.0",
    description="Self-supervised pretraining of vision transformers with registers, and what their features are worth",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=packages(),
    package_dir={name: f"{root}/{name}" for name, root in ROOTS.items()} | {"quietvit.configs": "configs"},
    package_data={name: ["py.typed", "templates/*.html"] for name in ROOTS} | {"quietvit.configs": ["**/*.yaml"]},
    install_requires=[
        "torch>=2.10",
        "numpy>=2.0",
        "pillow>=10.3",
        "opencv-python-headless>=4.10",
        "omegaconf>=2.3",
        "safetensors>=0.4.3",
        "rich>=13.7",
        "tensorboard>=2.17",
        "jaxtyping>=0.2.34",
        "psutil>=6.0",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "pyarrow>=17.0",  # embeddings as .parquet
        "scikit-learn>=1.5",  # logistic regression, patch probe
        "scipy>=1.13",  # splits.mat of NYUd
        "h5py>=3.11",  # nyu_depth_v2_labeled.mat
        "fvcore>=0.1.5.post20221221",  # multiply-adds of `quietvit info`
        "submitit>=1.5.2",  # jobs on Slurm
    ],
    extras_require={
        "cuda": ["xformers>=0.0.34"],  # the first built for torch 2.10
        # `quietvit export --to ...` writes for these and compares through them; nothing else needs them.
        **FORMATS,
        "dev": [
            *(requirement for needed in FORMATS.values() for requirement in needed),
            "open-clip-torch>=2.30",  # test oracle of its visual towers
            "hypothesis>=6.100",
            "import-linter>=2.1",
            "mypy>=1.13",
            "pytest>=8.3",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.8",
            "torchmetrics>=1.6",  # test oracle of the metrics
            "setuptools>=77",  # tests/layout builds the wheel without the network
            "torchvision>=0.25",  # test oracle of the augmentation; 0.25 is the one made for torch 2.10
        ],
    },
    entry_points={"console_scripts": ["quietvit = quietvit_launch.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
)
