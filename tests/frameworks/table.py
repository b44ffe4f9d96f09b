"""What can be done with each framework, by doing it: the README's table of frameworks.

A cell says yes if its column's function goes through, and no if that raises an error of the package, or finds that the
ranges which it looks for are not those of the source. The reason below the table is the error's own.
"""

from __future__ import annotations

import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from native import batches, encoding_of, float_state, make_float, other
from rows import ROWS, Row, by_flow, trained_torchao
from torch import Tensor, nn

import qat_compat as qc
from qat_compat.frameworks import FRAMEWORKS, Needs, describe_model
from qat_compat.frameworks.key_tables import KeyedFramework
from qat_compat.plan import Drop, Synthesize
from qat_compat.schema import Entry, Role
from qat_compat.source import open_any
from qat_compat.testing import assert_same_output, assert_same_state

WIDER = 1.5  # a range that no weights give: where it is found again, it was carried


class No(Exception):
    """What a column asks for is not so; the text says why."""


def reads(row: Row, folder: Path) -> None:
    """A file that the framework wrote is told as what it is, and each of its tensors is read."""
    checkpoint = qc.open_checkpoint(row.file(folder))
    assert (checkpoint.framework, checkpoint.stage) == row.told
    assert all(isinstance(checkpoint[key], Tensor) for key in checkpoint)


def to_float(row: Row, folder: Path) -> None:
    """The original weights bit for bit, or integers as the framework itself dequantizes them."""
    for source in (row.file(folder), *([row.model()] if row.model else [])):
        back = qc.to_float(source, like=make_float())
        make_float().load_state_dict(dict(back), strict=True)
        if row.dequantized is None:
            assert_same_state(dict(back), float_state())
            continue
        weights = row.dequantized()
        assert {"fc1.weight", "fc2.weight"} <= set(weights)
        for key, value in weights.items():
            assert torch.equal(back[key], value), (row.name, key)


def float_in(row: Row, folder: Path) -> None:
    """A float file into a prepared model of other weights: as if that had been prepared from it, bit for bit."""
    model = target(row)
    qc.load_checkpoint(model, float_state(), calibration=batches())
    assert row.model is not None
    assert_same_state(model, row.model())
    assert_same_output(model, row.model(), batches())


def resume(row: Row, folder: Path) -> None:
    """Its own QAT file into a prepared model of other weights: the same state, nothing made anew."""
    model = target(row)
    report = qc.load_checkpoint(model, row.file(folder))
    assert row.model is not None
    assert report.synthesized == 0
    assert_same_state(model, row.model())


def ranges_in(row: Row, folder: Path) -> None:
    """A QAT file of torch.ao (of FX mode for eager mode) into its model: the ranges of the weights are the file's."""
    flow = "fx-x86" if row.name == "torch.ao eager" else "eager-x86"
    source = by_flow(flow)(_float_model(), batches(seed=5))
    widen(source)
    _carried(lambda: target(row), qc.save_checkpoint(source, folder / "other.pt"))


def ranges_out(row: Row, folder: Path) -> None:
    """Its QAT file into a model of torch.ao, of another mode than its own: the ranges of the weights are the file's."""
    flow = "eager-x86" if row.name == "torch.ao FX" else "fx-x86"
    if row.dequantized is not None:
        qc.load_checkpoint(other(by_flow(flow)), row.file(folder), calibration=batches())
        raise AssertionError(f"{row.name} gave its ranges, and its row says not how that is checked")
    _carried(lambda: other(by_flow(flow)), wider(row, folder))


def writes(row: Row, folder: Path) -> None:
    """What `save_checkpoint` writes of its model is what the framework's own `load_state_dict` takes, strictly; or its
    own library makes of what `convert_checkpoint` writes the weights that training saw."""
    if row.converts is not None:
        to, read = row.converts
        trained = trained_torchao()
        expected = qc.to_float(trained, weights="quantized")
        assert not torch.equal(expected["fc1.weight"], qc.to_float(trained)["fc1.weight"])
        assert_same_state(read(qc.convert_checkpoint(trained, to, folder / "out")), dict(expected))
        return
    fresh = target(row)
    assert row.model is not None
    model = row.model()
    saved = qc.save_checkpoint(model, folder / "own.pt")
    try:
        with torch.no_grad():
            fresh.load_state_dict(torch.load(saved, weights_only=True), strict=True)
    except (RuntimeError, KeyError) as error:
        raise No("its own `load_state_dict` takes other keys than those of the file") from error
    again = qc.save_checkpoint(fresh, folder / "again.pt")
    assert_same_state(dict(qc.open_checkpoint(again)), dict(qc.open_checkpoint(saved)))


COLUMNS: Mapping[str, Callable[[Row, Path], None]] = {
    "Read": reads,
    "To float": to_float,
    "Float in": float_in,
    "Resume": resume,
    "Ranges in": ranges_in,
    "Ranges out": ranges_out,
    "Write": writes,
}

# --- what the columns share -------------------------------------------------------------------------------------------


def target(row: Row) -> nn.Module:
    """A model of the framework that holds other weights and ranges."""
    known = [type(framework) for framework in FRAMEWORKS if framework.name == row.told[0]]
    if all(kind.owns_model is KeyedFramework.owns_model for kind in known):
        raise No("its files are read, its models are not known")
    assert row.other is not None
    return row.other()


def _is_range(entry: Entry) -> bool:
    observed = entry.role.is_observed and entry.role is not Role.ZERO_POINT
    return bool(entry.quantizer) and entry.site.startswith("weight:") and observed


def _float_model() -> nn.Module:
    model = make_float()
    model.load_state_dict(float_state())
    return model


def widen(model: nn.Module) -> None:
    """Make the range of each weight wider than the weight."""
    description = describe_model(model)
    with torch.no_grad():
        for key, slot in description.view.slots.items():
            if key in description.schema and _is_range(description.schema[key]):
                slot.tensor.mul_(WIDER)


def wider(row: Row, folder: Path) -> Any:
    """A file of the framework with wider ranges."""
    if row.model is not None:
        model = row.model()
        widen(model)
        return qc.save_checkpoint(model, folder / "wider.pt")
    state = dict(qc.open_checkpoint(row.file(folder)))
    schema = open_any(state).schema
    return {key: value * WIDER if _is_range(schema[key]) else value for key, value in state.items()}


def scales(model: nn.Module) -> dict[str, Tensor]:
    """Site -> scale of the quantizer of each linear layer's weight."""
    found = {}
    for quantizer in describe_model(model).quantizers:
        if quantizer.needs is Needs.WEIGHTS and quantizer.site.startswith("weight:fc"):
            encoding = encoding_of(quantizer)
            module: Any = quantizer.module
            found[quantizer.site] = (encoding.qparams()[0] if encoding else module.scale).detach().flatten().clone()
    return found


def _carried(make: Callable[[], nn.Module], source: Any) -> None:
    model, bare = make(), make()
    report = qc.load_checkpoint(model, source, calibration=batches())
    qc.load_checkpoint(bare, float_state(), calibration=batches())
    wide, plain = scales(model), scales(bare)
    assert len(plain) == 2
    # an amax over 127 and a width over 255 are not quite the same scale
    if not all(torch.allclose(wide[site], WIDER * plain[site], rtol=0.01) for site in plain):
        assert all(torch.equal(wide[site], plain[site]) for site in plain)
        raise No(_reason(report))


def _reason(report: qc.Report) -> str:
    """Why the ranges of a linear layer's weight were made anew."""
    steps = [step for step in report.steps if isinstance(step, Synthesize | Drop) and "weight_" in step.key]
    return next(step.reason for step in steps if step.key.startswith("fc1.") and step.reason).partition(":")[0]


# --- the table --------------------------------------------------------------------------------------------------------


def table() -> str:
    """The rows, and below them each reason once."""
    reasons: list[str] = []
    lines = ["| Framework | " + " | ".join(COLUMNS) + " |", "| --- |" + " :---: |" * len(COLUMNS)]
    with _quiet():
        for row in ROWS:
            cells = []
            for column in COLUMNS:
                why = cell(row, column)
                if why and why not in reasons:
                    reasons.append(why)
                cells.append(f"no ({reasons.index(why) + 1})" if why else "yes")
            lines.append(f"| {row.name} | {' | '.join(cells)} |")
    numbered = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *numbered])


def cell(row: Row, column: str) -> str:
    """Why what the column asks for is not so, or ""."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            COLUMNS[column](row, Path(folder))
        except No as error:
            return str(error)
        except qc.PlanError as error:
            return re.sub(r" \([^)]*\)|,.*|^\d+ ", "", error.problems[0].detail)
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """NNCF compiles its kernels for a minute or two, and does without them where there is no compiler."""
    logger = logging.getLogger("nncf")
    level = logger.level
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("CXX", "false")
        patch.setenv("TORCH_EXTENSIONS_DIR", folder)
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        logger.setLevel(logging.ERROR)
        yield
    logger.setLevel(level)
