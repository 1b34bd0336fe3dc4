"""What is a stage's pod, and what is done about it?

========== =========================================================================================================
settings   the fields of ``Pod``, their templates and their checks
manifest   settings and a request -> the pod and the Secret, as plain JSON
diagnosis  a pod, or a refused call -> why, in one sentence, and whether to wait, submit again, retry or give up
lifecycle  the pods of a run -> the next action
attempt    one try of a task in a pod: look, decide, act
cluster    the API server, as the worker asks it
watch      the API server, as the triggerer asks it: one LIST and one WATCH for all that wait
logs       the lines of a container's log, and which of them are new
task_state what Airflow says of a task
sweep      what tasks have left in a namespace, behind ``python -m lepton_airflow pods``
========== =========================================================================================================

Only ``cluster`` and ``watch`` call the API server, and only ``task_state`` asks Airflow for a task. Nothing here knows the
runner :class:`lepton_airflow.runners.Pod` or the trigger :class:`lepton_airflow.triggers.pod.PodTrigger`, which stand on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PodJson = Mapping[str, Any]  # a pod as the API server sends it

# Labels.
MANAGED_BY = "app.kubernetes.io/managed-by"  # with the value below, on everything that this package creates
MANAGER = "lepton-airflow"
RUN_KEY = "lepton-airflow/run-key"  # the task instance that a pod or Secret belongs to, and its store: see manifest.pod_key
STORE = "lepton-airflow/store"  # the id of that store: another installation, with another store, touches nothing of it
STAGE = "lepton-airflow/stage"
QUEUE = "kueue.x-k8s.io/queue-name"  # read by Kueue

# Annotations of a pod. They hold the state of a run, so that any worker can go on with it.
TRY = "lepton-airflow/try"  # id of the try that owns the pod; no other try may delete it
REQUEST = "lepton-airflow/request"  # digest of what was asked for; a pod with another digest is never adopted
NONCE = "lepton-airflow/nonce"  # a receipt belongs to this pod only if it repeats the nonce
SUBMISSION = "lepton-airflow/submission"  # 1, 2, …: how often the run has been submitted
IDENTITY = "lepton-airflow/identity"  # JSON: DAG, task, run and try, for people and for `pods ls`
# When the gates of a held-back pod were seen gone: the schedule clock starts.
ADMITTED = "lepton-airflow/admitted"
# Set on a pod that is kept: its result has been used, no later try may use it.
SETTLED = "lepton-airflow/settled"

CONTAINER = "stage"  # the container that runs the stage
LOCAL_TRY = "local"  # id of the try where there is no Airflow

# How patient worker and triggerer are with the API server.
API_AWAY_S = 900.0  # how long it may fail to answer before a task fails for it
API_PAUSE_S = 15.0  # longest pause between two calls while it does not answer
# A refusal must persist for so long before it is believed: an API server that has just started knows no roles yet.
REFUSAL_SURE_S = 10.0

# Age from which a Secret without a pod is an orphan: a task creates the pod seconds after the Secret.
ORPHANED_S = 600.0
