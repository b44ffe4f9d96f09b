"""A file that fills a part of the model, or nothing of it, is refused with its coverage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_apply import untouched
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig, prepare_qat

import qat_compat as qc


def blocks(count: int) -> nn.Sequential:
    """`count` convolutions with their norms: six keys each."""
    return nn.Sequential(*(nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.BatchNorm2d(2)) for _ in range(count)))


class Detector(nn.Module):
    """331 keys."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.temperature = blocks(55), nn.Parameter(torch.ones(1))


class Classifier(nn.Module):
    """104 keys."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.head = blocks(17), nn.Linear(2, 3)


def prepared(model: nn.Module) -> nn.Module:
    model.qconfig = get_default_qat_qconfig("x86")
    return prepare_qat(model.train())


TARGETS = pytest.mark.parametrize("prepare", [lambda model: model, prepared], ids=["float", "prepared"])


def refused(model: nn.Module, source: dict[str, Tensor], folder: Path) -> list[str]:
    """The text of the error, the same from a mapping and from a file."""
    torch.save({"net": source, "epoch": 3}, folder / "f.pt")
    batches, texts = [torch.randn(1, 2, 4, 4)], []
    for given in (source, folder / "f.pt"):
        with untouched(model), pytest.raises(qc.PlanError) as caught:
            qc.load_checkpoint(model, given, calibration=batches)
        texts.append(str(caught.value).splitlines()[2:])  # without the file's name
    assert texts[0] == texts[1]
    return texts[0]


@TARGETS
def test_14_of_331_keys(prepare: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    state = Detector().state_dict()
    assert len(state) == 331
    shared = {key: state[key] for key in list(state) if key.startswith(("backbone.0.", "backbone.1."))}
    shared |= {key: state[key] for key in ("backbone.54.0.weight", "temperature")}
    assert len(shared) == 14
    others = {f"trunk.{key}": value for key, value in Classifier().state_dict().items()}
    text = refused(prepare(Detector()), shared | others, tmp_path)
    assert text[0].startswith(
        "  missing      <coverage>: the source fills 14 of 331 float entries of the target; the source holds names like"
    )
    assert "  missing      317 keys, such as backbone." in text[1]
    assert any(line.startswith("  unexpected   104 keys, such as trunk.") for line in text)
    assert len(text) < 24


@TARGETS
def test_0_of_104_keys(prepare: Callable[[nn.Module], nn.Module], tmp_path: Path) -> None:
    assert len(Classifier().state_dict()) == 104
    text = refused(prepare(Classifier()), dict(Detector().state_dict()), tmp_path)
    assert text[0].startswith("  missing      <coverage>: the source fills 0 of 104 float entries of the target")
    assert any(line.startswith("  unexpected   331 keys") for line in text)
