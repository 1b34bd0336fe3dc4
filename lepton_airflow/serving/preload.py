"""What every worker needs, imported once by the process from which the workers are forked."""

import signal

import numpy  # noqa: F401, ICN001, TID253 - this module exists to import it
import onnxruntime  # noqa: F401, TID253

import lepton_airflow.serving.worker  # noqa: F401

# A service manager may signal all processes of a server. The supervisor alone decides what then happens to the others.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
