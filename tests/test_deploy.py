"""The deployment files, checked with the tools that need no cluster: the Kubernetes API's schemas, and hadolint."""

import json
import re
import subprocess
import sysconfig
from pathlib import Path

import kubernetes_validate
import pytest
import requirements
import yaml

from taylorseer_export.serve import probe
from taylorseer_export.serve.server import HEADER, RESTRICTED, SECRET, server_arguments

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "tools/deploy"
MODEL = ROOT / "taylorseer_export/serve/model.py"
MANIFESTS = {doc["kind"]: doc for doc in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8"))}
KSERVE = {doc["kind"]: doc for doc in yaml.safe_load_all((DEPLOY / "kserve.yaml").read_text(encoding="utf-8"))}
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
    policy = MANIFESTS["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == ports
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


def container():
    return MANIFESTS["Deployment"]["spec"]["template"]["spec"]["containers"][0]


def test_the_server_s_arguments_are_those_of_the_package():
    """Kubernetes writes the variable's value in the place of `$(NAME)`."""
    assert tuple(container()["args"]) == server_arguments("/models", f"$({SECRET})")
    assert container()["command"][1:] == ["-m", "taylorseer_export.serve.server"]
    (variable,) = (entry for entry in container()["env"] if entry["name"] == SECRET)
    assert variable["valueFrom"]["secretKeyRef"]["name"] == "taylorseer-admin"  # never a value in the file
    assert {"model-repository", "shared-memory", "trace", "logging"} <= set(RESTRICTED) and HEADER


def kserve_pod():
    """The pod that KServe makes: what the service says of it, around the runtime's containers and volumes."""
    runtime, predictor = KSERVE["ServingRuntime"]["spec"], KSERVE["InferenceService"]["spec"]["predictor"]
    own = ("terminationGracePeriodSeconds", "automountServiceAccountToken", "securityContext")
    return {**{key: predictor[key] for key in own}, "containers": runtime["containers"], "volumes": runtime["volumes"]}


def test_kserve_runs_the_same_server():
    """Its own kinds are no part of the Kubernetes API; the pod that comes of them is."""
    spec, service = KSERVE["ServingRuntime"]["spec"], KSERVE["InferenceService"]["spec"]["predictor"]
    pod = kserve_pod()
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "taylorseer"}, "spec": pod}
    assert kubernetes_validate.validate(whole, VERSION, strict=True) is not None
    (one,) = pod["containers"]
    own = server_arguments("/mnt/models", f"$({SECRET})")  # where KServe mounts what `storageUri` names
    assert tuple(one["args"]) == (*own, "--http-port=8080", "--grpc-port=9000")
    for key in ("command", "env", "livenessProbe", "resources", "image", "securityContext"):
        assert json.dumps(one[key]).replace('"1"', "1") == json.dumps(container()[key]).replace('"1"', "1"), key
    assert {port["containerPort"] for port in one["ports"]} == {8080} == {one["readinessProbe"]["httpGet"]["port"]}
    assert service["model"]["runtime"] == KSERVE["ServingRuntime"]["metadata"]["name"]
    assert service["model"]["modelFormat"]["name"] in {known["name"] for known in spec["supportedModelFormats"]}
    claims = MANIFESTS["Deployment"]["spec"]["template"]["spec"]["volumes"]
    (claim,) = (v["persistentVolumeClaim"]["claimName"] for v in claims if "persistentVolumeClaim" in v)
    assert service["model"]["storageUri"] == f"pvc://{claim}"
    assert {mount["name"] for mount in one["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def weaknesses(pod):
    """What a pod's specification leaves open: (key, where)."""
    found = [] if pod.get("automountServiceAccountToken") is False else ["automountServiceAccountToken"]
    if not pod["securityContext"].get("runAsNonRoot"):
        found.append("runAsNonRoot")
    if pod["securityContext"].get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        found.append("seccompProfile")
    for one in pod["containers"]:
        context, limits = one.get("securityContext", {}), one.get("resources", {}).get("limits", {})
        wanted = {
            "allowPrivilegeEscalation": context.get("allowPrivilegeEscalation") is False,
            "readOnlyRootFilesystem": context.get("readOnlyRootFilesystem") is True,
            "capabilities": context.get("capabilities", {}).get("drop") == ["ALL"],
            "cpu": "cpu" in limits,
            "memory": "memory" in limits,
            "image": re.fullmatch(r"\S+@sha256:(DIGEST|[0-9a-f]{64})", one["image"]) is not None,
            "livenessProbe": "exec" in one.get("livenessProbe", {}),
        }
        found += [name for name, right in wanted.items() if not right]
    found += [v["name"] for v in pod.get("volumes", []) if "hostPath" in v]
    return found


def test_the_pods_leave_nothing_open():
    assert weaknesses(MANIFESTS["Deployment"]["spec"]["template"]["spec"]) == []
    assert weaknesses(kserve_pod()) == []


@pytest.mark.parametrize("name", ["readOnlyRootFilesystem", "capabilities", "cpu", "image", "livenessProbe"])
def test_a_weakness_is_found(name):
    pod = json.loads(json.dumps(MANIFESTS["Deployment"]["spec"]["template"]["spec"]))
    one = pod["containers"][0]
    change = {
        "readOnlyRootFilesystem": lambda: one["securityContext"].update(readOnlyRootFilesystem=False),
        "capabilities": lambda: one["securityContext"].pop("capabilities"),
        "cpu": lambda: one["resources"]["limits"].pop("cpu"),
        "image": lambda: one.update(image="taylorseer-triton:26.07"),
        "livenessProbe": lambda: one.update(livenessProbe={"httpGet": {"path": "/v2/health/live", "port": "http"}}),
    }
    change[name]()
    assert weaknesses(pod) == [name]


def test_the_network_policy_lets_in_who_is_named_and_nothing_out():
    policy = MANIFESTS["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress", "Egress"] and policy["egress"] == []
    assert all(
        rule.get("from") and all(rule["from"]) for rule in policy["ingress"]
    )  # nobody is let in by leaving it out


def test_the_liveness_probe_is_bounded_and_has_the_options_it_names():
    liveness = container()["livenessProbe"]
    module, *options = liveness["exec"]["command"][2:]
    assert module == "taylorseer_export.serve.probe"
    assert probe.main([*options, "--url", "127.0.0.1:1"]) == 1  # nobody listens there; 2 would be an unknown option
    (seconds,) = (float(option.partition("=")[2]) for option in options if option.startswith("--timeout="))
    assert seconds < liveness["timeoutSeconds"]


def test_the_image_is_built_on_bytes_that_are_named():
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
    assert re.findall(r"^FROM (.*)$", text, re.MULTILINE) == ["nvcr.io/nvidia/tritonserver@${DIGEST}"]
    assert re.findall(r"^ARG (.*)$", text, re.MULTILINE) == ["DIGEST"]  # no default that could be stale or made up
    assert all("--require-hashes" in line or "--no-deps" in line for line in text.splitlines() if "pip install" in line)


REQUIREMENTS = (DEPLOY / "requirements.txt").read_text(encoding="utf-8").splitlines()
PINNED = dict(re.findall(r"^(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}$", "\n".join(REQUIREMENTS), re.MULTILINE))


def test_every_package_of_the_image_has_a_hash():
    assert len(PINNED) == sum(not line.startswith("#") for line in REQUIREMENTS)


def test_the_image_has_the_run_side_alone_in_the_versions_of_the_tests():
    from packaging.markers import default_environment
    from packaging.requirements import Requirement

    constraints = [
        Requirement(line)
        for line in (ROOT / "tools/constraints.txt").read_text(encoding="utf-8").splitlines()
        if line and not line.startswith("#")
    ]
    there = default_environment() | {"python_version": "3.12", "sys_platform": "linux", "platform_machine": "x86_64"}
    for constraint in constraints:
        if constraint.name in PINNED and (constraint.marker is None or constraint.marker.evaluate(there)):
            assert constraint.specifier.contains(PINNED[constraint.name]), constraint
    asked = {Requirement(text).name for text in requirements.wanted()}
    assert asked <= PINNED.keys()
    assert not {"onnx", "onnxscript", "accelerate", "transformers", "tritonclient", "tensorrt-rtx"} & PINNED.keys()


def test_the_requirements_are_what_pip_reports():
    entry = {
        "metadata": {"name": "Typing_Extensions", "version": "4.16.0"},
        "download_info": {"archive_info": {"hashes": {"sha256": "0" * 64}}},
    }
    assert requirements.text_of({"install": [entry]}).splitlines()[-1] == (
        "typing-extensions==4.16.0 --hash=sha256:" + "0" * 64
    )
