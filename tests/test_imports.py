"""Imports go one way: training -> models, normalizers, data, ops; normalizers -> ops -> torch; report stands alone."""

import ast
import graphlib

import pytest

ALLOWED = {
    "cli": {"cli", "training"},
    "ops": {"ops"},
    "normalizers": {"normalizers", "ops"},
    "models": {"models"},
    "data": {"data"},
    "training": {"training", "models", "normalizers", "data", "ops"},
    "report": {"report"},
    "deploy": {"deploy", "training", "models", "normalizers", "data"},
}
GROUND = {"arguments", "errors", "files", "hooks", "provenance", "records", "scales", "text"}  # modules below all parts
# Packages outside the project that a part may load when it is imported.
HEAVY = {"torch", "torchvision", "pytorch_lightning", "hydra", "omegaconf", "triton", "wandb", "PIL", "torchmetrics"}
ALLOWED_HEAVY = {
    "cli": {"hydra", "omegaconf"},
    "ops": {"torch", "triton"},
    "normalizers": {"torch"},
    "models": {"torch", "torchvision"},
    "data": {"torch", "torchvision", "pytorch_lightning", "PIL", "triton"},
    "training": {"torch", "torchmetrics", "pytorch_lightning", "wandb"},
    "report": set(),
    "deploy": {"torch", "torchvision", "PIL"},
}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def imported_at_once(tree):
    """The imports of a module that take place when it is imported: not those of functions, nor for type checkers."""
    todo = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
            continue
        for_checkers = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not for_checkers and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)


def module_graph(folder):
    """Module -> those of the package that it imports at once; a module of a package is imported, not the package."""
    names = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for name, path in names.items():
        wanted = set()
        for node in imported_at_once(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            else:
                inner = (f"{node.module}.{alias.name}" for alias in node.names)
                wanted |= {module if module in names else node.module for module in inner}
        graph[name] = wanted & names.keys()
    return graph


def test_no_module_imports_itself_by_way_of_others(root):
    graph = module_graph(root / "onlinenorm")
    assert len(graph) > 100 and sum(map(len, graph.values())) > 200
    graphlib.TopologicalSorter(graph).prepare()  # CycleError names the modules of a cycle


def test_a_cycle_is_found(tmp_path):
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "__init__.py").write_text("from package.a import x\n")
    (folder / "a.py").write_text("import os\nfrom package import b\nx = 1\n")
    (folder / "b.py").write_text("def late():\n    import package.a\n")
    graphlib.TopologicalSorter(module_graph(folder)).prepare()
    (folder / "b.py").write_text("try:\n    import package.a\nexcept ImportError:\n    pass\n")
    with pytest.raises(graphlib.CycleError, match=r"package.a.*package.b"):
        graphlib.TopologicalSorter(module_graph(folder)).prepare()


def test_modules_below_all_parts_import_none_of_them(root):
    files = sorted((root / "onlinenorm").glob("*.py"))
    assert {path.stem for path in files} == GROUND | {"__init__"}
    for path in files:
        if path.stem != "__init__":  # whose names are those of the normalizers, on demand
            for node in imported_at_once(ast.parse(path.read_text())):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                package, _, part = module.partition(".")
                assert package != "onlinenorm" or part in GROUND, f"{path}: {module}"


def parts(root):
    return sorted(path.name for path in (root / "onlinenorm").iterdir() if (path / "__init__.py").exists())


def test_every_part_has_a_rule(root):
    assert set(parts(root)) == set(ALLOWED)


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_part_imports_only_what_lies_below_it(root, part):
    paths = sorted((root / "onlinenorm" / part).rglob("*.py"))
    assert len(paths) > 1
    for path in paths:
        for module in imported_modules(path):
            names = module.split(".")
            if names[0] == "onlinenorm":
                below = names[1] if len(names) > 1 else "normalizers"
                assert below in ALLOWED[part] | GROUND, f"{path}: {module}"
            elif names[0] in HEAVY:
                assert names[0] in ALLOWED_HEAVY[part], f"{path}: {module}"


def test_triton_is_imported_by_files_of_kernels_only(root):
    importing = {
        path
        for path in (root / "onlinenorm").rglob("*.py")
        if any(module.split(".")[0] == "triton" for module in imported_modules(path))
    }
    images = root / "onlinenorm" / "data" / "resize_triton.py"
    assert images in importing
    assert all("fused" in path.parts for path in importing - {images}), importing


def test_configuration_library_stays_with_the_command_line(root):
    importing = {
        path
        for path in (root / "onlinenorm").rglob("*.py")
        if any(module.split(".")[0] in ("hydra", "omegaconf") for module in imported_modules(path))
    }
    assert importing == {root / "onlinenorm" / "cli" / "compose.py"}
