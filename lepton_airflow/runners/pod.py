"""Run a stage in a Kubernetes pod, in the cluster and with the rights that the installation's pod operators use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from lepton_airflow.connections import Connection
from lepton_airflow.contract import Receipt, Request
from lepton_airflow.pods.settings import PodSettings
from lepton_airflow.runners import Runner, settle

if TYPE_CHECKING:
    from lepton_airflow.pods.attempt import Attempt


@dataclass(kw_only=True)
class Pod(PodSettings, Runner):
    """Run the stage in a pod of its own.

    Everything but the numbers may be a template. What is left out comes from ``pod_template``, else from the defaults.

    :param image: an image with a Python that has lepton_airflow and the stage's libraries; ``image_pull_policy``: when
        it is pulled, default: the cluster's.
    :param namespace: where the pod is created; default: the Connection's, else the worker's own, else ``default``.
    :param cpu: cores to reserve, such as ``"500m"`` (the default) or ``"4"``; ``cpu_limit``: cores it may use, default: all.
    :param memory: memory to reserve, such as ``"2Gi"`` (the default); ``memory_limit``: above it the stage is killed,
        default: the same.
    :param gpus: number of GPUs, of the kind ``gpu_resource``.
    :param node_selector: labels that the node must have; ``affinity`` and ``tolerations`` as Kubernetes writes them.
    :param service_account: name in the cluster, as ``priority_class`` and ``runtime_class`` are; default: the namespace's.
    :param volumes: what to mount: ``{"name": "data", "mount": "/data", "pvc": "claim"}``, or instead of ``pvc`` one of
        ``host_path``, ``config_map``, ``secret``, ``empty_dir``; ``"read_only": True`` if so.
    :param env: environment variables. No secrets: they show in the serialized DAG. The same holds for the pod's ``labels``
        and ``annotations``.
    :param pull_secrets: names of the Secrets that open the image's registry.
    :param pod_template: a pod, as a dict or as the path of its YAML on the worker; the settings given here override it.
    :param queue: the Kueue queue that admits the pod.
    :param security: fields of Kubernetes' security contexts to override, such as ``{"runAsUser": 1000}``.
    :param schedule_timeout_s: time to find a node [seconds]; default: 300, with GPUs 1200.
    :param start_timeout_s: time from there until the stage starts, mostly the image's pull [seconds].
    :param run_timeout_s: time the stage may take [seconds].
    :param admission_timeout_s: time for which a quota or a queue may hold the pod back [seconds].
    :param preemption_limit: how often one try submits again after an eviction, a preemption or a lost node.
    :param deferrable: whether to wait without a worker slot; default: ``[operators] default_deferrable``.
    :param python: the interpreter in the image.
    :param grace_s: time between asking the stage to stop and killing it [seconds].
    :param keep_pod: which pods stay after they have ended: ``never``, ``failed``, ``always``. They keep their Secret.
    :param kubernetes_conn_id: the Connection that opens the cluster; default: ``kubernetes_default`` where it exists, else
        the service account of the worker's own pod, else its kubeconfig. ``config_file``, ``cluster_context`` and
        ``in_cluster`` as in a ``KubernetesPodOperator``.
    """

    local: ClassVar[bool] = False

    _attempt: Attempt | None = field(default=None, init=False, repr=False, compare=False)

    def run(self, request: Request, connections: Sequence[Connection], context: Mapping[str, Any]) -> Receipt:
        """Bring the request to its end in a pod, and return the receipt that this pod left in the store.

        :raises TaskDeferred: the task waits in a trigger, and Airflow calls its operator's ``resume`` afterwards.
        """
        from lepton_airflow.pods.attempt import Attempt

        self._attempt = attempt = Attempt(
            self,
            request,
            connections,
            ti=context.get("ti"),
            state=context.get("lepton"),
            defers=bool(context) and self._defers(),
        )
        try:
            outcome = attempt.run()
            if isinstance(outcome, Receipt):
                return settle(request, outcome)
            from airflow.providers.common.compat.sdk import TaskDeferred

            from lepton_airflow.triggers.pod import PodTrigger

            trigger = PodTrigger(**outcome.trigger)
        except Exception:
            raise  # an error leaves the pod to the next try
        except BaseException:
            # Airflow's execution_timeout, or an interrupt.
            attempt.delete_own()
            raise
        finally:
            self._attempt = None
        raise TaskDeferred(trigger=trigger, method_name="resume", kwargs={"kept": outcome.state})

    def cancel(self) -> None:
        """Delete the pod of :meth:`run` if its try still owns it, unless Airflow still wants the task.

        Airflow calls this when somebody ends the task, and also when its worker shuts down. In the latter case the pod goes
        on, and the next try adopts it.
        """
        if self._attempt is not None:
            self._attempt.cancel()

    def _defers(self) -> bool:
        if self.deferrable is not None:
            return self.deferrable
        from airflow.configuration import conf

        return bool(conf.getboolean("operators", "default_deferrable", fallback=False))
