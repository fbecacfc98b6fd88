"""Imports inside the package run one way and never in a circle; lazy and type-only imports count."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "kedit_train"
# Each layer may import itself and the layers before it (docs/architecture.md).
LAYERS = (
    (
        *("errors", "arguments", "optional", "owners", "atomic_write", "gguf_file", "evaluation_mode", "version"),
        *("paths", "plural", "quantized_layers", "compatibility"),
        *("safetensors_header", "safetensors_file", "functional", "edit"),
    ),
    ("world",),
    ("data",),
    ("core",),
    ("evaluation", "delta"),
    ("callbacks",),
    ("augmentation", "control", "modes", "modules", "pretrained", "processes", "trainers", "trainer_fields"),
    ("catalog", "cli", "__main__", "__init__"),
)
# A callback imports no other callback, unless it is a subclass of it.
SUBCLASSES = {
    "token_smoothing": "token_loss",
    "context_teacher": "token_loss",
    "second_order_locality": "polyak_step",
    "subject_values": "polyak_step",
}
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(package: Path = PACKAGE) -> dict[str, set[str]]:
    """Module name -> the modules of the package that it imports, at any place in the file."""
    modules = {module_name(path): path for path in package.rglob("*.py")}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                submodules = {f"{node.module}.{alias.name}" for alias in node.names}
                imported |= submodules & modules.keys() or {node.module}
        graph[name] = {target for target in imported & modules.keys() if target != name}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components with more than one module."""

    def reachable(start: str) -> set[str]:
        seen, stack = set(), [start]
        while stack:
            for target in graph[stack.pop()] - seen:
                seen.add(target)
                stack.append(target)
        return seen

    reach = {name: reachable(name) for name in graph}
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]}
    return [list(group) for group in sorted(groups)]


def upward(graph: dict[str, set[str]]) -> list[str]:
    def rank(module: str) -> int:
        return RANK[module.split(".")[1] if "." in module else "__init__"]

    return [f"{a} imports {b}" for a, targets in graph.items() for b in targets if rank(b) > rank(a)]


def test_no_import_circle():
    assert circles(import_graph()) == []


def test_no_upward_import():
    assert upward(import_graph()) == []


def test_an_added_circle_and_an_added_upward_import_are_found():
    graph = {name: set(targets) for name, targets in import_graph().items()}
    graph["kedit_train.errors"].add("kedit_train.core.run")
    assert any("kedit_train.errors imports kedit_train.core.run" in line for line in upward(graph))
    assert any({"kedit_train.errors", "kedit_train.core.run"} <= set(group) for group in circles(graph))


def test_no_callback_reads_a_private_attribute_of_the_run_or_imports_another_callback():
    wrong = []
    for path in (PACKAGE / "callbacks").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                if private and node.value.id in ("run", "head", "host"):
                    wrong.append(f"{path.name}: {node.value.id}.{node.attr}")
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kedit_train.callbacks."):
                base_or_host = node.module in ("kedit_train.callbacks.base", "kedit_train.callbacks.hosts.loop")
                subclass = node.module == f"kedit_train.callbacks.{SUBCLASSES.get(path.stem)}"
                if path.name not in ("__init__.py", "base.py") and not (base_or_host or subclass):
                    wrong.append(f"{path.name} imports {node.module}")
    assert wrong == []
