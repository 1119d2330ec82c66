# A base image with python3 and venv. It is not pinned by a digest, as no registry was reachable when it was written;
# pin it with --build-arg PYTHON=python:3.11-slim-bookworm@sha256:...
ARG PYTHON=python:3.11-slim-bookworm

# From here to the end marker all four Dockerfiles are identical, so that their layers are shared.
FROM ${PYTHON} AS builder
ARG TORCH=cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_CACHE_DIR=/cache/pip
COPY docker/requirements/builder.lock /locks/
RUN python3 -m venv /build \
    && /build/bin/pip install --no-cache-dir --no-deps --require-hashes --requirement /locks/builder.lock
COPY docker/requirements/torch-${TORCH}.lock docker/requirements/serving.lock /locks/
# docker/wheels may contain files that are on no index, such as torch's CPU build; their hashes are checked too.
RUN --mount=type=cache,target=/cache/pip --mount=type=bind,source=docker/wheels,target=/local \
    for set in torch-${TORCH} serving; do \
      /build/bin/pip wheel --no-deps --require-hashes --no-build-isolation --find-links /local \
      --wheel-dir /wheels/shared --requirement /locks/$set.lock || exit 1; done

FROM builder AS project
COPY pyproject.toml README.md LICENSE /source/
COPY cappy /source/cappy
COPY components /source/components
COPY pipelines /source/pipelines
COPY serving /source/serving
RUN /build/bin/pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /wheels/project /source

FROM builder AS bill
COPY docker/requirements/sbom.lock /locks/
RUN --mount=type=cache,target=/cache/pip python3 -m venv /bill \
    && /build/bin/pip --python /bill/bin/python install --no-deps --require-hashes --no-compile --requirement /locks/sbom.lock

FROM ${PYTHON} AS shared
RUN python3 -m venv --without-pip /app
RUN --mount=type=bind,from=builder,source=/build,target=/build \
    --mount=type=bind,from=builder,source=/wheels/shared,target=/wheels \
    /build/bin/pip --python /app/bin/python install --quiet --no-cache-dir --no-compile --no-index --no-deps /wheels/*.whl \
    && /build/bin/pip --python /app/bin/python check \
    && (/app/bin/python -m compileall -q -j 0 /app/lib || true)
# End of the shared part.

FROM shared AS full
RUN --mount=type=bind,from=builder,source=/build,target=/build \
    --mount=type=bind,from=project,source=/wheels/project,target=/wheels \
    /build/bin/pip --python /app/bin/python install --quiet --no-cache-dir --no-compile --no-index --no-deps /wheels/*.whl \
    && (/app/bin/python -m compileall -q -j 0 /app/lib || true)
RUN --mount=type=bind,source=docker/rootfs.py,target=/rootfs.py python3 /rootfs.py /rootfs
RUN --mount=type=bind,from=bill,source=/bill,target=/bill --mount=type=bind,source=docker/sbom.py,target=/sbom.py \
    /bill/bin/cyclonedx-py environment --output-format JSON --output-reproducible --output-file /tmp/python.json /app/bin/python \
    && python3 /sbom.py /tmp/python.json /rootfs/usr/share/sbom/cappy.cdx.json /rootfs && rm /tmp/python.json


# Only the interpreter, its packages and the libraries that they load: no shell, no compiler, no package manager.
FROM scratch
COPY --from=full /rootfs /
ENV PATH=/app/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp TMPDIR=/tmp XDG_CACHE_HOME=/tmp/.cache HF_HOME=/tmp/.cache/huggingface MPLCONFIGDIR=/tmp/.cache/matplotlib \
    TORCH_EXTENSIONS_DIR=/tmp/.cache/torch_extensions TRITON_CACHE_DIR=/tmp/.cache/triton \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 \
    MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false HF_HUB_DISABLE_TELEMETRY=1
# Vertex AI overrides this port; with it set, the service listens on all addresses of the container.
ENV AIP_HTTP_PORT=8080
ARG VERSION=unknown
ARG COMMIT=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="cappy-serving" \
      org.opencontainers.image.description="Scores of a scorer over HTTP" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.licenses="Apache-2.0"
USER 10001:10001
WORKDIR /data
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=4s --start-period=60s --retries=3 \
    CMD ["/app/bin/python", "-c", "import os, urllib.request; urllib.request.urlopen(f\"http://127.0.0.1:{os.environ['AIP_HTTP_PORT']}/health\", timeout=3)"]
ENTRYPOINT ["/app/bin/cappy"]
CMD ["serve"]
