"""The Helm chart, rendered by Helm itself, against the schemas of Kubernetes and against the project."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from deploy.tables import routes
from server.settings import Settings

helm_python = pytest.importorskip("helm_python", reason="there is no wheel of Helm for this machine")

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy/helm/switchyard"
VERSIONS = ("1.27", "1.31", "1.34")
FOREIGN = {"ServiceMonitor", "PrometheusRule", "ScaledObject"}
"""Kinds of operators, for which Kubernetes has no schema."""

Yaml = dict[str, Any]

LEAST: Yaml = {"base": {"model": "org/base"}, "auth": {"existingSecret": "admin"}}
CASES: dict[str, Yaml] = {
    "least": {},
    "everything": {
        "base": {"model": "/models/base", "name": "base", "existingClaim": "models"},
        "hub": {"existingSecret": "hub", "offline": True},
        "gpu": {"count": 1},
        "settings": {"KV_BYTES": "16GiB", "MAX_BATCH": 64, "REQUIRE_SIGNATURE": True},
        "extraEnv": [{"name": "OMP_NUM_THREADS", "value": "4"}],
        "imagePullSecrets": [{"name": "pull"}],
        "runtimeClassName": "nvidia",
        "priorityClassName": "high",
        "podAnnotations": {"a": "b"},
        "nodeSelector": {"gpu": "yes"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "affinity": {"podAntiAffinity": {}},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
        ],
        "persistence": {"storageClassName": "fast"},
        "service": {"type": "LoadBalancer", "annotations": {"a": "b"}},
        "ingress": {"enabled": True, "className": "nginx", "host": "llm.example.com", "tlsSecret": "tls",
                    "annotations": {"nginx.ingress.kubernetes.io/proxy-buffering": "off"}},
        "redis": {"existingSecret": "redis", "persistence": {"storageClassName": "fast"}},
        "autoscaling": {"enabled": True},
        "networkPolicy": {"from": [{"podSelector": {"matchLabels": {"role": "gateway"}}}],
                          "monitoringNamespaceLabels": {"name": "monitoring"},
                          "extraEgress": [{"ports": [{"port": 4318}]}]},
        "serviceAccount": {"annotations": {"a": "b"}},
        "monitoring": {"serviceMonitor": {"enabled": True, "existingSecret": "m", "labels": {"release": "p"}},
                       "prometheusRule": {"enabled": True, "labels": {"release": "p"}}},
    },
    "keda": {"autoscaling": {"enabled": True, "kind": "keda"}},
    "external redis": {"redis": {"enabled": False, "external": {"url": "rediss://redis.example.com:6380/0"}}},
    "external redis, secret": {"redis": {"enabled": False, "external": {"existingSecret": "redis"}}},
    "nothing that is optional": {
        "persistence": {"enabled": False}, "podDisruptionBudget": {"enabled": False},
        "networkPolicy": {"enabled": False}, "serviceAccount": {"create": False},
    },
}  # fmt: skip


def rendered(values: Yaml, chart: Path = CHART) -> list[Yaml]:
    """The manifests that Helm makes of the chart with these values."""
    with helm_python.Chart.load(str(chart)) as loaded:
        templates = loaded.render(LEAST | values, name="demo", namespace="prod")
    manifests = (yaml.safe_load_all(text) for name, text in templates.items() if name.endswith(".yaml"))
    return [manifest for file in manifests for manifest in file if manifest]


def one(manifests: list[Yaml], kind: str, name: str = "demo-switchyard") -> Yaml:
    (found,) = (m for m in manifests if m["kind"] == kind and m["metadata"]["name"] == name)
    return found


def pods(manifests: list[Yaml]) -> Iterator[tuple[str, Yaml]]:
    for manifest in manifests:
        if manifest["kind"] == "Pod":
            yield manifest["metadata"]["name"], manifest["spec"]
        elif manifest["kind"] == "StatefulSet":
            yield manifest["metadata"]["name"], manifest["spec"]["template"]["spec"]


@pytest.fixture(params=CASES)
def manifests(request: pytest.FixtureRequest) -> list[Yaml]:
    return rendered(CASES[request.param])


def test_helm_s_linter_finds_nothing(tmp_path: Path) -> None:
    chart = shutil.copytree(CHART, tmp_path / "switchyard")
    values = yaml.safe_load((chart / "values.yaml").read_text(encoding="utf-8"))
    values["base"]["model"], values["auth"]["existingSecret"] = "org/base", "admin"
    (chart / "values.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    found = helm_python.lint(str(chart))
    assert found["errors"] == []
    assert [message["error"] for message in found["messages"]] == ["icon is recommended"]
    (chart / "templates/pdb.yaml").write_text("{{ if .Values.x }}\n", encoding="utf-8")
    assert helm_python.lint(str(chart))["errors"]


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_manifest(manifests: list[Yaml], version: str) -> None:
    for manifest in manifests:
        if manifest["kind"] not in FOREIGN:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_kubernetes_refuses_a_broken_manifest() -> None:
    manifest = one(rendered({}), "StatefulSet")
    manifest["spec"]["template"]["spec"]["containers"][0]["livenessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(manifest, VERSIONS[-1], strict=True)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"base": {"model": ""}}, "/base/model"),
        ({"auth": {"existingSecret": ""}}, "/auth/existingSecret"),
        ({"autoscaling": {"enabled": True, "kind": "vpa"}}, "/autoscaling/kind"),
        ({"redis": {"enabled": False}}, "/redis/external"),
        ({"redis": {"enabled": False, "external": {"url": "redis://:password@host"}}}, "/redis/external/url"),
        ({"ingress": {"enabled": True, "host": "a.example.com"}}, "/ingress/tlsSecret"),
        ({"monitoring": {"serviceMonitor": {"enabled": True}}}, "/monitoring/serviceMonitor/existingSecret"),
        ({"settings": {"API_KEYS": "sy"}}, "API_KEYS"),
        ({"replicas": 3}, "replicas"),
    ],
)
def test_bad_values_are_refused_by_name(values: Yaml, said: str) -> None:
    with pytest.raises(helm_python.HelmError, match=said):
        rendered(values)


def test_no_pod_may_more_than_it_must(manifests: list[Yaml]) -> None:
    for name, pod in pods(manifests):
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] > 0, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
            }  # fmt: skip
            assert "memory" in container["resources"]["limits"], name
            assert ":latest" not in container["image"], name


def test_secrets_are_named_and_never_given(manifests: list[Yaml]) -> None:
    assert "Secret" not in {manifest["kind"] for manifest in manifests}
    for _, pod in pods(manifests):
        for variable in pod["containers"][0].get("env", ()):
            if any(word in variable["name"] for word in ("TOKEN", "PASSWORD", "AUTH")):
                assert set(variable["valueFrom"]) == {"secretKeyRef"}


def test_the_server_is_given_settings_that_exist(manifests: list[Yaml]) -> None:
    server = dict(pods(manifests))["demo-switchyard"]["containers"][0]
    values = {
        variable["name"].removeprefix("SWITCHYARD_").lower(): variable.get("value", "redis://from-a-secret")
        for variable in server["env"]
        if variable["name"].startswith("SWITCHYARD_")
    }
    assert values.keys() <= Settings.model_fields.keys()
    assert values.pop("api_keys_file") == "/run/secrets/switchyard/admin_key"
    settings = Settings.model_validate({**values, "api_keys": "key"})
    assert (settings.store or "").startswith("redis")


def test_probes_ask_routes_that_need_no_key(manifests: list[Yaml]) -> None:
    server = dict(pods(manifests))["demo-switchyard"]["containers"][0]
    known = {path for method, path, _ in routes() if method == "GET"}
    asked = {name: server[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert asked == {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}
    assert set(asked.values()) <= known
    (port,) = server["ports"]
    assert port == {"name": "http", "containerPort": Settings.model_fields["port"].default}


def test_streams_may_end_before_the_kubelet_kills(manifests: list[Yaml]) -> None:
    pod = dict(pods(manifests))["demo-switchyard"]
    server = pod["containers"][0]
    drain = next(int(v["value"]) for v in server["env"] if v["name"] == "SWITCHYARD_DRAIN_SECONDS")
    _, pause = server["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] > drain + int(pause)


def test_every_mount_has_its_volume(manifests: list[Yaml]) -> None:
    for manifest in manifests:
        if manifest["kind"] == "StatefulSet":
            claims = {claim["metadata"]["name"] for claim in manifest["spec"].get("volumeClaimTemplates", ())}
            pod = manifest["spec"]["template"]["spec"]
            volumes = claims | {volume["name"] for volume in pod["volumes"]}
            mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
            assert mounts.keys() == volumes
            assert mounts["data"] == "/data"


def test_selectors_meet_their_pods(manifests: list[Yaml]) -> None:
    labels = [m["spec"]["template"]["metadata"]["labels"] for m in manifests if m["kind"] == "StatefulSet"]

    def met(selector: Yaml) -> int:
        return sum(selector.items() <= found.items() for found in labels)

    for manifest in manifests:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "Service":
            assert met(spec["selector"]) == 1
        elif manifest["kind"] in ("PodDisruptionBudget", "StatefulSet"):
            assert met(spec["selector"]["matchLabels"]) == 1
        elif manifest["kind"] == "NetworkPolicy":
            assert met(spec["podSelector"]["matchLabels"]) == 1


def test_a_gpu_is_asked_for_and_brings_its_image() -> None:
    server = dict(pods(rendered({"gpu": {"count": 1}})))["demo-switchyard"]["containers"][0]
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert server["image"].endswith(":cuda")
    server = dict(pods(rendered({})))["demo-switchyard"]["containers"][0]
    assert "nvidia.com/gpu" not in server["resources"]["limits"]
    assert server["image"].endswith(":cpu")


@pytest.mark.parametrize("kind", ["hpa", "keda"])
def test_replicas_follow_the_queue(kind: str) -> None:
    from tests.deploy.test_monitoring import shown

    manifests = rendered({"autoscaling": {"enabled": True, "kind": kind}})
    assert "replicas" not in one(manifests, "StatefulSet")["spec"]
    scaler = one(manifests, "HorizontalPodAutoscaler" if kind == "hpa" else "ScaledObject")
    assert scaler["spec"]["scaleTargetRef"]["name"] == one(manifests, "StatefulSet")["metadata"]["name"]
    assert "switchyard_requests_waiting" in json.dumps(scaler["spec"])
    assert "switchyard_requests_waiting" in shown()


def test_redis_is_reached_by_servers_alone() -> None:
    policy = one(rendered({}), "NetworkPolicy", "demo-switchyard-redis")["spec"]
    (rule,) = policy["ingress"]
    assert rule["from"][0]["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "server"
    assert policy["egress"] == []


def test_the_chart_s_alerts_are_those_of_prometheus() -> None:
    rule = one(rendered(CASES["everything"]), "PrometheusRule")
    alerts = yaml.safe_load((ROOT / "deploy/monitoring/alerts.yml").read_text(encoding="utf-8"))
    assert rule["spec"] == alerts, "run: make docs"
    monitor = one(rendered(CASES["everything"]), "ServiceMonitor")["spec"]["endpoints"][0]
    assert monitor["path"] == "/metrics"
    assert monitor["relabelings"] == [{"targetLabel": "job", "replacement": "switchyard"}]


def test_the_chart_has_the_project_s_version() -> None:
    from server import __version__

    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == __version__
