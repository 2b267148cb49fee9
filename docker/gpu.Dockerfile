# Export, verify and serve on an NVIDIA GPU, with the CUDA kernels and the TensorRT plugin. Needs NVIDIA's container toolkit.
#   docker build --file docker/gpu.Dockerfile --tag ibnorm-export:gpu .
#   docker run --rm --gpus all --publish 8000:8000 --volume "$PWD/models:/models:ro" ibnorm-export:gpu /models/vit.onnx
# What follows the image's name goes to `ibnorm-export serve`. Another command:
#   docker run --rm --gpus all --entrypoint ibnorm-export ibnorm-export:gpu doctor
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build
# Ubuntu keeps one version of a package, so a pinned one stops the build as soon as there is a newer one.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --no-install-recommends --yes g++ npm python3-pip python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN python3 -m venv /build \
 && /build/bin/pip install --no-cache-dir build==1.6.1 \
 && python3 scripts/fetch_headers.py \
 && /build/bin/python -m build --wheel --outdir /wheels -Ccmake.define.IBNORM_CUDA=ON

FROM nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --no-install-recommends --yes python3-venv \
 && rm -rf /var/lib/apt/lists/* \
 && python3 -m venv /opt/ibnorm \
 && useradd --create-home --uid 10001 ibnorm
ENV PATH=/opt/ibnorm/bin:$PATH
COPY constraints.txt /tmp/
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --constraint /tmp/constraints.txt --find-links /wheels "ibnorm-export[gpu,plots,serve]"
USER 10001
WORKDIR /home/ibnorm
EXPOSE 8000 8001 8002
# Inside a container, loopback cannot be reached from outside: `docker run --publish` decides who reaches the port.
ENTRYPOINT ["ibnorm-export", "serve", "--address", "0.0.0.0"]
