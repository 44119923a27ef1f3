"""The files of cluster/ pass their schemas and linters, are closed by default, and hold no secret."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from pipeline.launch.supervisor import read_hostfile

CLUSTER = Path(__file__).parents[2] / "cluster"
SCRIPTS = [*CLUSTER.glob("slurm/*.sbatch"), *CLUSTER.glob("**/*.sh")]
LINTERS = Path(sys.executable).parent


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_cluster_configs_match_the_schema_of_ray(cloud: str) -> None:
    spec = find_spec("ray")
    assert spec is not None and spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load((CLUSTER / "ray" / f"{cloud}.yaml").read_text())
    jsonschema.validate(cluster, schema)
    assert cluster["head_node_type"] in cluster["available_node_types"]
    for command in (cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]):
        assert command.startswith("RAY_AUTH_MODE=token ray start")
    assert "--dashboard-host=127.0.0.1" in cluster["head_start_ray_commands"][-1]


def test_pods_are_valid_are_not_root_and_have_every_volume_they_mount() -> None:
    cluster: dict[str, Any] = yaml.safe_load((CLUSTER / "ray" / "kuberay_cluster.yaml").read_text())
    spec = cluster["spec"]
    assert spec["authOptions"] == {"mode": "token"} and spec["rayVersion"] == version("ray")
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        manifest = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pal"}, **group["template"]}
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
        assert pod["securityContext"]["runAsNonRoot"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["requests"] == container["resources"]["limits"]
    job = yaml.safe_load((CLUSTER / "ray" / "kuberay_job.yaml").read_text())
    assert job["spec"]["clusterSelector"]["ray.io/cluster"] == cluster["metadata"]["name"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_pass_shellcheck(script: Path) -> None:
    done = subprocess.run([LINTERS / "shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_passes_hadolint_and_takes_its_versions_from_the_constraints() -> None:
    done = subprocess.run([LINTERS / "hadolint", "--no-color", CLUSTER / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stdout
    text = (CLUSTER / "Dockerfile").read_text()
    installs = re.findall(r"pip install .*", text)
    assert installs and all("--constraint constraints.txt" in line for line in installs)
    assert "cluster/constraints.txt ./" in text and not re.search(r"[=~<>]=", text)


def test_the_image_runs_as_a_numeric_user_and_holds_no_secret() -> None:
    text = (CLUSTER / "Dockerfile").read_text()
    user = re.findall(r"^USER (\S+)", text, re.MULTILINE)[-1]
    assert user.isdigit() and int(user) > 0  # Kubernetes cannot check a name for root
    assert not re.search(r"^(ENV|ARG)\s.*(TOKEN|KEY|PASSW|SECRET)", text, re.MULTILINE)
    copied = {word for line in re.findall(r"^COPY (.*)", text, re.MULTILINE) for word in line.split()[1:-1]}
    ignore_file = (CLUSTER / "Dockerfile.dockerignore").read_text().split("*\n", 1)[1].splitlines()
    assert {line[1:] for line in ignore_file if line.startswith("!")} == copied and "**/.*" in ignore_file


def test_the_tracking_server_listens_on_localhost_and_requires_a_password() -> None:
    text = (CLUSTER / "mlflow" / "server.sh").read_text()
    assert '--host "${HOST:-127.0.0.1}"' in text and "--app-name basic-auth" in text
    assert "admin_password" not in text


def test_the_example_hostfile_and_environment_are_valid() -> None:
    assert read_hostfile(CLUSTER / "deepspeed" / "hostfile", None) == {"worker-1": 8, "worker-2": 8}
    for line in (CLUSTER / "deepspeed" / "deepspeed_env").read_text().splitlines():
        assert re.fullmatch(r"[A-Z_]+=\S+", line)  # the launcher does not support comments there
