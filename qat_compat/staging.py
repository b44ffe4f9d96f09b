"""Read every tensor of a plan, in the dtype and on the device where it will live; the model is not touched yet."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qat_compat.casting import cast_loss, is_widening, same_values
from qat_compat.devices import has_streams
from qat_compat.errors import CheckpointError, CompatError, PlanError, Problem, ProblemKind
from qat_compat.frameworks import Description, Quantizer, Reduction
from qat_compat.memory import copy_all, empty_like_spec, fresh_tensors, populate
from qat_compat.plan import Copy, Derive, Drop, How, Keep, Plan, Synthesize
from qat_compat.ranges import RangeOver
from qat_compat.schema import Role, Spec
from qat_compat.source import Source, forms_of
from qat_compat.state import Slot, split_path
from qat_compat.storage import Extent, Read, read_all
from qat_compat.storage.mapped import MappedFile
from qat_compat.terms import written
from qat_compat.threads import in_threads

__all__ = ["Reading", "Staged", "stage"]

_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Reading:
    """Where tensors come from and how they are taken.

    Args:
        description: The model that they are for.
        source: What they are read from.
        saved: Key of the model -> value of a saved calibration.
        inplace: Leave parameters to be read straight into the model's own memory.
        mmap: Take file-backed tensors as they are.
        device: Where tensors of a meta-device model are made.
        advance: Called after each tensor.
    """

    description: Description
    source: Source
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    inplace: bool = False
    mmap: bool = False
    device: torch.device = _CPU
    advance: Callable[[], None] = lambda: None


@dataclass
class Staged:
    """Values read for a plan, before the model is touched."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # by first key of the slot
    hidden: dict[str, Tensor] = field(default_factory=dict)  # state that the state_dict does not hold
    extra: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, str] = field(default_factory=dict)
    # Into the model's own memory; it is written only when all else is settled.
    reads: list[Read] = field(default_factory=list)
    copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    # what a quantizer wants of a parameter -> the parameter, and its range, worked out as it was read
    ranges: dict[Reduction, tuple[Slot, RangeOver]] = field(default_factory=dict)

    def range_of(self, quantizer: Quantizer) -> tuple[Tensor, Tensor] | None:
        """The range of the parameter that a quantizer quantizes, where the model holds it as it was read."""
        wanted = quantizer.reduction()
        if wanted is None or wanted not in self.ranges:
            return None
        slot, found = self.ranges[wanted]
        module, name = slot.owners[0]
        held = module._parameters.get(name)
        return found.result() if held is not None and found.is_of(held) else None

    def write_in_place(self) -> None:
        """Overwrite the model's own memory: from here on there is no way back."""
        read_all(self.reads)
        copy_all(self.copies)


def stage(plan: Plan, reading: Reading) -> Staged:
    """Read every tensor that the plan copies, in the dtype and on the device where it will live.

    Raises:
        PlanError: Values that a cast would destroy, or tied names with different values.
    """
    slots = reading.description.view.slots
    _refuse_distributed(plan, slots)
    stager = _Stager(reading, _reductions(plan, reading.description))
    staged = stager.staged
    for step in plan.steps:
        if isinstance(step, Copy):
            stager.copy(step.key, step.source)
            reading.advance()
        elif isinstance(step, Derive) and step.value:
            stager.derive(step.key, step.value)
            reading.advance()
        elif isinstance(step, Derive) and step.terms:
            stager.write_down(step)
            reading.advance()
        elif isinstance(step, Synthesize) and step.how is How.RECORD:
            stager.recall(step.key)
    if stager.problems:
        raise PlanError(stager.problems, file=plan.source)
    stager.read()
    return staged


def _refuse_distributed(plan: Plan, slots: Mapping[str, Slot]) -> None:
    """A step fills a whole tensor; of a DTensor this process may hold a part, in memory that FSDP manages."""
    for step in plan.steps:
        slot = slots.get(step.key)
        if slot is None or type(slot.tensor) in _PLAIN or isinstance(step, (Keep, Drop)):
            continue
        target: Any = slot.tensor
        if hasattr(target, "to_local") and hasattr(target, "placements"):
            raise CompatError(
                "the model is distributed already (DTensor)",
                file=plan.source,
                key=step.key,
                expected="a model whose tensors are whole",
                found=f"{list(target.shape)} with the placements {target.placements}",
                remedy="load first, and call fully_shard or parallelize_module on the loaded model; or save that with"
                " torch.distributed.checkpoint, and load it into the distributed one",
            )


def _reductions(plan: Plan, description: Description) -> dict[str, list[Reduction]]:
    """Parameter -> what of it quantizers want to know, as far as no forward shows it to them."""
    how = {step.quantizer: step.how for step in plan.steps if isinstance(step, Synthesize)}
    runs = How.CALIBRATION in how.values()
    found: dict[str, list[Reduction]] = {}
    for quantizer in description.quantizers:
        if how.get(quantizer.name) is How.WEIGHTS and (not runs or quantizer.needs_no_forward()):
            wanted = quantizer.reduction()
            if wanted is not None:
                found.setdefault(wanted.parameter, []).append(wanted)
    return found


def _is_dense(target: Tensor) -> bool:
    """Whether its memory holds its values one after the other, as a file does."""
    return type(target) in _PLAIN and target.layout is torch.strided and target.is_contiguous()


class _Stager:
    """What is decided tensor by tensor, so that all of them can then be read together."""

    def __init__(self, reading: Reading, reductions: Mapping[str, list[Reduction]]) -> None:
        self.reading = reading
        self.reductions = reductions
        self.source = reading.source
        self.entries = reading.description.schema.entries
        self.slots = reading.description.view.slots
        self.staged = Staged()
        self.problems: list[Problem] = []
        self.origin: dict[str, str] = {}
        self.copies: list[tuple[Tensor, Tensor]] = []
        self.mapped: list[Tensor] = []
        self.maps: list[tuple[Slot, Spec, Extent]] = []
        self.streams: list[tuple[Slot, Spec, Extent]] = []
        self.forms = forms_of(reading.description)

    def copy(self, key: str, source: str) -> None:
        """Take one tensor of the source for one key of the model."""
        if self.entries[key].role is Role.EXTRA:
            self.staged.extra[key] = self.source.read(source)
            return
        slot = self.slots.get(key)
        if slot is None:
            self._hide(key, self._read(source))
        elif slot.key in self.origin:
            self._compare(key, slot, source)
        else:
            self.origin[slot.key] = source
            if not (self._map(slot, source) or self._stream(slot, source)):
                self._take(key, slot, self._read(source))

    def derive(self, key: str, source: str) -> None:
        """Take what a recipe of the source gives."""
        slot = self.slots.get(key)
        if slot is None or not self.entries[key].role.is_observed:
            self.copy(key, source)
        else:
            self._take_state(key, slot, self._read(source))

    def write_down(self, step: Derive) -> None:
        """Take a range of the source as the model's own quantizer writes it down."""
        entry = self.entries[step.key]
        form = self.forms[entry.quantizer]
        name = next(name for name, leaf in form.leaves.items() if leaf == entry.leaf)
        value = written(self.source.schema, form, {term: self._read(term) for term in step.terms})[name]
        slot = self.slots.get(step.key)
        if slot is None:
            self._hide(step.key, value)
        else:
            self._take_state(step.key, slot, value)

    def recall(self, key: str) -> None:
        """Take what a saved calibration holds."""
        value, slot = self.reading.saved[key], self.slots.get(key)
        if slot is None:
            self._hide(key, value)
            return
        fresh = self.staged.tensors[slot.key] = torch.empty(
            value.shape, dtype=slot.tensor.dtype, device=self._device(slot)
        )
        self.copies.append((fresh, value))

    def _hide(self, key: str, value: Tensor) -> None:
        """Take a value that the model's state_dict does not hold, to where its quantizer is."""
        device = self.reading.description.view.device(split_path(key)[0])
        device = self.reading.device if device.type == "meta" else device
        fresh = self.staged.hidden[key] = torch.empty_like(value, device=device)
        self.copies.append((fresh, value))

    def _take_state(self, key: str, slot: Slot, value: Tensor) -> None:
        """Take a quantizer's state, which may have another framework's shape, (C, 1, 1, 1) of (C,)."""
        self._take(key, slot, value.reshape(slot.tensor.shape if value.numel() == slot.tensor.numel() else -1))

    def read(self) -> None:
        """Fill fresh memory with what streams from a file, then with all else."""
        self._take_maps()
        targets = {slot.key: slot.tensor.dtype for slot, _, _ in self.streams}
        # quantizers resize buffers, so each of those has memory of torch's own
        large = [slot for slot, _, _ in self.streams if slot.is_parameter and self._device(slot).type == "cpu"]
        fresh = fresh_tensors([(tuple(slot.tensor.shape), targets[slot.key]) for slot in large])
        made = {slot.key: tensor for slot, tensor in zip(large, fresh, strict=True)}
        for slot, spec, _ in self.streams:
            if slot.key not in made:
                made[slot.key] = torch.empty(spec.shape, dtype=targets[slot.key], device=self._device(slot))
        read_all([self._to_read(slot, spec, extent, made[slot.key]) for slot, spec, extent in self.streams])
        self.staged.tensors.update(made)
        copy_all(self.copies)
        populate(self.mapped)

    def _map(self, slot: Slot, source: str) -> bool:
        """Whether the model can have the tensor over the file."""
        if not self.reading.mmap or self._device(slot) != _CPU or not _is_dense(slot.tensor):
            return False
        spec, extent = self.source.spec(source), self.source.extent(source)
        if extent is None or not extent.nbytes or spec != (tuple(slot.tensor.shape), slot.tensor.dtype):
            return False
        if extent.start % spec.dtype.itemsize:
            return False  # kernels expect addresses that fit the element
        self.maps.append((slot, spec, extent))
        return True

    def _take_maps(self) -> None:
        """Give the model what lies over the file; what shares bytes with a tensor that it has by then is read instead.

        One storage of a file is not to become one memory of two parameters.
        """
        mappings: dict[MappedFile, mmap.mmap] = {}  # of this load alone: two models must not share pages, either
        ends: dict[MappedFile, int] = {}
        taken: list[tuple[Slot, Spec, Extent]] = []
        for one in sorted(self.maps, key=lambda one: one[2].start):
            extent = one[2]
            if extent.start < ends.get(extent.file, 0):
                self.streams.append(one)
            else:
                ends[extent.file] = extent.start + extent.nbytes
                taken.append(one)
        in_threads(extent.check for _, _, extent in taken if extent.check is not None)
        for slot, spec, extent in taken:
            if extent.file not in mappings:
                mappings[extent.file] = extent.file.mapped()
            raw = torch.frombuffer(mappings[extent.file], dtype=torch.uint8, count=extent.nbytes, offset=extent.start)
            value = raw.view(spec.dtype).view(spec.shape)
            self.staged.tensors[slot.key] = value
            self.mapped.append(value)

    def _stream(self, slot: Slot, source: str) -> bool:
        """Whether the bytes of the file can be read straight into memory that the model then has."""
        target = slot.tensor
        if not (_is_dense(target) and has_streams(self._device(slot))):  # others get copies of the mapping
            return False
        spec = self.source.spec(source)
        if slot.is_parameter and spec.shape != target.shape:  # a buffer may have one element until it has seen data
            return False
        if not (spec.dtype == target.dtype or is_widening(spec.dtype, target.dtype)):
            return False
        extent = self.source.extent(source)
        if extent is None:
            return False
        if self._is_in_place(slot):
            self.staged.reads.append(self._to_read(slot, spec, extent, target.data))
        else:
            self.streams.append((slot, spec, extent))
        return True

    def _to_read(self, slot: Slot, spec: Spec, extent: Extent, target: Tensor) -> Read:
        wanted = {one for key in slot.keys for one in self.reductions.get(key, ())} if self.reductions else None
        if not wanted or not RangeOver.takes(target.dtype) or not (target.dim() and target.numel()):
            return Read(extent, spec.dtype, target)
        axes = {one: None if one.axis is None else one.axis % target.dim() for one in wanted}
        found = {one: RangeOver(target, axis, one.group) for one, axis in axes.items()}
        self.staged.ranges.update({one: (slot, over) for one, over in found.items()})

        def each(first: int, end: int) -> None:
            for over in found.values():
                over.look(first, end)

        return Read(extent, spec.dtype, target, each)

    def _device(self, slot: Slot) -> torch.device:
        """Where the model has the tensor, or will have it."""
        target = slot.tensor
        return self.reading.device if target.is_meta else target.device

    def _is_in_place(self, slot: Slot) -> bool:
        return self.reading.inplace and slot.is_parameter and not slot.tensor.is_meta

    def _compare(self, key: str, slot: Slot, source: str) -> None:
        """Names that the model ties must have one value in the source."""
        first = self.origin[slot.key]
        if first == source or same_values(self._read(first), self._read(source)):
            return
        detail = f"{first} and {source} differ, and the model ties {' and '.join(slot.keys[:2])}"
        self.problems.append(Problem(ProblemKind.MISMATCHED, key, detail, f"drop={source!r} keeps the other one"))

    def _take(self, key: str, slot: Slot, value: Tensor) -> None:
        """Take a tensor that has been read."""
        target, staged = slot.tensor, self.staged
        device = self._device(slot)
        if value.dtype != target.dtype:
            loss = cast_loss(value, target.dtype)
            if loss is not None and loss.fatal:
                remedy = "prepare the model in the file's dtype"
                self.problems.append(Problem(ProblemKind.LOSSY, key, loss.text, remedy))
                return
            if loss is not None:
                staged.losses[key] = loss.text
        if self._is_in_place(slot):
            staged.copies.append((target.data, value))
            return
        like = target if not target.is_meta else None
        fresh = empty_like_spec(tuple(value.shape), target.dtype, device, like)
        staged.tensors[slot.key] = fresh
        self.copies.append((fresh, value))

    def _read(self, source: str) -> Tensor:
        """One tensor with memory of its own; whatever goes wrong is a :class:`CheckpointError`."""
        name = self.source.checkpoint.name
        try:
            value = self.source.read(source)
        except CompatError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"the tensor cannot be read: {type(error).__name__}: {error}", file=name, key=source
            ) from error
        if value.layout is not torch.strided or value.is_meta or value.is_quantized:
            kind = "meta" if value.is_meta else "quantized" if value.is_quantized else str(value.layout)
            raise CheckpointError(
                "the tensor holds no plain values",
                file=name,
                key=source,
                expected="a dense tensor with data",
                found=f"a {kind} tensor",
                remedy="save a dense, dequantized tensor under this name, or drop= it",
            )
        return value
