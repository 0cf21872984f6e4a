"""The documentation names every command, stage, method and top-level file there is, and nothing that is not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.methods import METHODS
from pipelines.stages import STAGES

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "SECURITY.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]
COMMANDS = sorted(path.stem for path in (ROOT / "hqdm_cli/commands").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_docs_with_an_example(command):
    assert re.search(rf"\| `hqdm {command}` \|.*\| `hqdm {command}[^`]*` \|", (ROOT / "docs/commands.md").read_text())


@pytest.mark.parametrize("option", ["profile", "plan", "distill", "export", "sample", "score", "report"])
def test_every_option_that_the_readme_types_exists(option):
    readme = (
        (ROOT / "README.md").read_text() + (ROOT / "docs/commands.md").read_text() + (ROOT / "Makefile").read_text()
    )
    typed = set()
    for line in re.findall(rf"hqdm {option} ([^`\n]*)", readme):
        typed |= set(re.findall(r"(--[a-z-]+)", line))
    text = subprocess.run(
        [sys.executable, "-m", "hqdm_cli", option, "--help"], cwd=ROOT, capture_output=True, text=True,
        env={"COLUMNS": "200", "PATH": "", "PYTHONPATH": str(ROOT)},
    ).stdout  # fmt: skip
    assert typed - set(re.findall(r"--[a-z-]+", text)) == set()


def test_the_readmes_tree_names_what_is_there():
    tree = re.search(r"```text\n(hqdm_cli/.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    named = []
    folder = ""
    for line in tree.splitlines():
        match = re.match(r"( *)(\S+)", line)
        if not match:
            continue
        name = match[2]
        if not match[1]:
            folder = name if name.endswith("/") else ""
            named.append(name)
        else:
            named.append(folder + name)
    assert named and [name for name in named if not (ROOT / name).exists()] == []
    modules = {f"pipelines/{path.name}{'/' if path.is_dir() else ''}" for path in (ROOT / "pipelines").iterdir()}
    modules = {name for name in modules if not name.endswith(("__init__.py", "__pycache__/"))}
    assert modules <= set(named)


def test_every_method_is_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    assert [name for name in METHODS if f"`{name}`" not in readme] == []


def test_every_stage_is_a_folder_of_the_workspace_page():
    page = (ROOT / "docs/workspace.md").read_text()
    assert [stage for stage in STAGES if f"{stage}/0001/" not in page] == []


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading_that_are_there(page):
    lost = []
    for target in re.findall(r"\]\(([^()\s]+)\)", (ROOT / page).read_text()):
        if target.startswith(("https:", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        if not file.exists() or (anchor and anchor not in headings(file)):
            lost.append(target)
    assert lost == []


def test_every_page_can_be_reached_from_the_readme():
    reached, waiting = set(), {"README.md"}
    while waiting:
        page = waiting.pop()
        reached.add(page)
        for target in re.findall(r"\]\(([^()\s#]+\.md)", (ROOT / page).read_text()):
            waiting |= {str((ROOT / page).parent.joinpath(target).resolve().relative_to(ROOT))} & set(PAGES) - reached
    assert set(PAGES) == reached
