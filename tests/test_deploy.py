"""The deployment files, checked with the tools that need no cluster: the Kubernetes API's schemas, and hadolint."""

import json
import re
import subprocess
import sysconfig
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[1] / "tools/deploy"
MODEL = Path(__file__).resolve().parents[1] / "taylorseer_export/serve/model.py"
MANIFESTS = {doc["kind"]: doc for doc in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))}
VERSION = "1.30"


@pytest.mark.parametrize("kind", [kind for kind in MANIFESTS if kind != "PodMonitor"])  # that one is no part of the API
def test_a_manifest_is_of_the_kubernetes_api(kind):
    assert kubernetes_validate.validate(MANIFESTS[kind], VERSION, strict=True) is not None


def test_the_schemas_can_complain():
    wrong = json.loads(json.dumps(MANIFESTS["Deployment"]))
    wrong["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSION, strict=True)


def test_the_manifests_fit_each_other():
    deployment, service = MANIFESTS["Deployment"], MANIFESTS["Service"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    ports = {port["name"] for port in container["ports"]}
    assert service["spec"]["selector"].items() <= labels.items()
    assert {port["targetPort"] for port in service["spec"]["ports"]} == ports
    assert container["readinessProbe"]["httpGet"] == {"path": "/v2/health/ready", "port": "http"}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert MANIFESTS["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert {e["port"] for e in MANIFESTS["PodMonitor"]["spec"]["podMetricsEndpoints"]} <= ports
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in deployment["spec"]["template"]["spec"]["volumes"]}


def test_the_autoscaler_follows_a_metric_that_the_server_has():
    (metric,) = MANIFESTS["HorizontalPodAutoscaler"]["spec"]["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert f'"{name.removeprefix("taylorseer_")}"' in MODEL.read_text(encoding="utf-8") and name.startswith(
        "taylorseer_"
    )


def hadolint(text):
    program = Path(sysconfig.get_path("scripts")) / "hadolint"
    return subprocess.run([program, "-"], input=text, capture_output=True, text=True, check=False)


def test_the_containerfile_passes_its_linter():
    done = hadolint((DEPLOY / "Containerfile").read_text(encoding="utf-8"))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_linter_can_complain():
    done = hadolint("FROM debian\nRUN cd /tmp && apt-get install curl\n")
    assert done.returncode != 0 and "DL3006" in done.stdout


def test_the_container_has_the_run_side_alone():
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    assert set(re.findall(r"\.\[([a-z,]+)\]", text)) == {"sample"}
    assert "export" not in re.sub(r"taylorseer[-_]export", "", text)
