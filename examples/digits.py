"""The main job of qat_compat on real images: float training, QAT fine-tuning and back, with accuracies.

Run it with `make demo`, or `python examples/digits.py` where qat_compat and scikit-learn are installed.
"""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.ao import quantization as tq
from torch.nn import functional as F

import qat_compat as qc

ENGINE = "x86" if "x86" in torch.backends.quantized.supported_engines else "qnnpack"


class DigitNet(nn.Module):
    """Three conv-BN-ReLU blocks and a linear head, as one would write it before thinking of quantization."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.conv1, self.bn1, self.relu1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
        self.conv2, self.bn2, self.relu2 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
        self.conv3, self.bn3, self.relu3 = nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(32 * 2 * 2, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(self.quant(images))))
        x = self.pool(self.relu2(self.bn2(self.conv2(x))))
        x = self.pool(self.relu3(self.bn3(self.conv3(x))))
        return self.dequant(self.fc(x.flatten(1)))


def fresh_qat_model() -> nn.Module:
    """A new DigitNet, fused and prepared for QAT: random weights, empty observers."""
    model = tq.fuse_modules_qat(DigitNet().train(), [[f"conv{i}", f"bn{i}", f"relu{i}"] for i in (1, 2, 3)])
    model.qconfig = tq.get_default_qat_qconfig(ENGINE)
    return tq.prepare_qat(model)


def train(model: nn.Module, images: Tensor, labels: Tensor, *, epochs: int, lr: float) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return optimizer


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of right answers. Works on a copy, since a prepared model's observers go on learning from what they see."""
    return (copy.deepcopy(model).eval()(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    console = Console()
    start = time.perf_counter()
    torch.manual_seed(0)
    torch.backends.quantized.engine = ENGINE
    for silenced in ({"module": r"torch\."}, {"message": r"torch\.ao\.quantization is deprecated"}):
        warnings.filterwarnings("ignore", **silenced)

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    seen, unseen = train_test_split(torch.arange(len(labels)), test_size=0.25, stratify=labels, random_state=0)
    console.print(f"scikit-learn's digits: {len(seen)} images to train on, {len(unseen)} to test on\n")

    table = Table(title="Accuracy on the test images, step by step", title_justify="left")
    table.add_column("step", no_wrap=True)
    table.add_column("keys copied", justify="right")
    table.add_column("accuracy", justify="right")

    def row(step: str, model: nn.Module, keys: str = "") -> None:
        table.add_row(step, keys, f"{accuracy(model, images[unseen], labels[unseen]):.1%}")

    with tempfile.TemporaryDirectory() as folder:
        # 1. Float training, saved the way a trainer does: weights nested beside other state, every key prefixed.
        net = DigitNet()
        parallel = nn.DataParallel(net)
        optimizer = train(parallel, images[seen], labels[seen], epochs=5, lr=3e-3)
        path = Path(folder) / "checkpoint.pt"
        torch.save({"epoch": 5, "state_dict": parallel.state_dict(), "optimizer": optimizer.state_dict()}, path)
        row("float model, trained 5 epochs", net)

        # 2. What plain torch makes of that file, on a fresh QAT model.
        state = torch.load(path)["state_dict"]
        stripped = {key.removeprefix("module."): value for key, value in state.items()}
        attempts = {"QAT model, load_state_dict(strict=False)": state, "  the same, prefix cut by hand": stripped}
        for step, tensors in attempts.items():
            naive = fresh_qat_model()
            unexpected = naive.load_state_dict(tensors, strict=False).unexpected_keys
            row(step, naive, f"{len(tensors) - len(unexpected)} of {len(tensors)}")

        # 3. The same file, a fresh QAT model, one call.
        model = fresh_qat_model()
        report = qc.load_checkpoint(model, path, calibration=[images[seen[:64]]])
        row("QAT model, qat_compat.load_checkpoint", model, f"{report.copied} of {len(state)}")

    # 4. Fine-tuning starts from there.
    train(model, images[seen], labels[seen], epochs=1, lr=3e-4)
    row("  one epoch of QAT", model)

    # 5. Back to the float class, under its own names.
    back = DigitNet()
    back.load_state_dict(qc.to_float(model), strict=True)
    row("  back to float, strict=True", back)

    # 6. And on to int8.
    row("  converted to int8", tq.convert(copy.deepcopy(model).eval()))

    console.print(table)
    console.print("\nWhat qat_compat.load_checkpoint reports:\n")
    print(report)
    console.print(f"\n{time.perf_counter() - start:.1f} s in all")


if __name__ == "__main__":
    main()
