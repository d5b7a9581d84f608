# The server as an image: `docker build -t switchyard .` (BuildKit, the default builder). See docs/deployment.md.
#
#   VARIANT                        cpu, or cuda for NVIDIA GPUs
#   TORCH_INDEX_URL                where to take torch from; empty: from where everything else comes
#   --secret id=pip,src=pip.conf   settings of pip, such as a private index; they stay out of the image's layers
ARG VARIANT=cpu

FROM python:3.11-slim-bookworm AS base-cpu

FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04 AS base-cuda
# python3-dev: Triton compiles what launches its kernels against Python's headers.
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*


FROM base-${VARIANT} AS build
ARG VARIANT
ARG TORCH_INDEX_URL=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_CONSTRAINT=/build/constraints.txt
WORKDIR /build
RUN python3 -m venv /opt/switchyard
ENV PATH=/opt/switchyard/bin:$PATH
# What the project needs comes before the project itself: its layers outlive a change of code.
COPY pyproject.toml constraints.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    pip install pip setuptools \
    && pip install --no-deps ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch \
    && python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
extras = p["optional-dependencies"]; print(*p["dependencies"], *extras["signing"], *extras["s3"], *extras["otel"], sep="\n")' \
        >requirements.txt \
    && pip install -r requirements.txt
# The same module in another build: the two must not be installed side by side.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    if [ "$VARIANT" = cuda ]; then pip uninstall -y faiss-cpu && pip install faiss-gpu-cu12==1.14.1.post1; fi
COPY README.md LICENSE ./
COPY server server/
COPY store store/
COPY router router/
RUN pip install --no-deps --no-build-isolation .


FROM base-${VARIANT} AS runtime
LABEL org.opencontainers.image.title="Switchyard" org.opencontainers.image.licenses="Apache-2.0"
# The kernels of mixed mode are compiled for the machine they run on, at the first start (Triton's need a compiler too).
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN groupadd --gid 10001 switchyard \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin switchyard \
    && install -d -o 10001 -g 10001 /data /cache /cache/tmp
COPY --from=build /opt/switchyard /opt/switchyard
COPY deploy/healthcheck.py /opt/switchyard/healthcheck.py
# TMPDIR: uploads are spooled there on their way to the store, so it must not be a small tmpfs.
ENV PATH=/opt/switchyard/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/cache \
    HF_HOME=/cache/huggingface \
    TMPDIR=/cache/tmp \
    SWITCHYARD_HOST=0.0.0.0 \
    SWITCHYARD_PORT=8000 \
    SWITCHYARD_DATA_DIR=/data \
    SWITCHYARD_CACHE_DIR=/cache
USER 10001:10001
WORKDIR /data
VOLUME ["/data", "/cache"]
EXPOSE 8000
# The first start converts or downloads the base.
HEALTHCHECK --interval=15s --timeout=5s --start-period=300s --retries=3 CMD ["python", "/opt/switchyard/healthcheck.py"]
ENTRYPOINT ["switchyard"]
CMD ["serve"]
