"""What deploy/ hands to a cluster: held to Kubernetes' schemas, and to what the service does."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from serving.settings import VARIABLES

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "deploy" / "kubernetes"
# What the application gets to end, beside the time for which it still takes connections.
SECONDS_TO_END = 30


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def pod_of(name: str) -> dict[str, Any]:
    (deployment,) = documents(name)
    return deployment["spec"]["template"]["spec"]


@pytest.mark.parametrize("name", ["service.yaml", "cpu.yaml", "gpu.yaml"])
def test_every_resource_is_what_kubernetes_takes(name: str):
    for document in documents(name):
        kubernetes_validate.validate(document, "1.37.0", strict=True)


@pytest.mark.parametrize("name", ["cpu.yaml", "gpu.yaml"])
def test_a_pod_is_told_what_the_service_understands_and_has_time_to_drain(name: str):
    pod = pod_of(name)
    (container,) = pod["containers"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment.keys() <= VARIABLES.keys()
    drain_s = int(environment["CLASSIFIER_DRAIN_S"])
    probe = container["readinessProbe"]
    assert drain_s > probe["periodSeconds"] * probe["failureThreshold"]
    assert pod["terminationGracePeriodSeconds"] >= drain_s + SECONDS_TO_END
    assert pod["securityContext"]["runAsNonRoot"] is True
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[kind]["httpGet"]["port"] == container["ports"][0]["name"]


def test_the_autoscaler_reads_a_metric_that_the_adapter_makes():
    kinds = {document["kind"]: document for document in documents("service.yaml")}
    (metric,) = kinds["HorizontalPodAutoscaler"]["spec"]["metrics"]
    (values,) = documents("prometheus-adapter.yaml")
    (rule,) = values["rules"]["custom"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    labels = kinds["Service"]["spec"]["selector"]
    for name in ("cpu.yaml", "gpu.yaml"):
        (deployment,) = documents(name)
        assert deployment["spec"]["template"]["metadata"]["labels"] == labels
        assert (
            deployment["metadata"]["name"]
            == (kinds["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"])
        )
