"""Which files of the user's own a configuration runs: they are part of what a run is."""

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onlinenorm.training.targets import NAMED, OWN, is_users


def own_files(config: dict[str, Any]) -> dict[str, dict[str, Path]]:
    """Group -> module -> file, of each target that is not of this package and of all of the user's that it imports."""
    files = {}
    for group in OWN:
        node = config.get(group)
        target = node.get("_target_") if isinstance(node, dict) else None
        if isinstance(target, str) and target not in NAMED[group]:
            files[group] = _imported_by(target.rpartition(".")[0])
    return files


def own_code(config: dict[str, Any]) -> dict[str, dict[str, str]]:
    """`own_files` as SHA-256 of each file's content."""
    return {
        group: {module: hashlib.sha256(file.read_bytes()).hexdigest() for module, file in sorted(files.items())}
        for group, files in own_files(config).items()
    }


def changed_code(old: dict[str, dict[str, str]], config: dict[str, Any]) -> list[str]:
    """A line "group: file" for each file of the user's own that is not as it was recorded by `own_code`."""
    new, files = own_code(config), own_files(config)
    lines = []
    for group in sorted(old.keys() | new.keys()):
        before, after = old.get(group, {}), new.get(group, {})
        for module in sorted(before.keys() | after.keys()):
            if before.get(module) != after.get(module):
                what = "has changed" if module in before and module in after else "is new"
                place = files.get(group, {}).get(module)
                lines.append(f"{group}: {f'{place} {what}' if place else f'module {module} is gone'}")
    return lines


def _imported_by(module: str) -> dict[str, Path]:
    """Module -> file, of `module` and whatever it imports, read from the sources, as far as it is the user's own."""
    files: dict[str, Path] = {}
    todo, seen = [module], set()
    while todo:
        name = todo.pop()
        if not name or name in seen:
            continue
        seen.add(name)
        file = _file(name)
        if file is None:
            continue
        files[name] = file
        todo += [name.rpartition(".")[0], *_imports(name, file)]
    return files


def _file(module: str) -> Path | None:
    if module.partition(".")[0] in {*sys.stdlib_module_names, "__main__", "onlinenorm"}:
        return None
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):
        return None
    if spec is None or not spec.has_location or not spec.origin or not is_users(spec.origin):
        return None
    file = Path(spec.origin).resolve()
    return file if file.is_file() else None  # what is loaded already may be gone


def _imports(module: str, file: Path) -> Iterator[str]:
    if file.suffix != ".py":
        return
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:  # raised where it is imported
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield source
            yield from (f"{source}.{alias.name}" for alias in node.names)  # modules of a package, or not found
