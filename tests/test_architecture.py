"""The floors of docs/architecture.md: imports go downwards only, without cycles and without stars."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = [
    "qat.errors",
    "qat.options",
    "qat.atomic",
    "qat.scratch",
    "qat.numerics",
    "qat.kernels",
    "qat.quantizers",
    "qat.nn",
    "qat.transforms",
    "qat.planning",
    "qat.export",
    "qat",
    "lightning_modules",
    "train",
]


def floor(module: str) -> int:
    matching = [f for f in FLOORS if module == f or (f != "qat" and module.startswith(f + "."))]
    assert matching, f"{module} stands on no floor"
    return FLOORS.index(max(matching, key=len))


def imports() -> dict[str, set[str]]:
    """Every module of the project and the project's modules that it imports."""
    files = [*ROOT.glob("qat/**/*.py"), *ROOT.glob("lightning_modules/**/*.py"), ROOT / "train.py"]
    names = {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}
    graph: dict[str, set[str]] = {}
    for name, file in names.items():
        found = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: write imports in full"
                assert all(alias.name != "*" for alias in node.names), f"{name} imports a star"
                deeper = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {d if d in names else node.module for d in deeper}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[name] = {module for module in found if module in names}
    return graph


def test_imports_go_downwards():
    upward = [(a, b) for a, targets in imports().items() for b in targets if floor(b) > floor(a)]
    assert not upward


def test_no_import_cycle():
    graph, done = imports(), set()

    def visit(module, path):
        assert module not in path, f"cycle: {' -> '.join([*path, module])}"
        if module not in done:
            for target in graph[module]:
                visit(target, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def test_kernels_use_no_private_name_of_another_module():
    for file in (ROOT / "qat" / "kernels").glob("**/*.py"):
        tree = ast.parse(file.read_text())
        from_project = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and str(n.module).startswith("qat")]
        imported = [alias for node in from_project for alias in node.names]
        assert not [alias.name for alias in imported if alias.name.startswith("_")], file
        modules = {alias.asname or alias.name for alias in imported}
        used = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)]
        assert not [n.attr for n in used if n.value.id in modules and n.attr.startswith("_")], file


def test_every_file_belongs_to_a_floor():
    assert len(imports()) > 30
    assert all(floor(module) >= 0 for module in imports())
