"""Bytes that go through the ring arrive, whatever the layout, and no slot is filled while the device still reads it.

The ring runs here on the CPU and, where there is one, on an accelerator: `tests/late` has one that is as late as a
device may be, since it copies nothing until somebody waits for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.ao.quantization import QConfig, default_per_channel_weight_fake_quant, prepare_qat

import qat_compat as qc
from qat_compat.errors import CheckpointError
from qat_compat.ranges import RangeOver, value_range
from qat_compat.storage import ring
from qat_compat.storage.extent import Extent, Read
from qat_compat.storage.mapped import MappedFile
from qat_compat.storage.stream import read_all

MIB = 1 << 20
CPU = torch.device("cpu")
DTYPES = (torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.float64, torch.complex128)


@pytest.fixture(params=["cpu", pytest.param("accelerator", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return CPU if request.param == "cpu" else torch.device(request.getfixturevalue("accelerator"), 0)


# --- what arrives -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    path = tmp_path_factory.mktemp("ring") / "large"
    data = torch.randint(0, 2, (120 * MIB,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path.write_bytes(data.numpy().tobytes())
    return path, data


Layout = list[tuple[int, int, torch.dtype]]
LAYOUTS = st.lists(
    st.tuples(st.integers(0, 9000), st.integers(0, 10 * MIB) | st.integers(0, 64), st.sampled_from(DTYPES)),
    min_size=1,
    max_size=8,
)


def laid_out(large: tuple[Path, Tensor], layout: Layout, device: torch.device) -> tuple[list[Read], list[Tensor]]:
    """Reads with gaps before them, and the bytes that they should bring."""
    path, data = large
    file = MappedFile(path)
    reads, expected, position = [], [], 0
    for gap, size, dtype in layout:
        position += gap
        count = size // dtype.itemsize
        length = count * dtype.itemsize
        target = torch.zeros(count, dtype=dtype, device=device)
        reads.append(Read(Extent(file, position, length), dtype, target))
        expected.append(data[position : position + length])
        position += length
    return [read for read in reads if read.extent.nbytes], [part for part in expected if len(part)]


def same(reads: list[Read], expected: list[Tensor]) -> bool:
    return all(torch.equal(r.target.cpu().view(torch.uint8), e) for r, e in zip(reads, expected, strict=True))


def test_any_layout_arrives(large: tuple[Path, Tensor], device: torch.device) -> None:
    @settings(max_examples=25, deadline=None)
    @given(LAYOUTS)
    def arrives(layout: Layout) -> None:
        reads, expected = laid_out(large, layout, device)
        ring.fill_through_ring(reads, device)
        assert same(reads, expected)

    arrives()


def test_more_bytes_than_all_slots_and_a_tensor_over_many_of_them(
    large: tuple[Path, Tensor], device: torch.device
) -> None:
    layout: Layout = [(3, 5, torch.uint8), (0, 90 * MIB, torch.float32), (7, 20 * MIB, torch.bfloat16)]
    reads, expected = laid_out(large, layout, device)
    ring.fill_through_ring(reads, device)
    assert same(reads, expected)


@pytest.mark.gpu
def test_without_waiting_for_its_event_a_slot_is_filled_too_early(
    large: tuple[Path, Tensor], accelerator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That the late device tells a ring that waits from one that does not."""
    if accelerator != "late":
        pytest.skip("a real device may be in time")

    def hasty(slot: ring._Slot, parts: Any) -> None:
        slot.copied = None
        fill(slot, parts)

    fill = ring._Slot.fill
    monkeypatch.setattr(ring._Slot, "fill", hasty)
    reads, expected = laid_out(large, [(0, 100 * MIB, torch.float32)], torch.device(accelerator, 0))
    ring.fill_through_ring(reads, torch.device(accelerator, 0))
    assert not same(reads, expected)


def test_more_small_tensors_than_one_call_takes(large: tuple[Path, Tensor], device: torch.device) -> None:
    reads, expected = laid_out(large, [(1, 3, torch.uint8)] * 3000, device)
    ring.fill_through_ring(reads, device)
    assert same(reads, expected)


@pytest.mark.parametrize("shape", [(), (3,), (700, 1000), (3, 3 * MIB)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wider_dtype_is_made_on_the_way(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    path = tmp_path / "value"
    path.write_bytes(b"x" + value.view(-1).view(torch.uint8).numpy().tobytes())
    target = torch.zeros(shape, dtype=dtype, device=device)
    ring.fill_through_ring([Read(Extent(MappedFile(path), 1, value.nbytes), torch.bfloat16, target)], device)
    assert torch.equal(target.cpu(), value.to(dtype))


def test_whole_tensors_are_looked_at_once_each(tmp_path: Path, device: torch.device) -> None:
    values = [torch.randn(rows, 1 << 18, generator=torch.Generator().manual_seed(rows)) for rows in (1, 20, 3)]
    path = tmp_path / "values"
    path.write_bytes(b"".join(value.numpy().tobytes() for value in values))
    file, start = MappedFile(path), 0
    reads, ranges = [], []
    for value in values:
        target = torch.zeros_like(value, device=device)
        over = RangeOver(target, 0)
        reads.append(Read(Extent(file, start, value.nbytes), value.dtype, target, over.look))
        ranges.append(over)
        start += value.nbytes
    ring.fill_through_ring(reads, device)
    for value, over in zip(values, ranges, strict=True):
        assert all(map(torch.equal, (end.cpu() for end in over.result()), value_range(value, 0)))


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_file_that_ends_early_is_said_and_nothing_hangs(tmp_path: Path, device: torch.device) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(30 * MIB))
    reads = [
        Read(
            Extent(MappedFile(path), 0, 30 * MIB), torch.uint8, torch.zeros(30 * MIB, dtype=torch.uint8, device=device)
        )
    ]
    path.write_bytes(bytes(9 * MIB))
    with pytest.raises(CheckpointError, match=r"short.*cut short|changed while it was open"):
        ring.fill_through_ring(reads, device)
    again = tmp_path / "whole"
    again.write_bytes(bytes([7]) * 100)
    target = torch.zeros(100, dtype=torch.uint8, device=device)
    ring.fill_through_ring([Read(Extent(MappedFile(again), 0, 100), torch.uint8, target)], device)
    assert (target == 7).all()


def test_an_error_of_who_looks_reaches_the_caller(tmp_path: Path, device: torch.device) -> None:
    path = tmp_path / "value"
    path.write_bytes(bytes(40 * MIB))

    def each(first: int, rows: Tensor) -> None:
        raise ZeroDivisionError("seen")

    file = MappedFile(path)
    reads = [
        Read(
            Extent(file, at * 10 * MIB, 10 * MIB),
            torch.uint8,
            torch.zeros(10 * MIB, dtype=torch.uint8, device=device),
            each,
        )
        for at in range(4)
    ]
    with pytest.raises(ZeroDivisionError, match="seen"):
        ring.fill_through_ring(reads, device)


# --- a real device ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_what_a_gpu_still_has_to_do_comes_first(large: tuple[Path, Tensor], accelerator: str) -> None:
    """A write to the target that was asked for before the read does not come after it."""
    reads, expected = laid_out(large, [(0, 9 * MIB, torch.uint8)], torch.device(accelerator, 0))
    reads[0].target.copy_(torch.full((9 * MIB,), 7, dtype=torch.uint8).pin_memory(), non_blocking=True)
    read_all(reads)
    assert same(reads, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["default", "inplace", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_a_gpu_is_the_twin_of_one_on_the_cpu(
    tmp_path: Path, accelerator: str, where: str, dtype: torch.dtype
) -> None:
    """Weights and the ranges of their channels, read and worked out on the device.

    A scale is a range divided by a number, which a GPU does as a product with its inverse: it is compared with what
    the observer itself makes of the range on the device.
    """

    def model(width: int = 1100) -> nn.Module:
        layers = nn.Sequential(*[nn.Linear(width, width) for _ in range(3)]).train()
        layers.qconfig = QConfig(activation=nn.Identity, weight=default_per_channel_weight_fake_quant)
        return prepare_qat(layers)

    torch.manual_seed(0)
    state = {key: value.to(dtype) for key, value in model().state_dict().items() if "fake_quant" not in key}
    save_file(state, tmp_path / "model.safetensors")
    twin, target = model(), model()
    qc.load_checkpoint(twin, tmp_path / "model.safetensors")
    if where != "meta":
        target = target.to(accelerator)
    else:
        for layer in target:
            layer._parameters = {name: nn.Parameter(p.to("meta")) for name, p in layer._parameters.items()}
            layer.weight_fake_quant.to(accelerator)
    qc.load_checkpoint(target, tmp_path / "model.safetensors", inplace=where == "inplace", device=accelerator)
    found = target.state_dict()
    assert {value.device.type for value in found.values()} == {accelerator}
    for key, value in twin.state_dict().items():
        if not key.endswith((".scale", ".zero_point")):
            assert torch.equal(found[key].cpu(), value), key
    for layer in target:
        quantizer = layer.weight_fake_quant
        scale, zero_point = quantizer.calculate_qparams()
        assert torch.equal(quantizer.scale, scale) and torch.equal(quantizer.zero_point, zero_point)
