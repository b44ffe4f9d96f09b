"""What the documentation shows is run: docstring examples, the python blocks of the Markdown files, and the demo.

Each one runs in an empty folder of its own, so an example may write files by plain names. The blocks of one Markdown
file run in order and share their names, as a reader copies them. A block inside an HTML comment runs too and is not
shown: that is the place for what a reader already has, such as a model and a data loader.
"""

from __future__ import annotations

import doctest
import importlib
import inspect
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import qat_compat

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "qat_compat").rglob("*.py")
    if path.name != "__main__.py"
)
FENCE = re.compile(r"^(?P<indent> *)```python *\n(?P<code>.*?)^(?P=indent)``` *$", re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def python_blocks(path: Path) -> Iterator[tuple[int, str]]:
    """Each fenced python block of a Markdown file, with the number of the line where its code begins."""
    text = path.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        indent = match["indent"]
        code = "\n".join(line.removeprefix(indent) for line in match["code"].splitlines())
        yield text.count("\n", 0, match.start("code")) + 1, code + "\n"


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "qat_compat":
            raise
        pytest.skip(f"{name} needs {error.name}")
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said = io.StringIO()
    for test in doctest.DocTestFinder().find(module, name):
        torch.manual_seed(0)
        runner.run(test, out=said.write)
    assert runner.summarize(verbose=False).failed == 0, said.getvalue()


def test_every_public_verb_shows_an_example() -> None:
    verbs = [name for name in qat_compat.__all__ if inspect.isfunction(getattr(qat_compat, name))]
    assert verbs
    without = [name for name in verbs if ">>>" not in (inspect.getdoc(getattr(qat_compat, name)) or "")]
    assert without == []


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("*.md")))
def test_markdown_examples(name: str) -> None:
    path = ROOT / name
    namespace: dict[str, object] = {"__name__": "__main__"}
    blocks = list(python_blocks(path))
    if name == "README.md":
        assert any("load_checkpoint" in code for _, code in blocks), "the README shows the main call"
    for line, code in blocks:
        # The empty lines before the code make a traceback name the line of the Markdown file.
        exec(compile("\n" * (line - 1) + code, path, "exec"), namespace)


@pytest.mark.parametrize("name", sorted(path.name for path in ROOT.glob("*.md")))
def test_what_is_quoted_of_a_file_stands_there(name: str) -> None:
    """A block that opens with the path of a file quotes it, paragraph by paragraph."""
    quoted = re.compile(r"# (?P<path>\S+\.py)\n(?P<code>.*)", re.DOTALL)
    found = [match for _, code in python_blocks(ROOT / name) if (match := quoted.match(code))]
    assert found or name != "CONTRIBUTING.md"
    for match in found:
        text = (ROOT / match["path"]).read_text(encoding="utf-8")
        for paragraph in match["code"].strip("\n").split("\n\n"):
            assert paragraph.strip("\n") in text, f"{match['path']} has no more:\n{paragraph}"


def test_the_demo_runs_and_shows_what_it_claims() -> None:
    demo = ROOT / "examples" / "digits.py"
    plain = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    plain |= {"COLUMNS": "100", "PYTHONUTF8": "1"}
    command = [sys.executable, demo]
    done = subprocess.run(command, env=plain, capture_output=True, encoding="utf-8", timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    rows = dict(re.findall(r"│ +(.+?) +│.*?│ +([\d.]+)% │", done.stdout))
    shown = {step: float(percent) for step, percent in rows.items()}
    assert len(shown) == 7, done.stdout
    assert shown.pop("QAT model, load_state_dict(strict=False)") < 20
    assert shown.pop("the same, prefix cut by hand") < 80
    assert min(shown.values()) > 97, shown
