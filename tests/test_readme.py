"""The README says what is so: outputs are those of its own examples, and the table is that of the test matrix.

`python tests/test_readme.py` writes both anew.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
if __name__ == "__main__":
    sys.path[:0] = [str(README.parent / name) for name in (".", "tests", "tests/matrix")]
sys.path.append(str(README.parent / "tests" / "frameworks"))

import test_resume  # noqa: E402
import test_round_trip  # noqa: E402
import torch  # noqa: E402
from flows import CELLS, FLOWS, prepare_for  # noqa: E402
from zoo import ARCHS  # noqa: E402

import qat_compat as qc  # noqa: E402
from benchmarks.__main__ import table as benchmark_table  # noqa: E402
from qat_compat.cli import main  # noqa: E402
from qat_compat.testing import assert_same_state  # noqa: E402

BLOCK = re.compile(r"^```(?P<kind>python|text|console)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
SECONDS = re.compile(r"\d+\.\d\d s\b")

# --- outputs ----------------------------------------------------------------------------------------------------------


def with_outputs(text: str) -> str:
    """The text with each output as its example gives it now; a difference in seconds only is none."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    said = ""

    def renewed(match: re.Match[str]) -> str:
        nonlocal said
        body = match["body"]
        if match["kind"] == "python":
            said = output_of(lambda: exec(compile(body, README, "exec"), namespace))
            return match[0]
        found = said if match["kind"] == "text" else "".join(session(body))
        same = SECONDS.sub("", found) == SECONDS.sub("", body)
        return match[0] if same else f"```{match['kind']}\n{found}```"

    return BLOCK.sub(renewed, text)


def session(body: str) -> Iterator[str]:
    """A console session: the commands of `body`, each with what it says now."""
    for line in body.splitlines():
        if line.startswith("$ qat-compat "):
            said = output_of(lambda command=line: main(shlex.split(command)[2:]))
            yield f"{line}\n" + "".join(f"{row.rstrip()}\n" for row in said.splitlines())


def output_of(call: Callable[[], object]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        call()
    return stream.getvalue()


# --- the table --------------------------------------------------------------------------------------------------------

# kind of flow -> how it is made, and the cell that is looked at more closely
KINDS = {
    "eager": ("torch.ao eager", "`fuse_modules_qat`, `prepare_qat`", ("eager-x86", "plain")),
    "fx": ("torch.ao FX", "`prepare_qat_fx`", ("fx-x86", "plain")),
    "pt2e": ("torchao PT2E", "`export`, `prepare_qat_pt2e`", ("pt2e-x86", "plain")),
    "torchao": ("torchao QATConfig", "`quantize_(model, QATConfig(...))`", ("torchao-int8-int4", "transformer")),
}


def compatibility() -> str:
    """One line per kind of flow; the numbers are those of the cells that the tests go through."""
    rows = [
        ("Flow", "Prepared by", "Float file in", "Back to float", "Resume", "Float names from a file alone"),
        ("---",) * 6,
    ]
    for kind, (name, made, cell) in KINDS.items():
        tested = (CELLS, test_round_trip._CELLS, test_resume._CELLS)
        counts = [len([flow for flow, _ in cells if FLOWS[flow].kind == kind]) for cells in tested]
        rows.append((name, made, *map(str, counts), names_from_a_file(*cell)))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    about = (
        f"The numbers count the combinations of flow and architecture, out of {len(FLOWS)} flows and {len(ARCHS)}\n"
        "architectures, for which a test asserts equality bit for bit. Versions: torch 2.13 and torchao 0.18."
    )
    return f"{table}\n\n{about}"


def names_from_a_file(flow: str, arch: str) -> str:
    """Whether `to_float` of what torch itself saves knows the names of a conv-BN network (or of a transformer)."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(prepare_for(flow, arch)(ARCHS[arch].make()).state_dict(), f"{folder}/qat.pt")
        try:
            back = qc.to_float(f"{folder}/qat.pt")
        except qc.PlanError as error:
            assert "like=" in str(error)
            return "with `like=`"
    assert set(back) == set(ARCHS[arch].state())
    return "by naming convention, with a note" if any("convention" in note for note in back.notes) else "yes"


# --- limits -----------------------------------------------------------------------------------------------------------


def static_quantizers_take_the_first_batch() -> str:
    arch, loaded = ARCHS["transformer"], []
    for batches in (arch.batches(2), arch.batches(1)):
        loaded.append(prepare_for("torchao-static", "transformer")(arch.make()))
        qc.load_checkpoint(loaded[-1], arch.state(), calibration=batches)
    assert_same_state(*loaded)
    return "Static quantizers of torchao take their range from the first calibration batch, as in torchao itself."


def static_quantizers_are_not_saved() -> str:
    arch = ARCHS["transformer"]
    model = prepare_for("torchao-static", "transformer")(arch.make())
    qc.load_checkpoint(model, arch.state(), calibration=arch.batches())
    with pytest.raises(qc.CalibrationError):
        qc.load_checkpoint(prepare_for("torchao-static", "transformer")(arch.make()), model.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        saved = qc.save_checkpoint(model, Path(folder) / "static.pt")
        qc.load_checkpoint(prepare_for("torchao-static", "transformer")(arch.make()), saved)
    return (
        "Their scales are in no state_dict. `qc.save_checkpoint` writes them beside it; to resume from a file that\n"
        "  torch saved, pass calibration data again."
    )


def names_are_evidence_or_convention() -> str:
    bare = dict(prepare_for("eager-x86", "plain")(ARCHS["plain"].make()).state_dict())
    with pytest.raises(qc.PlanError, match="like="):
        qc.to_float(bare)
    return (
        "Fusion takes the names of normalizations out of a state_dict. From a file alone they are known by the naming\n"
        "  convention at best, which a note says; `like=` (a float model, file or list of keys) makes it sure."
    )


def meta_models_lose_ties() -> str:
    with torch.device("meta"):
        model = ARCHS["tied"].build()
    assert model.embed.weight is model.lm_head.weight
    model = prepare_for("torchao-int8-int4", "tied")(model)
    assert model.embed.weight is not model.lm_head.weight
    return "Tied weights of a meta-device model are untied by torchao's `quantize_`, so they load as two tensors."


def converted_checkpoints_stay_converted() -> str:
    model = prepare_for("eager-x86", "plain")(ARCHS["plain"].make())
    qc.load_checkpoint(model, ARCHS["plain"].state(), calibration=ARCHS["plain"].batches())
    integers = torch.ao.quantization.convert(model.eval()).state_dict()
    with pytest.raises(qc.PlanError, match="converted"):
        qc.load_checkpoint(prepare_for("eager-x86", "plain")(ARCHS["plain"].make()), integers, calibration="defer")
    assert qc.to_float(integers, like=ARCHS["plain"].make()).stage == "float"
    return (
        "Converted (integer) checkpoints are loaded only through `to_float`, which dequantizes them: rounded weights\n"
        "  are never taken for float ones unasked."
    )


def smoothed_weights_fit_no_float_model() -> str:
    state = {"fc.weight": torch.ones(4, 4), "fc.weight_quantizer._amax": torch.ones(4, 1)}
    smoothed = state | {"fc.input_quantizer._pre_quant_scale": torch.full((4,), 2.0)}
    assert list(qc.to_float(state)) == ["fc.weight"]
    with pytest.raises(qc.PlanError, match="_pre_quant_scale"):
        qc.to_float(smoothed)
    return (
        "Weights that were smoothed (AWQ, SmoothQuant) are a product with a factor of the layer's input; they are\n"
        "  refused, in and out, rather than taken for the float model's own."
    )


LIMITS = (
    static_quantizers_take_the_first_batch,
    static_quantizers_are_not_saved,
    names_are_evidence_or_convention,
    meta_models_lose_ties,
    converted_checkpoints_stay_converted,
    smoothed_weights_fit_no_float_model,
)


def limits() -> str:
    return "\n".join(f"- {limit()}" for limit in LIMITS)


def benchmarks() -> str:
    """The table of the results that are in the repository."""
    return benchmark_table(json.loads((README.parent / "benchmarks" / "results" / "cpu.json").read_text())).strip()


# --- both -------------------------------------------------------------------------------------------------------------


# --- the table of frameworks ------------------------------------------------------------------------------------------

COLUMNS = """\
**Read**: its files are told by their keys and read without the package. **To float**: the original weights bit for
bit, of integers what the framework itself dequantizes. **Float in**: a float file gives its model's twin. **Resume**:
its own QAT file gives the same state, nothing computed anew. **Ranges in, out**: QAT state of torch.ao in its model,
its own in a model of torch.ao, by files that `qc.save_checkpoint` writes; where the answer is no, the weights go over
and the ranges are made anew from them. **Write**: its own `load_state_dict` takes, strictly, what `qc.save_checkpoint`
writes of its model; of compressed-tensors, its own library decompresses what `qc.convert_checkpoint` writes of a model
trained in torchao to the weights that training saw. A yes is given by doing it (`tests/frameworks/table.py`), with the
real package; three are not installed there, and their files are laid out as they write them: pytorch-quantization,
AIMET, and SparseML, whose models are torch.ao's own modules."""


def frameworks() -> str:
    """What each framework's models and files were put through just now."""
    from table import table

    return f"{table()}\n\n{COLUMNS}"


SECTIONS: dict[str, Callable[[], str]] = {
    "compatibility": compatibility,
    "frameworks": frameworks,
    "limits": limits,
    "benchmarks": benchmarks,
}


def section(text: str, name: str) -> tuple[str, str, str]:
    begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->"
    head, _, rest = text.partition(begin)
    inside, _, tail = rest.partition(end)
    assert tail, f"README.md has no section {name}"
    return head + begin, inside, end + tail


@pytest.mark.parametrize(("name", "made"), SECTIONS.items())
def test_sections_are_up_to_date(name: str, made: Callable[[], str]) -> None:
    _, inside, _ = section(README.read_text(encoding="utf-8"), name)
    assert inside == f"\n{made()}\n\n"


def test_outputs_are_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    text = README.read_text(encoding="utf-8")
    assert with_outputs(text) == text


if __name__ == "__main__":
    os.environ["COLUMNS"] = "100"
    warnings.simplefilter("ignore")
    readme = README.read_text(encoding="utf-8")
    for title, make in SECTIONS.items():
        head, _, tail = section(readme, title)
        readme = f"{head}\n{make()}\n\n{tail}"
    with tempfile.TemporaryDirectory() as empty, contextlib.chdir(empty):
        readme = with_outputs(readme)
    README.write_text(readme, encoding="utf-8")
