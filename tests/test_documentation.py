"""The documentation agrees with the tree: links, paths, names, the import rule, the maps, and the limits on sizes."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from pipeline import cli

ROOT = Path(__file__).parents[1]
FOLDERS = ("pipeline", "data_prep", "ds_configs", "cluster")
PAGES = sorted([*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))])
README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "pipeline" / "README.md").read_text()
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
OLD_PATHS = "CHANGELOG.md"  # names paths of earlier versions
SOURCES = sorted(file for folder in ("pipeline", "data_prep", "ds_configs") for file in (ROOT / folder).rglob("*.py"))
MAX_LINES, MAX_PARAMETERS = 300, 6
SIGNATURES_OF_TRANSFORMERS = {
    "pipeline/model/attention.py: pal_attention",
    "pipeline/model/configuration.py: __init__",
    "pipeline/model/modeling.py: forward",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    files = [link.partition("#")[0] for link in links if not link.startswith("#")]
    assert not [file for file in files if not (page.parent / file).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_of_modules_exist(page: Path) -> None:
    paths = re.findall(r"`((?:pipeline|data_prep|tests)/[\w/]+\.py)`", page.read_text())
    assert page.name == OLD_PATHS or not [path for path in paths if not (ROOT / path).is_file()]


@pytest.mark.parametrize("folder", ["pipeline", "data_prep"])
def test_the_table_of_files_names_files_and_what_they_define(folder: str) -> None:
    table = (ROOT / folder / "README.md").read_text().partition("## Which file to open")[2].partition("\n## ")[0]
    entries = re.findall(r"`([\w/]+/\w+\.py)`(?: \(([^)]*)\))?", table)
    assert len(entries) > 5 and not [path for path, _ in entries if not named_file(folder, path).is_file()]
    names = [(path, name) for path, listed in entries for name in re.findall(r"`(\w+)`", listed)]
    assert names and not [
        (path, name)
        for path, name in names
        if not re.search(rf"^\s*(?:def |class )?{name}\b", named_file(folder, path).read_text(), re.MULTILINE)
    ]


def test_files_of_the_product_are_short() -> None:
    lines = {file.relative_to(ROOT).as_posix(): len(file.read_text().splitlines()) for file in SOURCES}
    assert len(lines) > 100 and not {path: count for path, count in lines.items() if count > MAX_LINES}


def test_functions_of_the_product_have_few_parameters() -> None:
    long = {
        f"{file.relative_to(ROOT).as_posix()}: {function.name}"
        for file in SOURCES
        for function in ast.walk(ast.parse(file.read_text()))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and num_parameters(function) > MAX_PARAMETERS
    }
    assert long == SIGNATURES_OF_TRANSFORMERS


def test_the_architecture_draws_the_layers_of_the_contracts() -> None:
    drawn = [block.strip().splitlines() for block in re.findall(r"```\n(.*?)```", ARCHITECTURE, re.DOTALL)]
    layers = [contract["layers"] for contract in CONTRACTS if contract["type"] == "layers"]
    assert layers and [block for block in drawn if block in layers] == layers


@pytest.mark.parametrize("name", [contract["name"] for contract in CONTRACTS])
def test_the_architecture_states_a_contract(name: str) -> None:
    assert name.lower() in " ".join(ARCHITECTURE.lower().split())


def test_the_map_of_the_architecture_names_every_package_and_only_modules_that_exist() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", ARCHITECTURE, re.MULTILINE)
    packages = {name: cell for name, cell in rows if (ROOT / "pipeline" / name).is_dir()}
    without_code = {"configs", "results"}
    assert packages.keys() | without_code == {p.name for p in (ROOT / "pipeline").iterdir() if holds_sources(p)}
    named = [(package, name) for package, cell in packages.items() for name in re.findall(r"`([\w/]+)`", cell)]
    missing = [f"{package}/{name}" for package, name in named if not exists(ROOT / "pipeline" / package / name)]
    assert len(named) > 50 and not missing


def test_the_map_of_the_readme_names_every_folder() -> None:
    folders = set(re.findall(r"^\| `([\w/]+)/` \|", README, re.MULTILINE))
    assert not [folder for folder in folders if not (ROOT / folder).is_dir()]
    assert {f"pipeline/{p.name}" for p in (ROOT / "pipeline").iterdir() if holds_sources(p)} <= folders


def test_the_readme_fits_on_a_few_screens() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_table_of_commands_names_a_command(command: str) -> None:
    assert f"`pal {command}" in ARCHITECTURE


def named_file(folder: str, path: str) -> Path:
    """Returns a file that the README of `folder` names, relative to that folder or to the repository."""
    return ROOT / path if path.startswith("data_prep/") else ROOT / folder / path


def num_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Returns the number of parameters, without `self`, `cls`, `*args` and `**kwargs`."""
    arguments = function.args
    parameters = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return sum(parameter.arg not in ("self", "cls") for parameter in parameters)


def holds_sources(folder: Path) -> bool:
    return folder.is_dir() and any(file.suffix in (".py", ".yaml", ".md") for file in folder.iterdir())


def exists(path: Path) -> bool:
    return path.is_dir() or path.with_suffix(".py").is_file()
