"""Who imports whom, read from the source: nothing is imported to find out."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOMS = ("server", "store", "router")
ELSEWHERE = ("bench", "deploy", "examples", "tests")
"""Folders that may use the rooms, and that no room may use."""


@dataclass(frozen=True)
class Import:
    """One import statement. `at_start` tells whether importing the module runs it."""

    importer: str
    imported: str
    at_start: bool


MAY_IMPORT: Mapping[str, tuple[str, ...]] = {
    "store": ("store",),
    # Exemplars reach the router as text; what it gives back is a mix.
    "router": ("router", "store.errors", "store.exemplars", "store.mix"),
    # Decoding only: how experts are made, named and kept is none of the engine's business.
    "server.engine": (
        "server.engine",
        "store.bits",
        "store.checkpoint",
        "store.deltas",
        "store.encodings",
        "store.errors",
        "store.expert_file",
        "store.fingerprint",
        "store.manifest",
        "store.mix",
        "store.overwriting",
        "store.packed",
        "store.patterns",
        "store.positions",
        "store.tiers",
    ),
    "server.tools": ("server.engine.grammar_check", "server.engine.types", "server.tools"),
    "server.access_settings": (),
    "server.audit": (),
    "server.console": (),
    "server.recency": (),
    "server.logs": (),
    "server.local_files": ("store.errors",),
    "server.tracing": ("server.engine.timing", "store.errors"),
    "server.metering": ("store.access", "store.backends.ledger", "store.errors", "store.keys", "store.tenants"),
    "server.exposure": ("server.settings", "store.errors", "store.keys"),
    "server.service_settings": ("server.access_settings", "store.tenants"),
    "server.settings": ("server.engine.options", "server.service_settings", "server.tools", "router"),
    "server.routing_metrics": ("server.expert_labels", "router.decision"),
    "server.harvest": (
        "server.audit",
        "server.choices",
        "server.engine.types",
        "server.library",
        "server.prompts",
        "store.access",
        "store.errors",
    ),
    "server.shadow": (
        "server.choices",
        "server.prompts",
        "server.routing_metrics",
        "router.decision",
        "router.options",
        "store.access",
        "store.errors",
    ),
    "server.expert_labels": (),
    "server.metrics": (
        "server.engine.stats",
        "server.engine.timing",
        "server.expert_labels",
        "server.routing_metrics",
        "store.errors",
        "store.record",
        "store.tiers",
    ),
    "server.chores": ("store.errors",),
    "server.closing": ("store.errors",),
    "server.mirror": (
        "server.library",
        "server.mirror_state",
        "store.access",
        "store.errors",
        "store.expert_file",
        "store.intake",
    ),
    "server.mirror_state": ("store.errors", "store.strict_json"),
    "server.watching": ("server.mirror", "store.errors", "store.exemplars", "store.intake", "store.signature"),
    "server.mirrors": (
        "server.chores",
        "server.library",
        "server.mirror",
        "server.mirror_state",
        "server.remote_source",
        "server.settings",
        "server.watching",
        "store.remote",
    ),
    "server.remote_source": ("server.mirror", "store.errors", "store.exemplars", "store.remote", "store.signature"),
    "server.pulling": (
        "server.client",
        "server.pushing",
        "store.errors",
        "store.exemplars",
        "store.expert_file",
        "store.remote",
        "store.signature",
    ),
    "server.prompts": ("server.engine.types", "store.errors"),
    "server.text": (),
    "server.teaching": ("router.router", "store.errors", "store.record", "store.registry"),
    "server.library": (
        "server.teaching",
        "server.engine.types",
        "store.access",
        "store.alias",
        "router.router",
        "store.errors",
        "store.exemplar_changes",
        "store.expert_file",
        "store.intake",
        "store.layers",
        "store.ownership",
        "store.record",
        "store.registry",
        "store.trust",
    ),
    "server.work_metrics": ("server.jobs.job", "store.upload"),
    "server.jobs": ("server.jobs", "server.library", "store"),
    "server.inbox": ("store.access", "store.errors", "store.intake", "store.upload", "store.uploads"),
    "server.choices": (
        "server.engine.types",
        "server.metrics",
        "server.text",
        "store.mix",
        "server.engine.timing",
        "server.tracing",
    ),
    "server.encoding": ("server.engine.types", "server.prompts", "store.errors"),
    "server.composing": ("server.choices", "store.lineage", "store.mix", "store.patterns"),
    "server.generation": (
        "server.choices",
        "server.composing",
        "server.encoding",
        "server.engine.types",
        "server.metrics",
        "server.prompts",
        "server.text",
        "router.decision",
        "router.options",
        "router.router",
        "store.access",
        "store.errors",
        "store.mix",
        "store.record",
        "store.registry",
        "server.tracing",
    ),
    "server.api": (
        "server.access_settings",
        "server.api",
        "server.choices",
        "server.chores",
        "server.closing",
        "server.encoding",
        "server.engine.types",
        "server.generation",
        "server.inbox",
        "server.jobs",
        "server.library",
        "server.metrics",
        "server.prompts",
        "server.console",
        "server.recency",
        "server.route_reports",
        "server.settings",
        "server.teaching",
        "router.decision",
        "router.map",
        "router.mix",
        "router.options",
        "router.report",
        "router.router",
        "store.access",
        "store.alias",
        "store.card",
        "store.errors",
        "store.exemplars",
        "store.expert_header",
        "store.expert_info",
        "store.intake",
        "store.keys",
        "store.labelled",
        "store.layers",
        "store.measured",
        "store.record",
        "store.signature",
        "store.strict_json",
        "store.upload",
        "server.audit",
        "server.metering",
        "store.ownership",
        "store.tenants",
        "server.tools",
        "server.logs",
        "server.tracing",
        "server.local_files",
        "store.codecs.base",
        "store.codecs.flex_recipe",
        "store.codecs.t_switch",
        "store.compress_rules",
        "store.floors",
        "store.tiers",
    ),
    "server.app": (
        "server.api",
        "server.chores",
        "server.closing",
        "server.encoding",
        "server.engine.types",
        "server.generation",
        "server.harvest",
        "server.inbox",
        "server.jobs",
        "server.library",
        "server.lifetime",
        "server.metrics",
        "server.mirrors",
        "server.recency",
        "server.route_reports",
        "server.settings",
        "server.work_metrics",
        "server.shadow",
        "router.router",
        "store.backends.ledger",
        "store.errors",
        "store.expert_header",
        "store.keys",
        "store.registry",
        "store.uploads",
        "server.audit",
        "server.metering",
        "store.errors",
        "store.tenants",
        "server.tracing",
        "server.local_files",
    ),
    "server.lifetime": ("server.api.services", "server.chores", "store.errors"),
    # Puts everything together.
    "server.assembly": (
        "server.app",
        "server.engine",
        "server.exposure",
        "server.generation",
        "server.settings",
        "router",
        "store",
    ),
    "server.protocol": ("server.api",),
    "server.serving": (
        "server.protocol",
        "server.api",
        "server.assembly",
        "server.generation",
        "server.settings",
        "store",
        "server.logs",
    ),
    # The command line and what its verbs need: they talk to a server over HTTP, or to the store.
    "server.cli": ("server", "store"),
    "server.cli_files": ("server", "store"),
    "server.cli_store": ("server.settings", "server.storekeeping"),
    "server.drawing": ("server.client", "store.errors"),
    "server.route_reports": ("router", "store.access", "store.errors", "store.registry"),
    "server.cli_routing": ("server.client", "server.drawing", "store.errors", "store.exemplars"),
    "server.cli_plan": ("server.planning", "store.errors"),
    "server.planning": ("server.popularity", "store.errors"),
    "server.popularity": (),
    "server.cli_tenants": ("server.cli_keys", "server.client"),
    "server.cli_keys": ("server.audit", "server.client", "store"),
    "server.cli_options": ("server.api.compress_options", "server.settings", "store.errors"),
    "server.client": ("store.errors",),
    "server.chatting": ("server.client", "store.errors"),
    "server.raw_pushing": (
        "server.api.compress_options",
        "server.client",
        "server.compress_report",
        "server.pushing",
        "store.errors",
        "store.exemplars",
        "store.labelled",
    ),
    "server.compress_report": ("server.inspecting", "store"),
    "server.pushing": ("server.client", "store.errors", "store.exemplars", "store.signature"),
    "server.compressing": (
        "server.compress_report",
        "server.engine.base_source",
        "server.jobs.process",
        "server.settings",
        "store",
    ),
    "server.merging": ("server.engine.base_source", "server.settings", "store"),
    "server.inspecting": ("store",),
    "server.plotting": ("store.errors", "store.layers"),
    "server.signing": ("store.errors", "store.expert_file", "store.signature"),
    "server.storekeeping": ("store",),
    "server": (),
}
"""Module or folder → what it may import of ours. The longest name that fits counts."""


def sources(root: Path) -> dict[str, Path]:
    """Every module of the rooms by name."""
    found = {}
    for room in ROOMS:
        for path in sorted((root / room).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path) -> list[Import]:
    """Every import of every module; `from package import module` counts as an import of the module."""
    modules = sources(root)
    found = []
    for module, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        late = set(_late(tree))
        for node in ast.walk(tree):
            found += [Import(module, name, node not in late) for name in _names(node, modules)]
    return found


def faults(root: Path) -> list[str]:
    """Imports that go the wrong way."""
    found = []
    for item in imports(root):
        imported = item.imported
        if _top(imported) in ELSEWHERE:
            found.append(f"{item.importer} imports {imported}")
        elif _top(imported) in ROOMS and imported not in ROOMS:  # a room's own name is its version or its docstring
            allowed = MAY_IMPORT[_rule(item.importer)]
            if not any(imported == name or imported.startswith(f"{name}.") for name in allowed):
                found.append(f"{item.importer} imports {imported}")
    return sorted(set(found))


def ways_to(root: Path, start: str, libraries: frozenset[str]) -> list[str]:
    """How importing a module of the folder `start` brings in one of the libraries: a chain of imports each."""
    edges: dict[str, set[str]] = {}
    for item in imports(root):
        if item.at_start:
            edges.setdefault(item.importer, set()).add(item.imported)
    found = []
    for module in sources(root):
        if module == start or module.startswith(f"{start}."):
            found += [" → ".join(way) for way in _ways(edges, (module,), libraries, set())]
    return found


def _ways(
    edges: Mapping[str, set[str]], way: tuple[str, ...], libraries: frozenset[str], seen: set[str]
) -> Iterator[tuple[str, ...]]:
    seen.add(way[-1])
    for imported in sorted(edges.get(way[-1], ())):
        if _top(imported) in libraries:
            yield (*way, imported)
        elif imported not in seen:
            yield from _ways(edges, (*way, imported), libraries, seen)


def _names(node: ast.AST, modules: Mapping[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.module is not None
        assert not node.level, "imports are absolute"
        for alias in node.names:
            inner = f"{node.module}.{alias.name}"
            yield inner if inner in modules else node.module


def _late(tree: ast.Module) -> Iterator[ast.AST]:
    """Nodes that importing the module does not run: bodies of functions, and what is there for type checkers."""
    for node in ast.walk(tree):
        is_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if is_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from ast.walk(node)


def _rule(module: str) -> str:
    return max((name for name in MAY_IMPORT if module == name or module.startswith(f"{name}.")), key=len)


def _top(module: str) -> str:
    return module.split(".")[0]
