# Airflow's own image with lepton-airflow in it, to try the package in. Stages run elsewhere: in pods of stage.Dockerfile,
# or in environments that the runner Venv builds; so this installs nothing heavy.
#
#   AIRFLOW=docker.io/apache/airflow:3.3.2 make images      localhost/lepton-airflow:<version>
ARG BASE=docker.io/apache/airflow:3.3.2

FROM ${BASE} AS package
COPY pyproject.toml README.md LICENSE /tmp/source/
COPY lepton_airflow /tmp/source/lepton_airflow
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /tmp/wheels /tmp/source

FROM ${BASE}
COPY --from=package /tmp/wheels /tmp/wheels
# What the image has stays as it is: Airflow's releases are tested with one set of versions.
RUN python -m pip freeze > /tmp/there.txt \
 && python -m pip install --no-cache-dir -c /tmp/there.txt /tmp/wheels/*.whl \
 && python -m pip check
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="lepton-airflow" \
      org.opencontainers.image.description="Airflow with lepton-airflow" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
