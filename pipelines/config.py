"""Strict conversion between YAML or JSON mappings and frozen dataclasses.

A configuration is a frozen dataclass of plain JSON values. Its fields are the one home of their defaults and types; an
unknown key, a wrong type or a missing value is refused where it is read, with the key, the file and the way out.
`field(metadata={"key": False})` marks a value that is recorded but does not decide whether a run is the same run, and
`field(metadata={"path": True})` one that names a file.
"""

import dataclasses
import json
import math
import re
import reprlib
import types
import typing
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from yaml.composer import Composer

from pipelines.errors import FileFault, UsageError, did_you_mean

T = TypeVar("T")
MOST_VALUES = 500_000  # in a file, an alias counted as all that it stands for
MOST_DIGITS = 100  # of a number
LARGEST_KEY = 1 << 48  # of those that are whole numbers
MOST_YAML = 4 << 20  # bytes; a plan of 1,000 sites has 1 MB

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


def _shown(value: Any) -> str:
    """A value in an error, in a few words whatever its size."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to write out the largest
        return f"a number of {value.bit_length()} bits"
    return _repr.repr(value)


# Scanned in C, in a quarter of the time, where PyYAML has libyaml, as its wheels do. Nodes are composed in Python,
# whose recursion ends before the process does.
if yaml.__with_libyaml__:

    class _Loader(Composer, yaml.CSafeLoader):
        def __init__(self, stream: str):
            yaml.CSafeLoader.__init__(self, stream)
            Composer.__init__(self)

else:
    _Loader = yaml.SafeLoader


class _StrictLoader(_Loader):
    """SafeLoader (no tags that make objects), which also refuses a key given twice and aliases that multiply."""

    def get_single_node(self):
        node = super().get_single_node()
        if node is not None:
            self._size(node, {})
        return node

    def _size(self, node: yaml.Node, known: dict[yaml.Node, int]) -> int:
        """How many values a node makes, all of its aliases written out."""
        if node not in known:
            known[node] = MOST_VALUES  # what a node inside itself counts for
            inner = node.value if isinstance(node, yaml.CollectionNode) else ()
            parts = (part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,)))
            known[node] = size = 1 + sum(self._size(part, known) for part in parts)
            if size > MOST_VALUES:
                raise yaml.constructor.ConstructorError(
                    None, None, f"more than {MOST_VALUES} values, aliases written out", node.start_mark
                )
        return known[node]

    def construct_mapping(self, node, deep=False):
        if not isinstance(node, yaml.MappingNode):  # `!!map [1]`
            raise yaml.constructor.ConstructorError(None, None, "no mapping, as its tag says", node.start_mark)
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.constructor.ConstructorError(None, None, "a key must be a plain value", key_node.start_mark)
            if isinstance(key, int) and abs(key) >= LARGEST_KEY:  # of which many can have one hash: quadratic time
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {_shown(key)} is too large a number", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {_shown(key)} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_number(self, node):
        """A finite number of at most MOST_DIGITS characters: YAML's 1:30:00, to base 60, gets ever slower."""
        text = self.construct_scalar(node)
        if len(text) > MOST_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, f"a number of {len(text)} characters", node.start_mark)
        whole = node.tag.endswith("int")
        value = self.construct_yaml_int(node) if whole else self.construct_yaml_float(node)
        if not whole and not math.isfinite(value):
            raise yaml.constructor.ConstructorError(None, None, f"{text} is no finite number", node.start_mark)
        return value


# YAML 1.1 reads 1e-6 as a string, because it wants a dot in front of the exponent; nobody who writes a rate means that.
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


# Plain values alone: a date stays text, and tags that make bytes, sets or pairs are refused like any other.
_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _StrictLoader.yaml_implicit_resolvers.items()
}
for _kind in ("binary", "timestamp", "omap", "pairs", "set"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _StrictLoader.construct_undefined)
for _kind in ("int", "float"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", _StrictLoader.construct_number)


def strict_json(text: str, constants: tuple[str, ...] = ()) -> Any:
    """JSON as plain values. ValueError for a key given twice, numbers that are not finite (of NaN, Infinity and
    -Infinity those in `constants` are null) and lists and mappings too deep.
    """

    def constant(word: str) -> None:
        if word not in constants:
            raise ValueError(f"{word} is no number")

    def number(word: str) -> float:
        if not math.isfinite(value := float(word)):
            raise ValueError(f"{word[:40]} is larger than any number")
        return value

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise ValueError(f"key {_shown(key)} is given twice")
        return found

    try:
        return json.loads(text, parse_constant=constant, parse_float=number, object_pairs_hook=mapping)
    except RecursionError as fault:
        raise ValueError("lists and mappings too deep to be read") from fault


def read_yaml(path: Path | str) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file; empty means an empty mapping. FileFault names the file and the line."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise FileFault(f"{path} is a pipe or a device, not a file", "save it to a file first")
    try:
        with open(path, "rb") as file:
            content = file.read(MOST_YAML + 1)
        if len(content) > MOST_YAML:
            raise FileFault(f"{path} has more than {MOST_YAML} bytes", "it takes a file written by hand or by hqdm")
        text = content.decode("utf-8")
    except FileNotFoundError as fault:
        raise FileFault(f"{path} does not exist", "check the path") from fault
    except IsADirectoryError as fault:
        raise FileFault(f"{path} is a folder, not a YAML file", "name a file in it") from fault
    except UnicodeDecodeError as fault:
        raise FileFault(f"{path} is not UTF-8 text (byte {fault.start})", "save it as UTF-8 YAML") from fault
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as fault:
        mark = fault.problem_mark or fault.context_mark
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise FileFault(f"{where}: {fault.problem}", "mend that line; plain YAML without tags is read") from fault
    except (yaml.YAMLError, RecursionError, ValueError) as fault:
        raise FileFault(f"{path} is not YAML: {fault}", "plain YAML without tags is read") from fault
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise FileFault(f"{path} holds a {type(values).__name__} at its top, not a mapping", "write `key: value` lines")
    for key in values:
        if not isinstance(key, str):
            raise FileFault(f"{path}: the key {_shown(key)} is not a word", "put it in quotes")
    return values


def yaml_value(text: str, name: str) -> Any:
    """One plain value as YAML writes it: `0.5`, `false`, `[adapters, biases]`. UsageError, by its name, for what is no
    YAML.
    """
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise UsageError(f"{name} cannot be {_shown(text)}", "write 0.5, true, null or [adapters, biases]") from None


def yaml_text(value: Any) -> str:
    """A plain value in one line, which `yaml_value` reads back as it is; text that would be read as anything else, or
    not whole, in quotes.
    """
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        if yaml_value(value, "") == value:
            return value
    except UsageError:
        pass
    return yaml.safe_dump(value, default_style='"', width=math.inf).rstrip("\n")


def write_yaml(values: Mapping[str, Any]) -> str:
    """A mapping of plain values as YAML text, keys in their order."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=120)


def _name_of(kind: Any) -> str:
    """A type as a person would say it."""
    if kind is type(None):
        return "null"
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(_name_of(part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    origin = typing.get_origin(kind) or kind
    args = typing.get_args(kind)
    if origin in (list, tuple):
        return f"a list of {_several(args[0])}" if args and len(set(args) - {...}) == 1 else "a list"
    if origin is dict and args and args[1] is not Any:
        return f"a mapping of names to {_name_of(args[1])}"
    if origin is dict or dataclasses.is_dataclass(origin):
        return "a mapping"
    return names.get(kind, str(kind))


def _several(kind: Any) -> str:
    """The entries of a list, as a person would say them."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(map(_several, typing.get_args(kind)))
    names = {int: "whole numbers", float: "numbers", str: "text", bool: "true or false"}
    return names.get(kind, "mappings" if dataclasses.is_dataclass(kind) else "values")


class _Misfit(Exception):
    """A value that does not have its type; carries the place inside the value, what stands there, and that type."""


def _convert(kind: Any, value: Any, key: str, where: str) -> Any:
    """`value` as `kind`; whole numbers pass for numbers, lists for tuples, nothing else passes for anything else."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        inside = None  # of a list or a mapping that is asked for, the entry that does not fit
        for part in args:
            try:
                return _convert(part, value, key, where)
            except _Misfit as misfit:
                inside = misfit if misfit.args[0] != key else inside
        raise inside or _Misfit(key, value, kind)
    if origin is typing.Literal:
        if any(value == choice and type(value) is type(choice) for choice in args):
            return value
        if isinstance(value, str):
            raise UsageError(
                f"{where}: {key} is {_shown(value)}, which is no choice", did_you_mean(value, map(str, args))
            )
        raise _Misfit(key, value, kind)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, kind):
            return value
        if isinstance(value, Mapping):
            return _build(kind, value, where, f"{key}.")
        raise _Misfit(key, value, kind)
    if origin in (list, tuple) or kind in (list, tuple):
        if not isinstance(value, list | tuple):
            raise _Misfit(key, value, kind)
        if not args:
            return (origin or kind)(value)
        if origin is tuple and args[-1] is not Ellipsis:
            if len(value) != len(args):
                raise UsageError(f"{where}: {key} has {len(value)} entries", f"give {len(args)}")
            parts = args
        else:
            parts = [args[0]] * len(value)
        return origin(_convert(p, v, f"{key}[{i}]", where) for i, (p, v) in enumerate(zip(parts, value, strict=True)))
    if origin is dict or kind is dict:
        if not isinstance(value, Mapping):
            raise _Misfit(key, value, kind)
        part = args[1] if args else Any
        return {str(k): _convert(part, v, f"{key}.{k}", where) for k, v in value.items()}
    if kind is type(None):
        if value is None:
            return None
        raise _Misfit(key, value, kind)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, int) and value.bit_length() > 1000:  # no float is as large
            raise _Misfit(key, value, kind)
        if not math.isfinite(value):
            raise UsageError(f"{where}: {key} is {value}", "give a finite number")
        return float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        if value.bit_length() > 63:  # libraries refuse it only where they meet it, in the middle of a run
            raise UsageError(f"{where}: {key} cannot be {_shown(value)}", "it takes a whole number below 2⁶³")
        return value
    if kind in (str, bool) and isinstance(value, kind):
        return value
    raise _Misfit(key, value, kind)


def _build(cls: type[T], values: Mapping[str, Any], where: str, prefix: str = "") -> T:
    kinds = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    ready = {}
    for key, value in values.items():
        if key not in fields:
            raise UsageError(f"{where}: unknown key {_shown(prefix + str(key))}", did_you_mean(str(key), fields))
        try:
            ready[key] = _convert(kinds[key], value, prefix + key, where)
        except _Misfit as misfit:
            place, found, wanted = misfit.args
            found = "null" if found is None else _shown(found)
            hint = f"it takes {_name_of(wanted)}"
            if value is None:
                hint += "; leave the key out to get its default"
            raise UsageError(f"{where}: {place} cannot be {found}", hint) from None
    for name, field in fields.items():
        if name not in ready and field.default is field.default_factory is dataclasses.MISSING:
            raise UsageError(f"{where}: the key {prefix + name!r} is missing", f"it takes {_name_of(kinds[name])}")
    return cls(**ready)


def from_dict(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """The dataclass `cls` from a mapping read at `where` (a file's name, or what else a person would look at)."""
    return _build(cls, values, where)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return value


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values, fields in their order; `from_dict` reads it back."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def key_dict(config: Any) -> dict[str, Any]:
    """The part of a configuration that decides whether two runs are the same run."""
    recorded_only = {field.name for field in dataclasses.fields(config) if not field.metadata.get("key", True)}
    return {name: value for name, value in to_dict(config).items() if name not in recorded_only}


def replace(config: T, **options: Any) -> T:
    """`config` with those options that are not None; the rest keep their values. Unknown names are refused."""
    given = {name: value for name, value in options.items() if value is not None}
    current = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.init}
    known = set(current)
    for name in given:
        if name not in known:
            raise UsageError(f"{_stage_of(config)} has no option {name!r}", did_you_mean(name, known))
    return _build(type(config), current | given, _stage_of(config))


def _stage_of(config: Any) -> str:
    """`distill` for pipelines.stages.distill.Config: the word a person typed."""
    return type(config).__module__.rpartition(".")[2]


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """`bits w4a4 -> w3a3` for each key whose value differs; a key that one side lacks counts as null."""
    names = [*before, *(name for name in after if name not in before)]
    return [
        f"{name} {_short(before.get(name))} -> {_short(after.get(name))}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else text[:12] + "…"
