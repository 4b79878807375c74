# syntax=docker/dockerfile:1
# The server. From the root of the repository:
#   docker build -f k8s/docker/serve.Dockerfile -t vlm-serve:0.1.0 .
# torch comes as the package index offers it, usually with CUDA. For a smaller image without it, give
# an index of CPU wheels: --build-arg TORCH_INDEX=URL
# The first stage has pip and its cache, the second only what it installed.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=
ARG EXTRAS=serve,milvus,openvino
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

FROM python:${PYTHON}-slim AS serve
LABEL org.opencontainers.image.title="vlm-serve" org.opencontainers.image.licenses="Apache-2.0"
ENV PATH=/opt/vlm/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin vlm
COPY --from=build /opt/vlm /opt/vlm
USER 10001:10001
EXPOSE 8000
# For plain Docker; Kubernetes has probes of its own. curl is not in this image.
HEALTHCHECK --interval=30s --timeout=12s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=11)"]
CMD ["python", "-m", "serving", "--host", "0.0.0.0"]
