"""Prometheus' and Grafana's files: they parse, and ask only for what a server shows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deploy.tables import errors_table
from router.decision import Decision, Reason
from router.index import Neighbour
from server.engine.timing import Timing
from server.metrics import Metrics
from store.mix import Mix
from store.tiers import Tier, TierMeter
from tests.api.dummy_engine import DummyEngine

FOLDER = Path(__file__).parents[2] / "deploy/monitoring"
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "grafana/dashboards/switchyard.json").read_text())
ALERTS: dict[str, Any] = yaml.safe_load((FOLDER / "alerts.yml").read_text())
RULES: list[dict[str, Any]] = [rule for group in ALERTS["groups"] for rule in group["rules"]]
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def shown() -> dict[str, set[str]]:
    """Every series of a server's /metrics with the labels it has."""
    stats = DummyEngine().stats
    stored = TierMeter(Tier.STORE).stats(used_bytes=1, limit_bytes=2, experts=3)
    metrics = Metrics(stats, list, lambda: (stored,))
    metrics.requests.labels("/health", "200").inc()
    metrics.failures.labels("x").inc()
    metrics.count_expert("cron")
    near = Neighbour("cron", "d", 1.0, 2.0, 3, "")
    decision = Decision(Mix.of({"d": 1.0}), (("cron", "d", 1.0),), Reason.MATCHED, "", 1.0, 2.0, 0.9, (near,))
    metrics.routing.decided(decision)
    metrics.routing.shadowed("cron", "d", decision)
    metrics.time_inside(Timing(0, 1, 2, 3, 0.5))
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def expressions() -> Iterator[tuple[str, str]]:
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["query"]["query"]
    for rule in RULES:
        yield rule["alert"], rule["expr"]


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_every_metric_and_label_is_shown(where: str, expression: str) -> None:
    series = shown()
    names = re.findall(r"switchyard_\w+", expression)
    assert names or "up{" in expression, where
    labels: set[str] = set()
    for name in names:
        assert name in series, f"{where} asks for {name}"
        labels |= series[name]
    labels |= {"instance", "job"}
    asked = set(re.findall(r"[{,]\s*(\w+)\s*=", expression))
    asked |= {name.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for name in group.split(",")}
    assert asked <= labels, f"{where} asks for labels {asked - labels}"
    for left, right in ("()", "{}", "[]"):
        assert expression.count(left) == expression.count(right), where
    assert not re.search(r"rate\([^)]*_(?:bytes|running|waiting|experts)\b", expression), "a rate of a gauge"


def test_everything_that_a_server_shows_of_itself_is_on_the_dashboard() -> None:
    text = json.dumps(DASHBOARD) + json.dumps(ALERTS)
    left_out = {"switchyard_mode_mixed", "switchyard_expert_tier_healed_total", "switchyard_expert_tier_limit_bytes",
                "switchyard_mix_experts"}  # fmt: skip
    families = {
        re.sub(r"_(?:bucket|count|sum|created)$", "", name) for name in shown() if name.startswith("switchyard_")
    }
    assert {name for name in families if name not in text} == left_out


def test_the_dashboard_is_one() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids) > 20
    assert DASHBOARD["schemaVersion"] >= 36
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in PANELS:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert label == "instance" or f"({label})" in target["expr"], panel["title"]


def test_alerts_are_named_and_summed_up() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_prometheus_scrapes_with_a_key_and_grafana_finds_what_it_loads() -> None:
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert [(FOLDER / name).is_file() for name in config["rule_files"]] == [True]
    (job,) = config["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["authorization"]["credentials_file"]
    provisioning = FOLDER / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    (provider,) = yaml.safe_load((provisioning / "dashboards/switchyard.yml").read_text())["providers"]
    assert provider["type"] == "file"


def test_labels_of_experts_are_bounded_and_series_never_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("server.expert_labels.time", Mock(monotonic=lambda: now))
    monkeypatch.setattr("server.metrics.EXPERT_LABELS", 2)
    metrics = Metrics(DummyEngine().stats, list)

    def counts() -> dict[str, float]:
        families = text_string_to_metric_families(metrics.render().decode())
        (family,) = (f for f in families if f.name == "switchyard_expert_requests")
        return {s.labels["expert"]: s.value for s in family.samples if s.name.endswith("_total")}

    for name in ("a", "b", "c", "a", "c"):
        metrics.count_expert(name)
    assert counts() == {"a": 2, "b": 1, "other": 2}
    now = 4000.0
    metrics.count_expert("a")
    metrics.count_expert("c")
    metrics.count_expert("d")
    assert counts() == {"a": 3, "c": 1, "other": 3}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_has_its_section_of_the_runbook(rule: dict[str, Any]) -> None:
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert anchor == rule["alert"].lower(), "the site makes an anchor of a heading so"
    text = (FOLDER.parents[1] / page).read_text(encoding="utf-8")
    section = re.search(rf"^## {rule['alert']}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    for part in ("**Means**", "**Causes**", "**Do**"):
        assert part in section[1]


def test_the_runbook_knows_no_other_alerts() -> None:
    text = (FOLDER.parents[1] / "docs/runbook.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^## (\w+)$", text, re.MULTILINE)) == {rule["alert"] for rule in RULES}


def test_the_runbook_s_codes_are_the_server_s() -> None:
    text = (FOLDER.parents[1] / "docs/runbook.md").read_text(encoding="utf-8")
    codes = set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
    assert codes
    assert codes <= set(re.findall(r"`(\w+)`", errors_table()))
