"""A QAT run of Lightning leaves two files for each checkpoint: its own, and the float one."""

from __future__ import annotations

import warnings
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load, load_file
from torch import Tensor, nn
from torch.ao.quantization import QuantStub, fuse_modules_qat, get_default_qat_qconfig, prepare_qat
from torch.utils.data import DataLoader

import qat_compat as qc

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    from qat_compat.integrations.lightning import FloatBeside


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quant = QuantStub()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu1(self.bn1(self.conv1(self.quant(x)))).mean((2, 3)))


class Lit(lightning.LightningModule):
    def __init__(self, qat: bool = False) -> None:
        super().__init__()
        self.model: nn.Module = Net()
        if qat:
            self.model = fuse_modules_qat(self.model.train(), [["conv1", "bn1", "relu1"]])
            self.model.qconfig = get_default_qat_qconfig("x86")  # type: ignore[assignment]
            prepare_qat(self.model, inplace=True)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.model(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(lit: Lit, folder: Path, plugin: FloatBeside, epochs: int = 3) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[plugin],
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=1, monitor=None, save_last=False)],
    )
    data = DataLoader(
        [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(8)], batch_size=4
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(lit, data)
    return trainer


def test_each_checkpoint_has_its_float_file_and_both_are_removed_together(tmp_path: Path) -> None:
    lit = Lit(qat=True)
    fit(lit, tmp_path, FloatBeside(like=Lit()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch=2.ckpt", "epoch=2.float.safetensors"]
    written = load_file(tmp_path / "epoch=2.float.safetensors")
    Lit().load_state_dict(written, strict=True)
    expected = qc.to_float(lit, like=Lit())
    assert list(qc.open_checkpoint(tmp_path / "epoch=2.float.safetensors")) == list(Lit().state_dict())
    assert all(torch.equal(written[key], value) for key, value in expected.items())
    resumed = Lit(qat=True)
    assert qc.load_checkpoint(resumed, tmp_path / "epoch=2.ckpt").synthesized == 0


def test_the_run_goes_on_from_its_own_checkpoint(tmp_path: Path) -> None:
    plugin = FloatBeside(like=Lit())
    trainer = fit(Lit(qat=True), tmp_path, plugin, epochs=1)
    again = Lit(qat=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit_loop.max_epochs = 2
        trainer.fit(again, DataLoader(torch.randn(4, 3, 8, 8)), ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert trainer.current_epoch == 2


def test_lightnings_own_file_is_there_whatever_becomes_of_the_float_one(tmp_path: Path) -> None:
    with pytest.raises(qc.PlanError, match=r"head"):
        fit(Lit(qat=True), tmp_path, FloatBeside(like={"model.other.weight": torch.zeros(3)}))
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0.ckpt"]
    assert qc.load_checkpoint(Lit(qat=True), tmp_path / "epoch=0.ckpt").synthesized == 0


def test_names_that_hold_dots_do_not_fall_together() -> None:
    assert FloatBeside.float_path("runs/model_v1.1") != FloatBeside.float_path("runs/model_v1.2")
    assert FloatBeside.float_path("runs/epoch=1.ckpt") == Path("runs/epoch=1.float.safetensors")


def test_a_run_that_saves_to_a_url_has_both_files_there() -> None:
    lit = Lit(qat=True)
    fit(lit, "memory://float-beside", FloatBeside(like=Lit()), epochs=2)  # type: ignore[arg-type]
    files = fsspec.filesystem("memory")
    names = sorted(name.rpartition("/")[2] for name in files.ls("/float-beside", detail=False))
    assert names == ["epoch=1.ckpt", "epoch=1.float.safetensors"]
    written = load(files.cat_file("/float-beside/epoch=1.float.safetensors"))
    assert all(torch.equal(written[key], value) for key, value in qc.to_float(lit, like=Lit()).items())
