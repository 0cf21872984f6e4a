"""The stages, in the order of the road. Importing this package imports none of them.

A stage is one module: NAME, VERSION (raised whenever the same inputs would give another result), a frozen `Config`,
`inputs(config, store, chosen)` and `run(config, inputs, out, report)`. No stage imports another.
"""

import ast
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from pipelines.errors import UsageError, did_you_mean

ROAD = ("model", "profile", "plan", "distill", "export", "sample", "score")
# `compare` is made of scores and `bench` of a machine, beside the road: a recipe of the road does not name them.
STAGES: dict[str, str] = {name: f"pipelines.stages.{name}" for name in (*ROAD, "compare", "bench")}


def _module_name(name: str) -> str:
    if name not in STAGES:
        raise UsageError(f"there is no stage {name!r}", did_you_mean(name, STAGES))
    return STAGES[name]


def load(name: str) -> ModuleType:
    """The stage's module."""
    return importlib.import_module(_module_name(name))


def version_of(name: str) -> int:
    """The stage's VERSION, read from its source where it is not loaded: a status must not wait for torch."""
    module = _module_name(name)
    if module in sys.modules:
        return sys.modules[module].VERSION
    source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "VERSION" for t in node.targets):
            return ast.literal_eval(node.value)
    raise AssertionError(f"{module} declares no VERSION")
