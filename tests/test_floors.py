"""The architecture: a file imports only from floors below its own, and the floors below never load torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The longest fitting prefix counts. Same floor: only within the same package (pipelines.quant, pipelines.models, …).
FLOORS = {
    "pipelines": 0,  # the package's own __init__; a module that no line below names is refused
    "pipelines.errors": 0,
    "pipelines.events": 0,
    "pipelines.memory": 0,
    "pipelines.native": 0,
    "pipelines.processes": 0,
    "pipelines.stops": 0,
    "pipelines.config": 0,
    "pipelines.quant.spec": 0,
    "pipelines.workspace": 1,
    "pipelines.plans": 1,
    "pipelines.states": 1,
    "pipelines.quant": 1,
    "pipelines.digits": 1,
    "pipelines.cifar10": 1,
    "pipelines.quant.layers": 2,
    "pipelines.quant.observe": 2,
    "pipelines.quant.candidates": 2,
    "pipelines.quant.search": 2,
    "pipelines.measures": 3,
    "pipelines.diffusion": 2,
    "pipelines.kernels": 3,
    "pipelines.models": 3,
    "pipelines.methods": 3,
    "pipelines.metrics": 3,
    "pipelines.report": 3,
    "pipelines.speed": 4,
    "pipelines.replay": 4,
    "pipelines.students": 4,  # quantised denoisers: of models, kernels and quant together
    "pipelines.distillation": 4,
    "pipelines.sampling": 4,
    "pipelines.sharding": 4,
    "pipelines.reconstruction": 4,
    "pipelines.digits.train": 4,
    "pipelines.cifar10.data": 4,
    "pipelines.stages": 5,
    "pipelines.doctor": 5,
    "pipelines.runner": 6,
    "pipelines.comparison": 7,
    "pipelines.reproduce": 7,
    "pipelines.gc": 7,
    "hqdm_cli": 8,
}


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def prefix_of(module):
    """The line of the table that a module falls under, or None."""
    fitting = [prefix for prefix in FLOORS if module == prefix or module.startswith(f"{prefix}.")]
    prefix = max(fitting, key=len, default=None)
    return None if prefix == "pipelines" and module != "pipelines" else prefix


def package_of(module):
    """pipelines.quant for pipelines.quant.affine; the plain values of floor 0 count as one package."""
    if FLOORS[prefix_of(module)] == 0:
        return "plain values"
    return ".".join(module.split(".")[:2]) if module.startswith("pipelines") else "hqdm_cli"


MODULES = {module_of(path): path for top in ("pipelines", "hqdm_cli") for path in sorted((ROOT / top).rglob("*.py"))}


def imports_of(module):
    """Every module of this project that a file names in an import, wherever in the file; with the line."""
    path = MODULES[module]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            names = [f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names]
        else:
            continue
        yield from ((name, node.lineno) for name in names if name.split(".")[0] in ("pipelines", "hqdm_cli"))


def test_every_module_has_a_floor():
    assert [module for module in MODULES if prefix_of(module) is None] == []


@pytest.mark.parametrize("module", MODULES)
def test_a_file_imports_only_from_floors_below(module):
    floor = FLOORS[prefix_of(module)]
    for name, line in imports_of(module):
        below = FLOORS[prefix_of(name)]
        same_package = package_of(name) == package_of(module)
        where = f"{module}:{line} (floor {floor}) imports {name} (floor {below})"
        assert below < floor or (below == floor and same_package), where


STAGES = [module for module in MODULES if module.startswith("pipelines.stages.")]


@pytest.mark.parametrize("module", STAGES)
def test_no_stage_imports_another(module):
    assert [name for name, _ in imports_of(module) if name in STAGES and name != module] == []


@pytest.mark.parametrize("library", ["typer", "rich"])
def test_only_the_command_line_knows_of_terminals(library):
    for module, path in MODULES.items():
        names = {
            name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        }
        assert library not in names or module.startswith("hqdm_cli"), f"{module} imports {library}"


def test_the_lowest_floor_the_workspace_and_the_runner_never_load_torch():
    light = [m for m in MODULES if FLOORS[prefix_of(m)] == 0 or m.startswith("pipelines.workspace")]
    light += ["pipelines.runner", "hqdm_cli.app"]
    code = f"import sys, {', '.join(light)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
