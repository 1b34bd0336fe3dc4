"""``make demo-stop`` removes the namespace that ``make demo-cluster`` has made, from whatever shell."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[2] / "demo"
MAKE = "import cluster; cluster.STATE.mkdir(); cluster.Cluster().make_namespace()"


def test_the_namespace_goes_also_without_a_kubeconfig(tmp_path: Path) -> None:
    namespace, state = f"lepton-demo-{secrets.token_hex(4)}", tmp_path / "state"
    env = os.environ | {"LEPTON_DEMO_CLUSTER_STATE": str(state), "LEPTON_DEMO_NAMESPACE": namespace}
    elsewhere = {k: v for k, v in env.items() if k not in ("KUBECONFIG", "LEPTON_DEMO_NAMESPACE")}

    def phase() -> str:
        get = [
            "kubectl",
            "get",
            "namespace",
            namespace,
            "--ignore-not-found",
            "-o",
            "jsonpath={.status.phase}",
        ]
        return subprocess.run(get, env=env, check=True, capture_output=True, text=True).stdout

    def down() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(DEMO / "cluster.py"), "down"]
        return subprocess.run(command, env=elsewhere, check=False, capture_output=True, text=True)

    subprocess.run([sys.executable, "-c", MAKE], cwd=DEMO, env=env, check=True)
    assert phase() == "Active"

    made = state / "namespace.json"
    kubeconfig = json.loads(made.read_text())["kubeconfig"]
    made.write_text(made.read_text().replace(kubeconfig, f"{kubeconfig} of a cluster that is away"))
    away = down()
    assert away.returncode == 1
    assert f"namespace {namespace} stays: the cluster of KUBECONFIG=" in away.stderr
    assert phase() == "Active"

    made.write_text(made.read_text().replace(" of a cluster that is away", ""))
    assert "stopped" in down().stdout
    assert phase() in ("Terminating", "")
    assert not state.exists()
