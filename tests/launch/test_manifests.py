"""Kubernetes' manifests: the fields that each object must and may have, and what must agree between them.

Not the API's own schema, which is too large to keep here: only the objects and fields that launch/ uses, as the
reference of Kubernetes 1.32 and of Kubeflow Trainer 2.2 names them. A misspelt, misplaced or missing field fails.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dnipipe.config import load
from tests.launch.conftest import ROOT

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (extra: dev): the manifests were not checked")

# object -> its fields; `!` must be there; `:Object`, what is in it, or in each of the list
SHAPES = {
    "ConfigMap": "apiVersion! kind! metadata!:Meta data!",
    "Service": "apiVersion! kind! metadata!:Meta spec!:ServiceSpec",
    "ServiceSpec": "clusterIP! publishNotReadyAddresses! selector! ports!:ServicePort",
    "ServicePort": "name port! protocol",
    "NetworkPolicy": "apiVersion! kind! metadata!:Meta spec!:PolicySpec",
    "PolicySpec": "podSelector!:Selector policyTypes! ingress!:Ingress egress!:Egress",
    "Ingress": "from!:Peer ports!:PolicyPort",
    "Egress": "to:Peer ports!:PolicyPort",
    "Peer": "podSelector!:Selector",
    "PolicyPort": "port! protocol!",
    "PersistentVolumeClaim": "apiVersion! kind! metadata!:Meta spec!:ClaimSpec",
    "ClaimSpec": "accessModes! resources!:Resources",
    "StatefulSet": "apiVersion! kind! metadata!:Meta spec!:StatefulSetSpec",
    "StatefulSetSpec": "serviceName! replicas! podManagementPolicy selector!:Selector template!:PodTemplate",
    "PodTemplate": "metadata!:Meta spec!:PodSpec",
    "PodSpec": "automountServiceAccountToken terminationGracePeriodSeconds securityContext!:PodSecurity "
    "initContainers:Container containers!:Container volumes!:Volume",
    "PodSecurity": "runAsNonRoot! runAsUser! runAsGroup fsGroup seccompProfile",
    "Container": "name! image! command! env:Variable ports:ContainerPort startupProbe:Probe readinessProbe:Probe "
    "livenessProbe:Probe resources!:Resources securityContext!:Security volumeMounts:Mount",
    "Variable": "name! value valueFrom",
    "ContainerPort": "name containerPort! protocol",
    "Probe": "exec!:Exec periodSeconds timeoutSeconds! failureThreshold",
    "Exec": "command!",
    "Resources": "requests! limits",
    "Security": "allowPrivilegeEscalation! readOnlyRootFilesystem! capabilities!",
    "Volume": "name! configMap secret emptyDir persistentVolumeClaim",
    "Mount": "name! mountPath! readOnly",
    "Selector": "matchLabels!",
    "Meta": "name labels",
    "TrainJob": "apiVersion! kind! metadata!:Meta spec!:TrainJobSpec",
    "TrainJobSpec": "runtimeRef!:RuntimeRef trainer!:Trainer runtimePatches:RuntimePatch",
    "RuntimeRef": "name! apiGroup kind",
    "Trainer": "image! command! args! env:Variable numNodes! numProcPerNode! resourcesPerNode:Resources",
    "RuntimePatch": "manager! trainingRuntimeSpec!:RuntimeSpec",
    "RuntimeSpec": "template!:JobSetPatch",
    "JobSetPatch": "spec!:JobSetSpec",
    "JobSetSpec": "replicatedJobs!:ReplicatedJob",
    "ReplicatedJob": "name! template!:JobPatch",
    "JobPatch": "spec!:JobSpec",
    "JobSpec": "template!:PodPatch",
    "PodPatch": "spec!:PodPatchSpec",
    "PodPatchSpec": "securityContext:PodSecurity volumes:Volume containers:ContainerPatch",
    "ContainerPatch": "name! volumeMounts:Mount",
}
VERSIONS = {
    "ConfigMap": "v1",
    "Service": "v1",
    "PersistentVolumeClaim": "v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "StatefulSet": "apps/v1",
    "TrainJob": "trainer.kubeflow.org/v1alpha1",
}


def objects(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((ROOT / "launch" / name).read_text()))


def hold(value: Any, shape: str, where: str) -> None:
    """Fails, saying where, if a field is unknown, or one that must be there is not."""
    fields = {word.split(":")[0].rstrip("!"): word for word in SHAPES[shape].split()}
    for item in value if isinstance(value, list) else [value]:
        assert isinstance(item, dict), f"{where}: expected a {shape}, found {item!r}"
        assert set(item) <= set(fields), f"{where}: a {shape} has no {sorted(set(item) - set(fields))}"
        missing = {name for name, word in fields.items() if "!" in word} - set(item)
        assert not missing, f"{where}: a {shape} needs {sorted(missing)}"
        for name, within in item.items():
            if ":" in fields[name]:
                hold(within, fields[name].split(":")[1], f"{where}.{name}")


@pytest.fixture(scope="module")
def stages() -> dict[str, dict[str, Any]]:
    """What kubernetes.yaml makes, by kind."""
    return {each["kind"]: each for each in objects("kubernetes.yaml")}


@pytest.mark.parametrize("name", ["kubernetes.yaml", "trainjob.yaml"])
def test_each_object_has_the_fields_it_must_and_no_unknown_one(name: str) -> None:
    for each in objects(name):
        kind = each["kind"]
        assert each["apiVersion"] == VERSIONS[kind]
        hold(each, kind, f"{name}: {kind}")


def test_a_wrong_manifest_does_not_pass() -> None:
    wrong = objects("kubernetes.yaml")[1]
    wrong["spec"]["port"] = wrong["spec"].pop("ports")
    with pytest.raises(AssertionError, match=r"spec: a ServiceSpec has no \['port'\]"):
        hold(wrong, "Service", "wrong")


@pytest.mark.parametrize("name", ["kubernetes.yaml", "trainjob.yaml"])
def test_the_use_stands_at_the_top(name: str) -> None:
    assert re.match(rf"# .*:  kubectl apply -f launch/{name}\n", (ROOT / "launch" / name).read_text())


def test_there_is_a_pod_an_address_and_an_open_port_for_each_stage(
    stages: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    text, spec = stages["ConfigMap"]["data"]["config.toml"], stages["StatefulSet"]["spec"]
    count, service = spec["replicas"], stages["Service"]["metadata"]["name"]
    (port,) = {each["port"] for each in stages["Service"]["spec"]["ports"]}
    pods = [f"{stages['StatefulSet']['metadata']['name']}-{k}.{service}:{port}" for k in range(count - 1)]
    assert spec["serviceName"] == service
    policy = stages["NetworkPolicy"]["spec"]
    assert [each["ports"] for each in policy["ingress"]] == [[{"port": port, "protocol": "TCP"}]]
    assert policy["egress"][0]["ports"] == [{"port": port, "protocol": "TCP"}]
    (tmp_path / "config.toml").write_text(text)
    settings = load(tmp_path / "config.toml")
    assert settings.pipeline.stages == count and list(settings.service.addresses) == pods
    mounts = {each["mountPath"] for each in spec["template"]["spec"]["containers"][0]["volumeMounts"]}
    assert {f"{settings.security.keys}/public", f"{settings.security.keys}/secret"} <= mounts


def test_everything_selects_the_pods(stages: dict[str, dict[str, Any]]) -> None:
    labels = stages["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    policy = stages["NetworkPolicy"]["spec"]
    assert stages["Service"]["spec"]["selector"] == labels
    peers = [policy, *policy["ingress"][0]["from"], *policy["egress"][0]["to"]]
    selectors = [stages["StatefulSet"]["spec"]["selector"], *(each["podSelector"] for each in peers)]
    assert all(each == {"matchLabels": labels} for each in selectors)


def test_a_pod_is_confined_and_watched(stages: dict[str, dict[str, Any]]) -> None:
    pod = stages["StatefulSet"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    volumes = {each["name"] for each in pod["volumes"]}
    for container in [*pod["initContainers"], *pod["containers"]]:
        security = container["securityContext"]
        assert not security["allowPrivilegeEscalation"] and security["readOnlyRootFilesystem"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        assert {each["name"] for each in container["volumeMounts"]} <= volumes
    (stage,) = pod["containers"]
    assert "secret" not in {each["name"] for each in stage["volumeMounts"]}  # only its own key, from the init container
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert "dnipipe stage --healthy" in stage[probe]["exec"]["command"][-1]


def test_the_trainjob_starts_as_many_processes_as_stages() -> None:
    (job,) = objects("trainjob.yaml")
    trainer = job["spec"]["trainer"]
    stages = trainer["args"][trainer["args"].index("--pipeline.stages") + 1]
    assert trainer["numNodes"] * trainer["numProcPerNode"] == int(stages)
    assert trainer["command"][0] == "torchrun" and not any("PET_" in word for word in trainer["args"])
