"""What every worker needs, imported once by the process from which the workers are forked."""

import numpy  # noqa: F401, ICN001, TID253 - this module exists to import it
import onnxruntime  # noqa: F401, TID253

import lepton_airflow.serving.worker  # noqa: F401
