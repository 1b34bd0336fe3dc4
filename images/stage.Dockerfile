# An image in which stages run: what the entry point and the extras of one stage (or of several) need. No Airflow.
#
#   make images                                     localhost/lepton-stage:all
#   EXTRAS="validate train,torch,s3" make images    localhost/lepton-stage:validate and …:train-torch-s3
#
# or by hand, with docker or podman, in the repository's root:
#
#   docker build -f images/stage.Dockerfile --build-arg EXTRAS=validate -t lepton-stage:validate .
ARG BASE=docker.io/library/python:3.11-slim

# -- what the extras need: a layer of its own, made again only when pyproject.toml or constraints.txt changes ---------------
FROM ${BASE} AS dependencies
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 UV_NO_CACHE=1 UV_SYSTEM_CERTS=1
# The locale that ONNX Runtime takes for a model which changes the case of text and names none. Where the base has no apt-get, or
# no Debian mirror is within reach, the image lacks it, and a stage that meets such a model says so. No version is pinned, because
# each Debian has its own.
# hadolint ignore=DL3008,DL3009
RUN mkdir -p /usr/lib/locale \
 && { apt-get update -qq && apt-get install -qq -y --no-install-recommends locales && localedef -i en_US -f UTF-8 en_US.UTF-8 \
   || echo "stage.Dockerfile: no locale en_US.UTF-8 in this image" >&2; }
RUN python -m venv --without-pip /opt/venv
WORKDIR /build
COPY pyproject.toml constraints.txt images/requirements.py ./
RUN python -m venv /opt/tools && /opt/tools/bin/python -m pip install -c constraints.txt hatchling pip uv
# Extras of pyproject.toml, separated by commas.
ARG EXTRAS=all
# Which build of torch: an index of PyTorch's that holds the CPU build, or the one of a CUDA version. Without one it is the build
# of pip's own index, which for Linux is mostly a CUDA one of several GB.
ARG TORCH_INDEX=
# As .ci/setup does it: torch by pip, which may be configured for one build of it, and all others by uv, which needs a sixth of
# pip's time and asks the index that pip is configured for. Where uv fails, pip installs everything.
RUN python requirements.py "${EXTRAS}" < pyproject.toml > requirements.txt \
 && pip="/opt/tools/bin/python -m pip --python /opt/venv install -c constraints.txt" \
 && if grep -q '^torch[^a-z]' requirements.txt; then $pip --no-deps --no-compile ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} torch; fi \
 && index=${PIP_INDEX_URL:-$(/opt/tools/bin/python -m pip config get global.index-url 2>/dev/null || true)} \
 && { UV_DEFAULT_INDEX="${index}" /opt/tools/bin/uv pip install --no-progress --compile-bytecode \
        --python /opt/venv/bin/python -c constraints.txt -r requirements.txt || $pip -r requirements.txt; }

# -- the package: seconds ---------------------------------------------------------------------------------------------------
FROM dependencies AS package
COPY README.md LICENSE ./
COPY lepton_airflow ./lepton_airflow
RUN /opt/tools/bin/python -m pip wheel --no-deps --no-build-isolation --wheel-dir wheels . \
 && /opt/tools/bin/python -m pip --python /opt/venv install --no-deps --root /package wheels/*.whl

# -- the image --------------------------------------------------------------------------------------------------------------
FROM ${BASE}
# A name for the user, which some libraries ask for; numbers, which any base image takes.
RUN echo 'stage:x:10001:10001::/work:/usr/sbin/nologin' >> /etc/passwd && echo 'stage:x:10001:' >> /etc/group \
 && mkdir /work && chown 10001:10001 /work
COPY --from=dependencies /usr/lib/locale/ /usr/lib/locale/
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=package /package/ /
ENV PATH=/opt/venv/bin:${PATH} HOME=/work PYTHONUNBUFFERED=1
WORKDIR /work
USER 10001:10001
# Last, so that another commit makes no layer anew.
ARG EXTRAS=all
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="lepton-stage" \
      org.opencontainers.image.description="Runs stages of lepton-airflow with the extras: ${EXTRAS}" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      lepton-airflow.extras="${EXTRAS}"
ENTRYPOINT ["python", "-m", "lepton_airflow"]
CMD ["stages"]
