from pathlib import Path

from setuptools import find_packages, setup


extras = {
    "demo": ["matplotlib", "scikit-learn"],
    "eval": ["evaluate>=0.4.6", "matplotlib"],
    "test": [
        "evaluate>=0.4.6",
        "matplotlib",
        "pytest",
        "scikit-image",
        "scikit-learn",
        "scipy",
        "tensorboard",
        "torchmetrics>=1.9",
        "vector-quantize-pytorch",
    ],
    "quality": ["mypy", "ruff", "types-PyYAML"],
    "docs": ["hf-doc-builder"],
}
extras["dev"] = sorted({requirement for extra in extras.values() for requirement in extra})

setup(
    name="hf-ifsq",
    version="0.1.0.dev0",
    description="iFSQ image tokenizers, autoregressive and diffusion generators for the Hugging Face ecosystem",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={
        "hf_ifsq": [
            "py.typed",
            "conversion/imagenet_classes.json",
            "training/*.md",
            "vision/lpips_vgg*",
            # Folders that `evaluate` loads, and that can be pushed as Spaces.
            *(f"metrics/*/*.{suffix}" for suffix in ("py", "md", "txt", "html")),
        ]
    },
    python_requires=">=3.11",
    # Upper bounds: see "Private parts of other libraries" in CONTRIBUTING.md.
    install_requires=[
        "accelerate>=1.15",
        "datasets>=5.2",
        "diffusers>=0.42,<0.43",
        "filelock>=3.13",
        "huggingface_hub>=2.4",
        "Jinja2",
        "numpy",
        "Pillow",
        "PyYAML",
        "safetensors>=0.8",
        "torch>=2.6,<2.14",
        "transformers>=5.23",
    ],
    extras_require=extras,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
