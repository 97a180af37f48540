"""Imports go one way: training -> models, normalizers, data; normalizers -> ops -> torch; report stands alone."""

import ast

import pytest

ALLOWED = {
    "cli": {"cli", "training"},
    "ops": {"ops"},
    "normalizers": {"normalizers", "ops"},
    "models": {"models"},
    "data": {"data"},
    "training": {"training", "models", "normalizers", "data"},
    "report": {"report"},
    "deploy": {"deploy", "training", "models", "normalizers", "data"},
}
GROUND = {"arguments", "errors", "files", "provenance", "records", "scales", "text"}  # modules below all parts
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
