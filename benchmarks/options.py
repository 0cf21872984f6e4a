"""What benchmarks ask alike, how they tell of faults, and the file that their figures are kept in. Loads no torch."""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.errors import HqdmError


@contextmanager
def told() -> Iterator[None]:
    """What a user can mend, as two lines instead of a traceback."""
    try:
        yield
    except HqdmError as error:
        raise SystemExit(f"error: {error.what}" + (f"\nhint: {error.hint}" if error.hint else "")) from error


def listed(kind: type[int] | type[float]) -> Callable[[str], list[int] | list[float]]:
    """`10,20` as a list of numbers, for argparse."""

    def read(text: str) -> list[int] | list[float]:
        try:
            return [kind(word) for word in text.split(",")]
        except ValueError:
            what = "whole numbers" if kind is int else "numbers"
            raise argparse.ArgumentTypeError(f"{text!r}: give {what}, with commas") from None

    return read


def add_step_options(parser: argparse.ArgumentParser, turns: int, kept: str) -> None:
    """--method, --turns, --folder and --results; `kept` says what of which size stays in the folder."""
    parser.add_argument("--method", default="hqdm")
    parser.add_argument("--turns", type=int, default=turns)
    parser.add_argument("--folder", type=Path, default=Path("runs/speed"), help=f"of checkpoints and {kept}")
    parser.add_argument("--results", type=Path, default=Path("runs/speed/results"))


def kept_results(options: argparse.Namespace, name: str) -> tuple[Path, dict[str, Any]]:
    """RESULTS/name.json and what an earlier run wrote there; makes both folders."""
    for folder in (options.folder, options.results):
        folder.mkdir(parents=True, exist_ok=True)
    file = options.results / f"{name}.json"
    return file, json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def keep(file: Path, results: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
