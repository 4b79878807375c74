# syntax=docker/dockerfile:1
# Training and batch embedding, with CUDA. From the root of the repository:
#   docker build -f k8s/docker/train.Dockerfile -t vlm-train:0.1.0 .
# Without CUDA: --build-arg TORCH_INDEX=URL of an index of CPU wheels.
# torch's wheels carry CUDA and NCCL, so the base needs neither; the node needs the driver.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=
ARG EXTRAS=serve,milvus,deepspeed,npm
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/vlm
ENV PATH=/opt/vlm/bin:$PATH
WORKDIR /src
# Dependencies first, so that an edit of our code does not fetch torch again.
COPY constraints.txt pyproject.toml README.md ./
RUN mkdir vlm serving && touch vlm/__init__.py serving/__init__.py \
    && pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} ".[${EXTRAS}]" \
    && pip uninstall --yes vlm
COPY vlm ./vlm
COPY serving ./serving
RUN pip install --no-deps .

FROM python:${PYTHON}-slim AS train
LABEL org.opencontainers.image.title="vlm-train" org.opencontainers.image.licenses="Apache-2.0"
ENV PATH=/opt/vlm/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin vlm
COPY --from=build /opt/vlm /opt/vlm
COPY configs /opt/vlm/configs
WORKDIR /opt/vlm
USER 10001:10001
# A job is healthy while it runs: its exit code tells the rest.
HEALTHCHECK NONE
CMD ["python", "-m", "vlm", "--help"]
