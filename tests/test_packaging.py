"""What a newcomer's machine depends on: versions, pins, the console script, the wheel, and the two commands."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import qat_compat

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
DECLARED = [
    Requirement(text)
    for texts in (
        PROJECT["dependencies"],
        PYPROJECT["build-system"]["requires"],
        *PROJECT["optional-dependencies"].values(),
    )
    for text in texts
]


def pins() -> dict[str, Version]:
    """The constraints file as {canonical name: version}; a line that is not an exact pin fails."""
    found = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line)
            assert match, f"not an exact pin: {line!r}"
            name = canonicalize_name(match[1])
            assert name not in found, f"pinned twice: {name}"
            found[name] = Version(match[2])
    return found


def needed() -> set[str]:
    """All that is installed for the declared requirements, dependencies of dependencies included."""
    found: set[str] = set()
    queue = list(DECLARED)
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        extras = requirement.extras or {""}
        if name not in found:
            found.add(name)
            for text in importlib.metadata.requires(requirement.name) or []:
                deeper = Requirement(text)
                if deeper.marker is None or any(deeper.marker.evaluate({"extra": extra}) for extra in extras):
                    queue.append(deeper)
    return found


def test_one_version_everywhere() -> None:
    assert PYPROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "qat_compat.__version__"}
    version = qat_compat.__version__
    newest = re.search(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == version
    assert importlib.metadata.version("qat-compat") == version


def test_one_oldest_python_everywhere() -> None:
    oldest = re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])
    assert oldest is not None
    assert PYPROJECT["tool"]["mypy"]["python_version"] == f"3.{oldest[1]}"
    assert PYPROJECT["tool"]["ruff"]["target-version"] == f"py3{oldest[1]}"
    assert f"Programming Language :: Python :: 3.{oldest[1]}" in PROJECT["classifiers"]


@pytest.mark.parametrize("requirement", DECLARED, ids=str)
def test_the_pin_is_within_what_is_declared(requirement: Requirement) -> None:
    pinned = pins()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pinned)
    assert pinned.local is None, "a local version is not to be had on every platform"


def test_everything_that_gets_installed_is_pinned() -> None:
    alone = re.findall(r"--no-deps (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert alone, "the real network is installed without what it asks for"
    assert (needed() | set(alone)) - set(pins()) == set()


@pytest.mark.parametrize(("name", "value"), PROJECT["scripts"].items())
def test_each_declared_script_resolves(name: str, value: str) -> None:
    assert callable(importlib.metadata.EntryPoint(name, value, "console_scripts").load())


def test_the_installed_console_script_runs() -> None:
    script = Path(sys.executable).with_name("qat-compat")
    done = subprocess.run([script, "--help"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "qat-compat" in done.stdout


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    ignore = shutil.ignore_patterns("__pycache__")
    for folder in ("qat_compat", "tests", "benchmarks", "examples"):
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"qat_compat-{qat_compat.__version__}.dist-info"
    package = {name for name in names if not name.startswith(f"{info}/")}
    modules = {path.relative_to(source).as_posix() for path in (source / "qat_compat").rglob("*.py")}
    assert package == modules | {"qat_compat/py.typed"}
    assert f"{info}/licenses/LICENSE" in names


def make(folder: Path, *arguments: str) -> list[str]:
    """The command lines that make would run for a fresh checkout."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS", "TORCH"))}
    done = subprocess.run(
        ["make", "--dry-run", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(("target", "last"), [("demo", "examples/digits.py"), ("test", "pytest")])
def test_each_command_does_its_own_setup(tmp_path: Path, target: str, last: str) -> None:
    lines = make(tmp_path, target)
    installs = [line for line in lines if " install " in line]
    assert "-m venv" in next(line for line in lines if "venv" in line and "version_info" not in line)
    assert all("--constraint constraints.txt" in line for line in installs)
    assert last in lines[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the plain wheel is the CPU build")
@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_cpu_build_of_torch_comes_first(tmp_path: Path, target: str) -> None:
    first, *others = (line for line in make(tmp_path, target) if " install " in line)
    assert f"torch=={pins()['torch']}+cpu" in first
    assert all("torch==" not in line for line in others)


@pytest.mark.parametrize("ci", ["true", ""])
@pytest.mark.parametrize("checkpoints", [True, False])
def test_the_ci_script_runs_the_test_command(tmp_path: Path, ci: str, checkpoints: bool) -> None:
    checkout, tools, beside = tmp_path / "checkout", tmp_path / "tools", tmp_path / "shared" / "checkpoints"
    for folder in (checkout / ".ci", checkout / ".venv", tools, *([beside] if checkpoints else [])):
        folder.mkdir(parents=True)
    shutil.copy(ROOT / ".ci" / "run", checkout / ".ci")
    stand_in = tools / "make"
    stand_in.write_text('#!/bin/sh\necho "$PWD|$*|$QAT_COMPAT_REAL_CHECKPOINTS|$(test -d .venv && echo kept)"\n')
    stand_in.chmod(stand_in.stat().st_mode | stat.S_IXUSR)

    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "CI": ci}
    environment.pop("QAT_COMPAT_REAL_CHECKPOINTS", None)
    said = subprocess.run(
        [checkout / ".ci" / "run"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert said.strip().split("|") == [
        str(checkout),
        "test",
        str(beside) if checkpoints else "",
        "" if ci == "true" else "kept",
    ]


def test_every_public_name_is_one_of_the_package() -> None:
    """Names are imported when they are asked for: none is hidden by a module of the same name."""
    code = (
        "import pkgutil, qat_compat as qc, qat_compat.driving, qat_compat.report\n"
        "assert set(qc._HOME) == set(qc.__all__) <= set(dir(qc))\n"
        "assert not set(qc.__all__) & {found.name for found in pkgutil.iter_modules(qc.__path__)}\n"
        "assert all(getattr(qc, name).__module__.startswith('qat_compat.') for name in qc.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_itself_imports_nothing_heavy() -> None:
    code = "import sys, qat_compat; print(*sorted({'torch', 'numpy', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
