"""Configurations: what is read strictly, and what an error says."""

from dataclasses import dataclass, field
from typing import Literal

import pytest

from pipelines.config import differences, from_dict, key_dict, read_yaml, replace, to_dict, write_yaml
from pipelines.errors import FileFault, UsageError


@dataclass(frozen=True)
class Inner:
    order: int = 32


@dataclass(frozen=True)
class Config:
    steps: int
    rate: float = 5e-4
    name: str = "hqdm"
    form: Literal["int", "float"] = "int"
    limit: float | None = None
    widths: tuple[int, ...] = (64, 64)
    inner: Inner = field(default_factory=Inner)
    note: str = field(default="", metadata={"key": False})


def test_what_is_written_is_read_back_equal(tmp_path):
    config = Config(steps=3, rate=1e-6, limit=0.5, widths=(1, 2, 3), inner=Inner(8))
    path = tmp_path / "config.yaml"
    path.write_text(write_yaml(to_dict(config)))
    assert from_dict(Config, read_yaml(path), str(path)) == config


def test_an_unknown_key_is_refused_with_the_nearest_one_and_the_file():
    with pytest.raises(UsageError) as fault:
        from_dict(Config, {"stepps": 3}, "recipe.yaml: distill")
    assert fault.value.what == "recipe.yaml: distill: unknown key 'stepps'"
    assert fault.value.hint == "did you mean 'steps'?"


def test_an_unknown_key_inside_a_mapping_is_named_with_its_path():
    with pytest.raises(UsageError, match="unknown key 'inner.ordr'"):
        from_dict(Config, {"steps": 3, "inner": {"ordr": 8}}, "f.yaml")


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"steps": "3"}, "f.yaml: steps cannot be '3'"),
        ({"steps": True}, "f.yaml: steps cannot be True"),
        ({"steps": 3.0}, "f.yaml: steps cannot be 3.0"),
        ({"steps": None}, "f.yaml: steps cannot be null"),
        ({"steps": 3, "rate": "fast"}, "f.yaml: rate cannot be 'fast'"),
        ({"steps": 3, "widths": [1, "2"]}, "f.yaml: widths[1] cannot be '2'"),
        ({"steps": 3, "widths": 5}, "f.yaml: widths cannot be 5"),
        ({"steps": 3, "name": 5}, "f.yaml: name cannot be 5"),
        ({"steps": 3, "inner": 5}, "f.yaml: inner cannot be 5"),
        ({"steps": 3, "rate": float("nan")}, "f.yaml: rate is nan"),
        ({"steps": 3, "form": "itn"}, "f.yaml: form is 'itn', which is no choice"),
        ({}, "f.yaml: the key 'steps' is missing"),
    ],
)
def test_a_wrong_value_is_refused_by_name(values, what):
    with pytest.raises(UsageError) as fault:
        from_dict(Config, values, "f.yaml")
    assert fault.value.what == what
    assert fault.value.hint


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        ({"steps": 3, "widths": [1, "2"]}, "it takes a whole number"),
        ({"steps": 3, "widths": 5}, "it takes a list of whole numbers"),
        ({"steps": "3"}, "it takes a whole number"),
    ],
)
def test_the_hint_says_what_a_list_is_of_and_of_one_entry_what_that_takes(values, hint):
    with pytest.raises(UsageError) as fault:
        from_dict(Config, values, "f.yaml")
    assert fault.value.hint == hint


def test_null_is_taken_only_where_the_type_has_it():
    assert from_dict(Config, {"steps": 3, "limit": None}, "f.yaml").limit is None


def test_a_whole_number_passes_for_a_number():
    assert from_dict(Config, {"steps": 3, "rate": 1}, "f.yaml").rate == 1.0


def test_replace_keeps_what_was_not_given():
    config = Config(steps=3, name="x")
    assert replace(config, steps=None, name=None, rate=0.1) == Config(steps=3, name="x", rate=0.1)


def test_replace_refuses_an_option_that_the_stage_does_not_have():
    with pytest.raises(UsageError) as fault:
        replace(Config(steps=3), step=4)
    assert fault.value.what == "test_config has no option 'step'"
    assert fault.value.hint == "did you mean 'steps'?"


def test_the_key_leaves_out_what_is_only_recorded():
    assert "note" not in key_dict(Config(steps=3))
    assert to_dict(Config(steps=3, note="here"))["note"] == "here"


def test_differences_name_each_changed_value():
    assert differences({"bits": "w4a4", "a": 1}, {"bits": "w3a3", "a": 1}) == ["bits w4a4 -> w3a3"]
    assert differences({}, {"a": 1}) == ["a none -> 1"]


def test_a_rate_without_a_dot_is_a_number(tmp_path):
    path = tmp_path / "rates.yaml"
    path.write_text("a: 1e-6\nb: 5E+3\nc: 1.5e3\nd: '1e-6'\ne: 0x1F\n")
    assert read_yaml(path) == {"a": 1e-6, "b": 5e3, "c": 1.5e3, "d": "1e-6", "e": 31}


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", "line 3"),
        ("a: 1\nb: !!python/object/apply:os.system ['true']\n", "line 2"),
        ("a: 1\nb: 2\na: 3\n", "line 3: key 'a' is given twice"),
        ("a: 1\n\tb: 2\n", "line 2"),
        ("- 1\n- 2\n", "holds a list at its top"),
        ("1: 2\n", "the key 1 is not a word"),
        ("just words\n", "holds a str at its top"),
        ("[" * 3000, "is not YAML"),
    ],
)
def test_a_yaml_file_that_cannot_be_read_is_named_with_its_line(tmp_path, text, where):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(FileFault) as fault:
        read_yaml(path)
    assert str(path) in fault.value.what
    assert where in fault.value.what
    assert fault.value.hint


def test_a_missing_file_a_folder_and_bytes_are_named(tmp_path):
    (tmp_path / "bytes.yaml").write_bytes(b"a: \xff\xfe")
    for name in ("missing.yaml", ".", "bytes.yaml"):
        with pytest.raises(FileFault, match=str(tmp_path)):
            read_yaml(tmp_path / name)


def test_an_empty_file_is_an_empty_mapping(tmp_path):
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert read_yaml(tmp_path / "empty.yaml") == {}


def bomb(levels, form="[{}]"):
    """Each level names the one before it ten times."""
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} {form.format(', '.join([f'*a{i - 1}'] * 10))}" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


def test_aliases_that_multiply_are_refused_before_they_are_written_out(tmp_path):
    path = tmp_path / "bomb.yaml"
    for text in (bomb(9), "a: &a [*a]\n"):
        path.write_text(text)
        with pytest.raises(FileFault, match=r"bomb.yaml, line \d+: more than 500000 values, aliases written out"):
            read_yaml(path)
    path.write_text("a: &a {x: 1}\n" + "".join(f"k{i}: *a\n" for i in range(50)) + "merged: {<<: *a, y: 2}\n")
    assert read_yaml(path)["k49"] == {"x": 1} and read_yaml(path)["merged"] == {"x": 1, "y": 2}


@pytest.mark.parametrize(
    "value",
    ["a" * 10**6, [[1] * 1000] * 1000, {str(i): i for i in range(10**5)}, 1 << 10**6],
    ids=["text", "list", "mapping", "number"],
)
def test_a_wrong_value_is_shown_in_a_few_words(value):
    for key in ("name", "rate", "form", "limit"):
        if key == "name" and isinstance(value, str):
            continue
        with pytest.raises(UsageError, match=key) as fault:
            from_dict(Config, {"steps": 1, key: value}, "f.yaml")
        assert len(fault.value.what) < 1000
    with pytest.raises(UsageError, match="unknown key") as fault:
        from_dict(Config, {"k" * 10**6: 1}, "f.yaml")
    assert len(fault.value.what) < 1000
