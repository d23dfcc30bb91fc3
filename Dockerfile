# Image of open HyperVL for Cloud TPU (GKE, xpk, TPU VMs); on a machine without TPUs it runs on the CPU.
#
#   docker build --tag hypervl .
#   docker run --rm hypervl --help                                 experiments.launch
#   docker run --rm --entrypoint python hypervl -m experiments.sweep --help

FROM python:3.12.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /opt/hypervl

# Dependencies change less often than code: they are a layer of their own.
COPY setup.py pyproject.toml README.md ./
RUN mkdir hypervl_jax data_pipelines experiments tools \
    && pip install ".[tpu,data,qwen]" \
    && pip uninstall --yes hypervl-jax

COPY hypervl_jax hypervl_jax
COPY data_pipelines data_pipelines
COPY experiments experiments
COPY tools tools
RUN pip install --no-deps --editable . \
    && useradd --uid 1000 --create-home hypervl \
    && mkdir /work && chown hypervl /work

USER 1000
WORKDIR /work

ENTRYPOINT ["python", "-m", "experiments.launch"]
