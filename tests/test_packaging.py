"""The wheel works without the checkout, and versions are written down in one place each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from datetime import date
from pathlib import Path
from zipfile import ZipFile

import numpy
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.helpers.jobs import write_experiment

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "cluster" / "constraints.txt").read_text()
PINS = [line for line in CONSTRAINTS.splitlines() if not line.startswith("#")]
REQUIREMENTS = {
    text for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()) for text in group
}
SITE_PACKAGES = Path(numpy.__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built offline from a copy of the sources, so that the build leaves nothing in the checkout."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("pipeline", "data_prep", "ds_configs", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    offline = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", "wheel", *offline, "--wheel-dir", dist, source], check=True)
    (file,) = dist.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An otherwise empty folder into which pip has installed the wheel."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(command, check=True)
    return target


def run_installed(installed: Path, folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the installed `pal ARGUMENTS` in `folder`. `-S` skips the .pth files, through which the editable
    installation of the checkout would be importable; dependencies come from site-packages as a plain folder."""
    return subprocess.run(
        [sys.executable, "-S", installed / "bin" / "pal", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{SITE_PACKAGES}", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )


def test_the_wheel_holds_code_configs_and_policies_alone(wheel: Path) -> None:
    names = ZipFile(wheel).namelist()
    folders = {name.partition("/")[0] for name in names}
    assert folders == {"pipeline", "data_prep", "ds_configs", f"pal_pipeline-{PROJECT['version']}.dist-info"}
    files = [name for name in names if ".dist-info/" not in name]
    assert {Path(name).suffix for name in files} == {".py", ".yaml", ".json"}
    assert not [name for name in files if name.startswith(("tests/", "pipeline/results/"))]


@pytest.mark.parametrize("folder", ["pipeline", "data_prep", "ds_configs"])
def test_the_wheel_holds_every_module_config_and_policy_of_the_checkout(wheel: Path, folder: str) -> None:
    packed = {name for name in ZipFile(wheel).namelist() if name.startswith(f"{folder}/")}
    suffixes = (".py", ".yaml", ".json")
    sources = {file.relative_to(ROOT).as_posix() for file in (ROOT / folder).rglob("*") if file.suffix in suffixes}
    assert packed == sources


def test_an_installed_wheel_states_its_version(installed: Path, tmp_path: Path) -> None:
    result = run_installed(installed, tmp_path, "--version")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == PROJECT["version"]


def test_an_installed_wheel_can_train(installed: Path, tmp_path: Path) -> None:
    write_experiment(tmp_path)
    overrides = ["output=run", "model.language_model=language_model", "data.train=features", "data.validation=held_out"]
    overrides += ["train.global_batch_size=8", "train.micro_batch_size=2", "data.questions_per_sequence=2"]
    result = run_installed(installed, tmp_path, "train", "demo", *overrides, "--dry-run")
    assert result.returncode == 0, result.stderr
    resolved, _, summary = result.stdout.partition("\n---\n")
    assert yaml.safe_load(resolved)["train"]["zero"] == "zero2"
    assert "lal stream of log_mel: layers [0, 1]" in summary and "380 steps" in summary


def test_an_installed_wheel_can_plan(installed: Path, tmp_path: Path) -> None:
    figures = tmp_path / "plan.json"
    arguments = ("plan", "llama_3_2_1b", "--workload", "openaqa_workload", "--json", figures)
    result = run_installed(installed, tmp_path, *arguments)
    assert result.returncode == 0, result.stderr
    assert "GiB" in result.stdout and figures.is_file()


def test_every_line_of_the_constraints_is_an_exact_version() -> None:
    loose = [line for line in PINS if [s.operator for s in Requirement(line).specifier] != ["=="]]
    assert len(PINS) > 100 and not loose


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize("requirement", sorted(REQUIREMENTS))
def test_a_dependency_has_one_pin_which_its_range_allows(requirement: str, python: str) -> None:
    wanted = Requirement(requirement)
    pins = pins_by_name(python).get(canonicalize_name(wanted.name), [])
    assert len(pins) == 1, f"run `make lock`: {requirement} has {len(pins)} pins: {[*map(str, pins)]}"
    (specifier,) = pins[0].specifier
    assert wanted.specifier.contains(specifier.version), f"run `make lock`: {specifier} is outside {requirement}"


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_no_package_has_two_pins(python: str) -> None:
    pins = pins_by_name(python)
    assert {"torch", "torchaudio", "numpy"} <= pins.keys()
    assert not {name: [*map(str, several)] for name, several in pins.items() if len(several) > 1}


def pins_by_name(python: str) -> dict[str, list[Requirement]]:
    """The constraints that apply to a version of Python on this platform, by canonical package name."""
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    pins: dict[str, list[Requirement]] = {}
    for line in PINS:
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate(environment):
            pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    return pins


def test_make_installs_the_environment_from_the_constraints() -> None:
    installs = [line for line in (ROOT / "Makefile").read_text().splitlines() if "$(BIN)/pip install" in line]
    environment = [line for line in installs if "--editable" in line]
    assert len(environment) == 2 and all("--constraint $(PINS)" in line for line in environment)


def test_versions_agree_wherever_one_is_written() -> None:
    version = PROJECT["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    changes = re.findall(r"^## \[([\d.]+)\] - (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation["version"] == version == changes[0][0]
    assert changes[0][1] == "unreleased" or date.fromisoformat(changes[0][1])
    files = [
        ROOT / "cluster" / "Dockerfile",
        ROOT / "cluster" / "README.md",
        *(ROOT / "cluster" / "ray").glob("*.yaml"),
    ]
    tags = {tag for file in files for tag in re.findall(r"pal-pipeline:([\w.]+)", file.read_text())}
    assert tags == {version}


def test_the_citation_names_the_paper_and_the_licence() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["license"] == PROJECT["license"]
    (reference,) = citation["references"]
    assert reference["url"] == PROJECT["urls"]["Paper"] and reference["url"].endswith("2506.10423")
