"""Super-Gradients: `net` and `ema_net`, another number of classes, averaged files, its own QAT files, RepVGG."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from common import FOLDER, eager, images, read, real, same, stateful
from torch import Tensor, nn

import qat_compat as qc
from qat_compat.testing import assert_same_output, assert_twin

SHUFFLENET = "super_gradients/shufflenet_float_ckpt_best.pth"
AVERAGED = "super_gradients/shufflenet_float_average_model.pth"
QAT = "super_gradients/shufflenet_qat_ckpt_best.pth"
REPVGG = "super_gradients/repvgg_float_ckpt_best.pth"


def _pair(ins: int, outs: int, kernel: int, groups: int = 1, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(ins, outs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outs)]


class _Halves(nn.Module):
    """A block of ShuffleNet v2 that halves the image."""

    def __init__(self, ins: int, half: int) -> None:
        super().__init__()
        self.branch1 = nn.Sequential(*_pair(ins, ins, 3, ins, 2), *_pair(ins, half, 1), nn.ReLU())
        first, last = [*_pair(ins, half, 1), nn.ReLU()], [*_pair(half, half, 1), nn.ReLU()]
        self.branch2 = nn.Sequential(*first, *_pair(half, half, 3, half, 2), *last)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.branch1(x), self.branch2(x)], 1)


class ShuffleNet(nn.Module):
    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*_pair(3, 8, 3, stride=2), nn.ReLU())
        self.layer2 = nn.Sequential(_Halves(8, 8))
        self.layer3 = nn.Sequential(_Halves(16, 16))
        self.layer4 = nn.Sequential(_Halves(32, 32))
        self.conv5 = nn.Sequential(*_pair(64, 64, 1), nn.ReLU())
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv5(self.layer4(self.layer3(self.layer2(self.conv1(x)))))
        return self.fc(self.avgpool(x).flatten(1))


def _fusions() -> list[tuple[str, ...]]:
    names: list[tuple[str, ...]] = [("conv1.0", "conv1.1"), ("conv5.0", "conv5.1")]
    for layer in ("layer2.0", "layer3.0", "layer4.0"):
        for branch, firsts in (("branch1", (0, 2)), ("branch2", (0, 3, 5))):
            names += [(f"{layer}.{branch}.{i}", f"{layer}.{branch}.{i + 1}") for i in firsts]
    return names


PREPARE = eager(*_fusions())
BATCHES = partial(images, size=32)


def net(classes: int = 10) -> nn.Module:
    return ShuffleNet(classes)


@real
def test_the_average_is_taken_and_said_and_select_takes_the_other() -> None:
    for select, part in ((None, "ema_net"), ("ema", "ema_net"), ("model", "net"), ("net", "net")):
        state = read(SHUFFLENET, part)
        twin = assert_twin(ShuffleNet, PREPARE, state, BATCHES(), source=FOLDER / SHUFFLENET, select=select)
        said = [text for text in twin.report.warnings if "which Super-Gradients itself loads first" in text]
        assert bool(said) == (select is None)
        same(qc.to_float(twin.loaded), state)


@real
def test_another_number_of_classes() -> None:
    """Super-Gradients' `checkpoint_num_classes`: the head is named, and kept fresh on request."""
    model = PREPARE(net(10))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(qc.PlanError) as error:
        qc.load_checkpoint(model, FOLDER / SHUFFLENET, calibration=BATCHES())
    assert sorted(problem.key for problem in error.value.problems) == ["fc.bias", "fc.weight"]
    assert "expected float32[10, 64], found float32[1000, 64]" in str(error.value)
    same(model.state_dict(), before)
    state = read(SHUFFLENET, "ema_net") | {key: before[key] for key in ("fc.weight", "fc.bias")}
    assert_head_stays(FOLDER / SHUFFLENET, state)


def assert_head_stays(path: Path, state: dict[str, Tensor]) -> None:
    """With `keep=` the result is the twin of a float file whose head is the model's own."""

    def fresh() -> nn.Module:
        model = net(10)
        with torch.no_grad():
            model.fc.weight.copy_(state["fc.weight"])
            model.fc.bias.copy_(state["fc.bias"])
        return model

    twin = assert_twin(fresh, PREPARE, state, BATCHES(), source=path, make_target=fresh, keep="fc.*")
    assert twin.report.kept >= 2


@real
def test_the_averaged_file_counts_in_float() -> None:
    """Averaging made `num_batches_tracked` float32; it is exact again."""
    raw = read(AVERAGED, "net")
    assert raw["conv1.1.num_batches_tracked"].dtype is torch.float32
    exact = {key: value.long() if key.endswith("tracked") else value for key, value in raw.items()}
    assert all(torch.equal(exact[key].float(), raw[key]) for key in raw)
    twin = assert_twin(ShuffleNet, PREPARE, exact, BATCHES(), source=FOLDER / AVERAGED)
    same(qc.to_float(twin.loaded), exact)


@real
def test_its_own_qat_file() -> None:
    """Weights by name, ranges anew where the file's are dropped, and nothing lost on the way to float."""
    raw = read(QAT, "net")
    floats = {key: value for key, value in raw.items() if "_quantizer." not in key}
    checkpoint = qc.open_checkpoint(FOLDER / QAT)
    assert (checkpoint.framework, checkpoint.stage) == ("pytorch_quantization", "prepared")
    same(qc.to_float(FOLDER / QAT), floats)
    twin = assert_twin(ShuffleNet, PREPARE, floats, BATCHES(), source=FOLDER / QAT, drop="*_amax")
    assert twin.report.dropped == len(raw) - len(floats)
    plain = ShuffleNet()
    report = qc.load_checkpoint(plain, FOLDER / QAT)
    assert "state of a quantizer that the target does not have" in str(report)
    same(plain.state_dict(), floats)


@real
def test_a_file_that_fills_nothing_or_a_part_is_refused_with_its_coverage() -> None:
    with pytest.raises(qc.PlanError, match="the source fills 0 of 62 float entries"):
        qc.load_checkpoint(RepVGG(), FOLDER / SHUFFLENET)
    part = {key: value for key, value in read(SHUFFLENET, "ema_net").items() if key.startswith("conv1.")}
    with pytest.raises(qc.PlanError, match="the source fills 6 of 104 float entries"):
        qc.load_checkpoint(PREPARE(ShuffleNet()), part, calibration=BATCHES())


class _RepBlock(nn.Module):
    """Two branches, or the convolution that they are fused into."""

    def __init__(self, ins: int, outs: int, fused: bool, beside: bool) -> None:
        super().__init__()
        if not fused:
            self.branch_3x3 = nn.Sequential()
            self.branch_1x1 = nn.Sequential()
            for branch, kernel in ((self.branch_3x3, 3), (self.branch_1x1, 1)):
                branch.add_module("conv", nn.Conv2d(ins, outs, kernel, 2, kernel // 2, bias=False))
                branch.add_module("bn", nn.BatchNorm2d(outs))
        if fused or beside:
            self.rbr_reparam = nn.Conv2d(ins, outs, 3, 2, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "branch_3x3"):
            return self.relu(self.rbr_reparam(x))
        return self.relu(self.branch_3x3(x) + self.branch_1x1(x))


class RepVGG(nn.Module):
    """The file's network; `beside` has a place for the fused tensor in the unfused model, as YOLO-NAS does."""

    def __init__(self, fused: bool = False, beside: bool = False) -> None:
        super().__init__()
        self.stem = _RepBlock(3, 8, fused, beside)
        for index, (ins, outs) in enumerate(((8, 8), (8, 16), (16, 32), (32, 64)), 1):
            setattr(self, f"stage{index}", nn.Sequential(_RepBlock(ins, outs, fused, beside)))
        self.linear = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stem(x)))))
        return self.linear(x.mean((2, 3)))


_BLOCKS = ("stem", "stage1.0", "stage2.0", "stage3.0", "stage4.0")
REP_FUSE = [(f"{b}.branch_{k}.conv", f"{b}.branch_{k}.bn") for b in _BLOCKS for k in ("3x3", "1x1")]


@real
def test_repvgg_into_the_unfused_model() -> None:
    state = read(REPVGG, "net")
    twin = assert_twin(RepVGG, eager(*REP_FUSE), state, BATCHES(), source=FOLDER / REPVGG)
    same(qc.to_float(twin.loaded), state)


def stale() -> dict[str, Tensor]:
    return stateful(RepVGG(beside=True))


def test_a_stale_fused_tensor_is_refused(tmp_path: Path) -> None:
    """The fused model finds all its names in the file, and would compute something else."""
    torch.save({"net": stale(), "acc": 0.5}, tmp_path / "ckpt.pth")
    fused = RepVGG(fused=True)
    before = {key: value.clone() for key, value in fused.state_dict().items()}
    for drop in ((), "*.branch_*"):
        with pytest.raises(qc.PlanError) as error:
            qc.load_checkpoint(fused, tmp_path / "ckpt.pth", drop=drop)
        assert [problem.key for problem in error.value.problems] == [f"{b}.rbr_reparam.weight" for b in sorted(_BLOCKS)]
        assert "out of date" in str(error.value)
        assert "load the file into the unfused float model, fuse that, and pass the fused model" in str(error.value)
    same(fused.state_dict(), before)


def test_what_has_a_place_for_both_is_loaded_as_it_is(tmp_path: Path) -> None:
    torch.save({"net": stale()}, tmp_path / "ckpt.pth")
    model = RepVGG(beside=True)
    qc.load_checkpoint(model, tmp_path / "ckpt.pth")
    same(model.state_dict(), stale())
    only_fused = stateful(RepVGG(fused=True))
    twin = assert_twin(partial(RepVGG, fused=True), eager(), only_fused, BATCHES(), source={"net": only_fused})
    assert twin.report.copied == 12


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_prefixes_and_another_head(tmp_path: Path, prefix: str) -> None:
    """The weights-only file of a run on several devices carries `module.`."""
    state = stateful(net(7))
    torch.save({"net": {prefix + key: value for key, value in state.items()}}, tmp_path / "average_model.pth")
    assert_twin(partial(net, 7), PREPARE, state, BATCHES(), source=tmp_path / "average_model.pth")
    own = stateful(net(10), 5)
    mixed = state | {key: own[key] for key in ("fc.weight", "fc.bias")}
    assert_head_stays(tmp_path / "average_model.pth", mixed)


def test_average_and_float_counters(tmp_path: Path) -> None:
    live, average = stateful(net(), 1), stateful(net(), 2)
    counted = {key: value.float() for key, value in average.items()}
    torch.save({"net": live, "ema_net": counted, "epoch": 1, "optimizer_state_dict": {}}, tmp_path / "ckpt.pth")
    assert_twin(net, PREPARE, average, BATCHES(), source=tmp_path / "ckpt.pth")
    assert_twin(net, PREPARE, live, BATCHES(), source=tmp_path / "ckpt.pth", select="net")
    with pytest.raises(qc.CheckpointError, match="net"):
        qc.load_checkpoint(PREPARE(net()), tmp_path / "ckpt.pth", select="network", calibration=BATCHES())


def test_a_qat_file_of_another_head(tmp_path: Path) -> None:
    """The head's `_amax` goes with the head that is not taken."""
    state = stateful(net(7))
    amax = {"fc._input_quantizer._amax": torch.tensor(3.0), "fc._weight_quantizer._amax": torch.ones(7, 1)}
    torch.save({"net": state | amax}, tmp_path / "qat.pth")
    own = stateful(net(10), 5)
    assert_head_stays(tmp_path / "qat.pth", state | {key: own[key] for key in ("fc.weight", "fc.bias")})
    back = qc.to_float(tmp_path / "qat.pth")
    same(back, state)
    model = net(7)
    qc.load_checkpoint(model, back)
    same(model.state_dict(), state)
    other = net(7)
    other.load_state_dict(state)
    assert_same_output(model, other, BATCHES())
