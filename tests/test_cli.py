"""The console commands: what they print, what they write, and their exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.ao import quantization as tq

import qat_compat as qc
from qat_compat.cli import main


def make_float() -> nn.Module:
    torch.manual_seed(0)
    layers = [tq.QuantStub(), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)]
    return nn.Sequential(*layers).train()


def make_qat() -> nn.Module:
    model = tq.fuse_modules_qat(make_float(), [["1", "2", "3"]])
    model.qconfig = tq.get_default_qat_qconfig("x86")
    return tq.prepare_qat(model)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A float file, a QAT file of the same model, and a module with factories, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    torch.save({"epoch": 3, "state_dict": make_float().state_dict()}, "float.pt")
    torch.save(make_qat().state_dict(), "qat.pt")
    lines = [
        f"import sys; sys.path.append({str(Path(__file__).parent)!r})",
        "from test_cli import make_float, make_qat",
        "def nothing(): pass",
        "def broken(): raise ZeroDivisionError",
    ]
    Path("factories_of_test_cli.py").write_text("\n".join(lines))
    return tmp_path


def edited(name: str, change: dict[str, torch.Tensor | None]) -> str:
    state = make_float().state_dict()
    for key, value in change.items():
        del state[key]
        if value is not None:
            state[key] = value
    torch.save(state, name)
    return name


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "float.pt"]) == 0
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert said[0] == ["float.pt"]
    assert ["framework", "plain,", "float"] in said
    assert ["tensors", "9,", "91", "numbers"] in said
    assert ["dtypes", "float32", "(8),", "int64", "(1)"] in said
    assert ["size", "368", "bytes"] in said
    assert ["beside", "epoch"] in said
    assert ["1.weight", "float32[4,", "1,", "3,", "3]"] in said
    assert ["2.{weight,bias,running_mean,running_var}", "float32[4]"] in said


def test_inspect_tells_a_qat_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "qat.pt"]) == 0
    assert "torch_ao, prepared" in capsys.readouterr().out


def test_inspect_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "float.pt", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    keys = facts.pop("keys")
    assert facts == {
        "file": "float.pt",
        "framework": "plain",
        "stage": "float",
        "tensors": 9,
        "bytes": 368,
        "dtypes": {"float32": 8, "int64": 1},
        "metadata": ["epoch"],
        "notes": [],
    }
    assert {key: tuple(spec["shape"]) for key, spec in keys.items()} == {
        key: tuple(value.shape) for key, value in make_float().state_dict().items()
    }


def test_inspect_counts_a_tied_tensor_once(capsys: pytest.CaptureFixture[str]) -> None:
    weight = torch.zeros(8, 4)
    torch.save({"embed.weight": weight, "head.weight": weight, "head.bias": torch.zeros(8)}, "tied.pt")
    assert main(["inspect", "tied.pt"]) == 0
    said = capsys.readouterr().out
    assert "1 tied to another" in said
    assert "160 bytes" in said


@pytest.mark.parametrize("select", ["net", "ema_net"])
def test_inspect_selects(capsys: pytest.CaptureFixture[str], select: str) -> None:
    torch.save({"net": {"w": torch.zeros(2)}, "ema_net": {"w": torch.zeros(2, dtype=torch.float16)}}, "two.pt")
    assert main(["inspect", "two.pt", "--json", "--select", select]) == 0
    dtype = {"net": "float32", "ema_net": "float16"}[select]
    assert json.loads(capsys.readouterr().out)["keys"] == {"w": {"shape": [2], "dtype": dtype}}


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_inspect_fits_the_screen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["inspect", "qat.pt"]) == 0
    assert main(["plan", "float.pt", "factories_of_test_cli:make_qat", "--calibration", "none"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert max(map(len, lines)) <= columns


# --- to-float ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_to_float(capsys: pytest.CaptureFixture[str], suffix: str) -> None:
    assert main(["to-float", "qat.pt", f"back{suffix}"]) == 0
    assert f"back{suffix}: 9 float tensors, 368 bytes" in capsys.readouterr().out
    expected = make_float().state_dict()
    back = qc.open_checkpoint(f"back{suffix}")
    assert set(back) == set(expected)
    for key, value in expected.items():
        assert torch.equal(back[key], value), key


def test_to_float_takes_names_from_another_file(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(dict(make_qat().state_dict()), "bare.pt")  # without the record that torch keeps beside the keys
    assert main(["to-float", "bare.pt", "back.pt"]) == 2
    assert "like=" in capsys.readouterr().err
    assert not Path("back.pt").exists()
    assert main(["to-float", "bare.pt", "back.pt", "--like", "float.pt"]) == 0
    assert list(torch.load("back.pt")) == list(make_float().state_dict())


def test_convert(capsys: pytest.CaptureFixture[str]) -> None:
    weight = torch.arange(-32, 32, dtype=torch.int8).reshape(2, 32)
    torch.save({"fc.weight": weight, "fc.weight_scale": torch.tensor([[0.5], [0.25]])}, "int8.pt")
    assert main(["convert", "int8.pt", "float.safetensors", "--to", "float"]) == 0
    assert "float.safetensors: 1 tensor, plain, float, 256 bytes" in capsys.readouterr().out
    expected = weight.float() * torch.tensor([[0.5], [0.25]])
    assert torch.equal(qc.open_checkpoint("float.safetensors")["fc.weight"], expected)
    assert main(["convert", "int8.pt", "x", "--to", "gguf"]) == 2
    assert "cannot be written as 'gguf'" in capsys.readouterr().err
    assert not Path("x").exists()


def test_the_layout_may_be_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    factory = "factories_of_test_cli:make_float"
    assert main(["to-float", "qat.pt", "back.pt", "--like", factory]) == 0
    assert list(torch.load("back.pt")) == list(make_float().state_dict())
    assert main(["to-float", "qat.pt", "back.pt", "--like", "factories_of_test_cli:missing"]) == 2
    assert "no such factory" in capsys.readouterr().err
    pytest.importorskip("modelopt")
    model = make_qat()
    qc.load_checkpoint(model, "float.pt", calibration=[torch.ones(2, 1, 4, 4)])
    qc.save_checkpoint(model, "trained.pt")
    assert main(["convert", "trained.pt", "out", "--to", "modelopt"]) == 2
    assert "like=" in capsys.readouterr().err
    main(["convert", "trained.pt", "out", "--to", "modelopt", "--like", factory])
    assert "ModelOpt cannot hold" in capsys.readouterr().err  # uneven grids: it is the model that was looked at


@pytest.mark.parametrize("backup", [False, True])
def test_to_float_keeps_what_it_replaces(backup: bool) -> None:
    Path("out").mkdir()
    Path("out/back.pt").write_bytes(b"old")
    assert main(["to-float", "qat.pt", "out/back.pt", *["--backup"] * backup]) == 0
    others = [path.read_bytes() for path in Path("out").iterdir() if path.name != "back.pt"]
    assert others == [b"old"] * backup


# --- diff -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[], ["--values"]])
@pytest.mark.parametrize("other", ["float.pt", "qat.pt"])
def test_equal_files(capsys: pytest.CaptureFixture[str], other: str, values: list[str]) -> None:
    assert main(["diff", "float.pt", other, *values]) == 0
    assert "9 float tensors" in capsys.readouterr().out


def test_a_bare_qat_file_takes_its_float_names_from_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(dict(make_qat().state_dict()), "bare.pt")
    assert main(["diff", "bare.pt", "float.pt", "--values"]) == 0
    assert main(["diff", "float.pt", "bare.pt", "--values"]) == 0
    capsys.readouterr()
    assert main(["diff", "bare.pt", "bare.pt"]) == 2


def test_keys_and_specs_that_differ(capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"1.bias": None, "5.weight": torch.zeros(3, 16), "5.bias": torch.zeros(2, dtype=torch.float16)}
    other = edited("other.pt", changes)
    assert main(["diff", "float.pt", other]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "only in A  1.bias",
        "spec       float32[2, 16] -> float32[3, 16]",
        "           5.weight",
        "spec       float32[2] -> float16[2]",
        "           5.bias",
        "A and B differ: 1 only in A, 2 spec; of 8 keys in common, 6 are alike",
    ]
    assert main(["diff", other, "float.pt"]) == 1
    assert "only in B  1.bias" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.tensor([0.0, 0.0]), None),
        (torch.tensor([0.0, 0.25]), "1 of 2 differ, at most by 0.25"),
        (torch.tensor([float("nan"), 0.0]), "1 of 2 differ, at most by nan"),
    ],
)
def test_values_that_differ(capsys: pytest.CaptureFixture[str], value: torch.Tensor, said: str | None) -> None:
    a, b = edited("a.pt", {"5.bias": torch.zeros(2)}), edited("b.pt", {"5.bias": value})
    assert main(["diff", a, b]) == 0
    assert main(["diff", b, a, "--values"]) == (said is not None)
    assert main(["diff", a, b, "--values"]) == (said is not None)
    assert said is None or said in capsys.readouterr().out


def test_wrapper_prefixes_are_no_difference(capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({f"module.{key}": value for key, value in make_float().state_dict().items()}, "wrapped.pt")
    assert main(["diff", "wrapped.pt", "float.pt", "--values"]) == 0
    assert "without wrapper prefixes" in capsys.readouterr().out
    torch.save({"module.w": torch.zeros(2), "w": torch.zeros(2)}, "both.pt")
    torch.save({"w": torch.zeros(2)}, "one.pt")
    assert main(["diff", "both.pt", "one.pt"]) == 1
    assert "only in A  module.w" in capsys.readouterr().out
    torch.save({"module.w": torch.zeros(2), "model.w": torch.zeros(2)}, "both.pt")
    assert main(["diff", "both.pt", "one.pt"]) == 1
    assert "only in B  w" in capsys.readouterr().out


def test_two_nan_are_alike() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert main(["diff", edited("a.pt", {"5.bias": nan}), edited("b.pt", {"5.bias": nan.clone()}), "--values"]) == 0


# --- plan -------------------------------------------------------------------------------------------------------------


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "float.pt", "factories_of_test_cli:make_qat"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("plan: float.pt -> Sequential (torch_ao)\n")
    assert "from calibration" in said
    assert "problem" not in said


@pytest.mark.parametrize(("how", "status"), [("batches", 0), ("defer", 0), ("none", 1)])
def test_plan_says_where_ranges_come_from(capsys: pytest.CaptureFixture[str], how: str, status: int) -> None:
    assert main(["plan", "float.pt", "factories_of_test_cli:make_qat", "--calibration", how]) == status
    said = capsys.readouterr().out
    assert {"batches": "from calibration", "defer": "deferred", "none": "uncalibrated"}[how] in said


def test_plan_of_a_resume_asks_for_no_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "qat.pt", "factories_of_test_cli:make_qat"]) == 0
    assert "calibration" not in capsys.readouterr().out


def test_plan_with_problems(capsys: pytest.CaptureFixture[str]) -> None:
    other = edited("other.pt", {"5.weight": torch.zeros(3, 16), "1.bias": None})
    arguments = ["plan", other, "factories_of_test_cli:make_qat", "--html", "plan.html"]
    assert main(arguments) == 1
    said = capsys.readouterr().out
    assert "mismatched   5.weight: expected float32[2, 16], found float32[3, 16]" in said
    assert "missing      1.bias" in said
    assert said.endswith("this cannot be loaded: 2 problems\n")
    page = Path("plan.html").read_text(encoding="utf-8")
    assert "expected float32[2, 16], found float32[3, 16]" in page
    assert main([*arguments, "--keep", "5.*", "--keep", "1.bias"]) == 0


def test_plan_drops_and_renames(capsys: pytest.CaptureFixture[str]) -> None:
    state = {key.replace("5.", "head."): value for key, value in make_float().state_dict().items()}
    torch.save({**state, "aux.weight": torch.zeros(3)}, "other.pt")
    arguments = ["plan", "other.pt", "factories_of_test_cli:make_qat"]
    assert main(arguments) == 1
    assert main([*arguments, "--rename", r"^head\.=5."]) == 1
    assert "aux.weight" in capsys.readouterr().out
    assert main([*arguments, "--drop", "aux.*", "--rename", r"^head\.=5."]) == 0
    assert "rename=" in capsys.readouterr().out


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["inspect", "nothing.pt"], "no such file"),
        (["inspect", "factories_of_test_cli.py"], "not a checkpoint"),
        (["inspect", "float.pt", "--select", "nowhere"], "nowhere"),
        (["to-float", "qat.pt", "no/such/folder/x.pt"], "no/such/folder"),
        (["plan", "float.pt", "factories_of_test_cli"], "module:factory"),
        (["plan", "float.pt", "no_such_module:make"], "there is no such module"),
        (["plan", "float.pt", "factories_of_test_cli:make"], "no such factory"),
        (["plan", "float.pt", "factories_of_test_cli:sys"], "this is no factory"),
        (["plan", "float.pt", "factories_of_test_cli:nothing"], "NoneType"),
        (["plan", "float.pt", "factories_of_test_cli:make_qat", "--drop", "x"], "drop= names nothing"),
        (["plan", "float.pt", "factories_of_test_cli:make_qat", "--html", "no/such/x.html"], "cannot be written"),
    ],
)
def test_errors_are_said_without_a_traceback(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("qat-compat: ")
    assert said in captured.err
    assert "Traceback" not in captured.err


def test_an_error_of_the_users_own_code_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """And its status is that of an error, not that of a plan with problems."""
    assert main(["plan", "float.pt", "factories_of_test_cli:broken"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback") and "ZeroDivisionError" in error and "factories_of_test_cli.py" in error


@pytest.mark.parametrize("rename", ["no-equals-sign", "(=x"])
def test_a_malformed_option_is_a_usage_error(capsys: pytest.CaptureFixture[str], rename: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", "float.pt", "factories_of_test_cli:make_qat", "--rename", rename])
    assert stop.value.code == 2
    assert "--rename" in capsys.readouterr().err


def test_a_reader_may_stop_reading() -> None:
    """`qat-compat inspect ... | head`: no traceback, whatever is left to say."""
    torch.save({f"{'x' * i}.weight": torch.zeros(i) for i in range(1, 3000)}, "many.pt")
    for option, first in (("--json", "{"), ("", "many.pt")):
        command = f"{sys.executable!r} -m qat_compat.cli inspect many.pt {option} | head -n 1"
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
        assert done.stdout.startswith(first)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_name_that_the_terminal_cannot_write_is_no_crash() -> None:
    torch.save({"größe\x1b[31m.weight": torch.zeros(2)}, "odd.pt")
    done = subprocess.run(
        [sys.executable, "-m", "qat_compat.cli", "inspect", "odd.pt"],
        capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"gr\\xf6\\xdfe\\x1b[31m.weight" in done.stdout


# --- the pages that reports and plans become --------------------------------------------------------------------------


def test_the_page_of_a_report_stands_alone(tmp_path: Path) -> None:
    model = make_qat()
    state = make_float().state_dict() | {"<script>.weight": torch.zeros(1)}
    report = qc.load_checkpoint(model, state, calibration=[torch.randn(2, 1, 4, 4)], drop="<script>*")
    page = report.to_html(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;.weight" in page.replace("<wbr>", "")
    assert "<script" not in page
    assert "http" not in page
    assert all(f"<b>{getattr(report, name)}</b>" in page for name in ("copied", "synthesized", "kept", "dropped"))
    assert "1 calibration batch &middot;" in page


def test_a_report_counts_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    for count, words in ((1, "; 1 calibration batch; "), (2, "; 2 calibration batches; ")):
        model = make_qat()
        batches = [torch.randn(2, 1, 4, 4) for _ in range(count)]
        report = qc.load_checkpoint(model, make_float().state_dict(), calibration=batches)
        assert words in str(report)
        assert max(map(len, str(report).splitlines())) <= 100
