# Export, verify and serve on a CPU.
#   docker build --file docker/cpu.Dockerfile --tag ibnorm-export:cpu .
#   docker run --rm --publish 8000:8000 --volume "$PWD/models:/models:ro" ibnorm-export:cpu /models/llama --allowed-host '*'
# What follows the image's name goes to `ibnorm-export serve`. Another command:
#   docker run --rm --volume "$PWD:/work" --workdir /work --entrypoint ibnorm-export ibnorm-export:cpu doctor
FROM python:3.12-slim-bookworm AS build
# Debian keeps one version of a package, so a pinned one stops the build as soon as there is a newer one.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --no-install-recommends --yes g++ npm \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir build==1.6.1 \
 && python scripts/fetch_headers.py \
 && python -m build --wheel --outdir /wheels

FROM python:3.12-slim-bookworm
COPY constraints.txt /tmp/
# torch comes first, from the index of CPU builds: the default index has CUDA builds of several GB.
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt --index-url https://download.pytorch.org/whl/cpu torch \
 && useradd --create-home --uid 10001 ibnorm
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --constraint /tmp/constraints.txt --find-links /wheels "ibnorm-export[cpu,genai,plots,serve]"
USER 10001
WORKDIR /home/ibnorm
EXPOSE 8000 8001 8002
# Inside a container, loopback cannot be reached from outside: `docker run --publish` decides who reaches the port.
ENTRYPOINT ["ibnorm-export", "serve", "--address", "0.0.0.0"]
