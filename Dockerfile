# syntax=docker/dockerfile:1
# CPU:  docker build -t scalekd --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu .
# CUDA: docker build -t scalekd --build-arg BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04 .
# Run:  docker run --rm -v "$PWD:/work" --shm-size 8g [--gpus all] scalekd scalekd cache-teacher --data photos
ARG BASE=ubuntu:24.04
FROM ${BASE}

# Python 3.12. The compiler and Python's headers are for --train.compile only.
# The release of the base image determines the versions of these packages.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates g++ make python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# pip reads it: another index for PyTorch's builds, such as those without CUDA.
ARG PIP_EXTRA_INDEX_URL=
COPY . /opt/scalekd-cache
WORKDIR /opt/scalekd-cache
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir . \
    && /opt/venv/bin/scalekd --version

# Any user may run it (docker run --user): caches of compilers and downloads are in /tmp.
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp PYTHONUNBUFFERED=1
WORKDIR /work
CMD ["scalekd", "--help"]
