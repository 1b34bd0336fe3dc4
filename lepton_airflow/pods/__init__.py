"""A stage in a Kubernetes pod: what the pod looks like, what to do about what is seen of it, and how it is asked.

``manifest`` and ``lifecycle`` are pure and ``diagnosis`` too; only ``cluster`` talks to the API server. The runner
:class:`lepton_airflow.runners.Pod` and the trigger :class:`lepton_airflow.triggers.pod.PodTrigger` stand on them.
"""

from __future__ import annotations

MANAGED_BY = "app.kubernetes.io/managed-by"  # label, with the value below, on all that this package makes
MANAGER = "lepton-airflow"
RUN_KEY = "lepton-airflow/run-key"  # label: the task instance that it is for
STAGE = "lepton-airflow/stage"  # label
QUEUE = "kueue.x-k8s.io/queue-name"  # label that Kueue reads

# Annotations of a pod; the state of a run is kept here, so that any worker can go on with it.
TRY = "lepton-airflow/try"  # id of the task instance's try that owns the pod; a kill deletes no other
REQUEST = "lepton-airflow/request"  # digest of what was asked for: a pod of another one is never adopted
NONCE = "lepton-airflow/nonce"  # only a receipt that repeats it is this pod's
SUBMISSION = "lepton-airflow/submission"  # 1, 2, …: how often the run was submitted
IDENTITY = "lepton-airflow/identity"  # JSON: which DAG, task, run and try, for people and for `pods ls`
ADMITTED = (
    "lepton-airflow/admitted"  # when a pod that was held back was seen free: the schedule clock starts there
)
SETTLED = "lepton-airflow/settled"  # its end was taken into account, so that no later try takes it again

CONTAINER = "stage"  # the container that opens the door
LOCAL_TRY = "local"  # the try where there is no Airflow

API_AWAY_S = 900.0  # how long an API server may be away before a task fails for it
API_PAUSE_S = 15.0  # longest pause between two questions to an API server that is away
REFUSAL_SURE_S = 10.0  # a refusal must last so long: an API server that just started knows no roles yet
ORPHANED_S = 600.0  # a Secret without an owner for so long has lost the task that was about to make its pod
