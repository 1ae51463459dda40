# One file, four images: `docker build --target TARGET .` with service-cpu, service-cuda, train, load.
#
# Bases are pinned by tag, which a registry may move. Whoever mirrors them should pin digests too:
# `docker buildx imagetools inspect python:3.11.14-slim-bookworm` prints the one to append.

FROM python:3.11.14-slim-bookworm AS base
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
# A root file system may be read-only: /tmp is the one place that is written, and a tmpfs then.
RUN useradd --uid 10001 --user-group --home-dir /tmp --shell /usr/sbin/nologin mneme \
 # A named volume takes its owner from the folder that it is mounted over.
 && install --directory --owner mneme --group mneme /demo
WORKDIR /app

FROM base AS build
# A package index beside the usual one: the usual torch for Linux on x86-64 brings gigabytes of CUDA,
# PyTorch's own index has builds for the CPU alone.
ARG PIP_EXTRA_INDEX_URL
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off PIP_ROOT_USER_ACTION=ignore
ENV PIP_PYTHON=/opt/venv/bin/python
WORKDIR /src
# The outer pip installs into the environment, so that no image carries another one there. And the
# project names a readme, whose every change must not install the dependencies anew.
RUN python -m venv --without-pip /opt/venv && touch README.md
COPY pyproject.toml constraints.txt ./

FROM base AS wheel
WORKDIR /src
COPY pyproject.toml README.md ./
COPY contract contract
COPY training training
COPY exporter exporter
COPY service service
COPY loadtest loadtest
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

# Each of the following installs dependencies first (`.` is an empty package there), so that a change
# of the code does not install them anew.
FROM build AS build-service-cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt '.[service,cpu]'
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    pip install --no-deps --force-reinstall /wheels/*.whl

FROM build AS build-service-cuda
# CUDA 13 and cuDNN 9 are what onnxruntime-gpu is built for; the versions are those of torch 2.13.
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt '.[service,gpu]' \
    'cuda-toolkit[cublas,cudart,cufft,curand,nvjitlink,nvrtc]==13.0.3' 'nvidia-cudnn-cu13==9.20.0.48'
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    pip install --no-deps --force-reinstall /wheels/*.whl

FROM build AS build-train
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt '.[loadtest,train,export,service,cpu]'
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    pip install --no-deps --force-reinstall /wheels/*.whl

FROM build AS build-load
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints.txt '.[loadtest]'
RUN --mount=from=wheel,source=/wheels,target=/wheels \
    pip install --no-deps --force-reinstall /wheels/*.whl

FROM base AS service
ENV MNEME_HOST=0.0.0.0 MNEME_PORT=8000
EXPOSE 8000
# Alive, not ready: a service that waits for Redis must not be restarted for it.
HEALTHCHECK --interval=5s --timeout=3s --start-period=120s CMD ["python", "-c", \
    "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"MNEME_PORT\"]}/healthz', timeout=2)"]
USER 10001:10001
CMD ["python", "-m", "service"]

FROM service AS service-cpu
COPY --from=build-service-cpu /opt/venv /opt/venv

FROM service AS service-cuda
ENV MNEME_PROVIDER=cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Where the packages of CUDA and cuDNN keep their libraries; the driver's come from the host.
ENV LD_LIBRARY_PATH=/opt/venv/lib/python3.11/site-packages/nvidia/cu13/lib:/opt/venv/lib/python3.11/site-packages/nvidia/cudnn/lib
COPY --from=build-service-cuda /opt/venv /opt/venv

FROM base AS train
COPY --from=build-train /opt/venv /opt/venv
USER 10001:10001
WORKDIR /demo

FROM base AS load
COPY --from=build-load /opt/venv /opt/venv
# Locust looks for this name where it is started.
COPY loadtest/locustfile.py ./
EXPOSE 8089
USER 10001:10001
CMD ["python", "-m", "locust"]
