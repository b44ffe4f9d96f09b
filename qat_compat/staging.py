"""Read every tensor of a plan, in the dtype and on the device where it will live; the model is not touched yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qat_compat.casting import cast_loss
from qat_compat.errors import CheckpointError, CompatError, PlanError, Problem, ProblemKind
from qat_compat.frameworks import Description
from qat_compat.memory import copy_all, empty_like_spec
from qat_compat.names import canonical
from qat_compat.plan import Copy, Derive, How, Plan, Synthesize
from qat_compat.schema import Role
from qat_compat.state import Slot

__all__ = ["Reading", "Staged", "stage"]


@dataclass(frozen=True)
class Reading:
    """Where tensors come from and how they are taken.

    Args:
        description: The model that they are for.
        read: Reads one tensor of the source.
        name: The source's name, for errors.
        saved: Canonical key -> value of a saved calibration.
        inplace: Leave parameters to be read straight into the model's own memory.
        mmap: Take file-backed tensors as they are.
        device: Where tensors of a meta-device model are made.
        advance: Called after each tensor.
    """

    description: Description
    read: Callable[[str], Tensor]
    name: str = "<source>"
    saved: Mapping[str, Tensor] = field(default_factory=dict)
    inplace: bool = False
    mmap: bool = False
    device: torch.device | None = None
    advance: Callable[[], None] = lambda: None


@dataclass
class Staged:
    """Values read for a plan, before the model is touched."""

    tensors: dict[str, Tensor] = field(default_factory=dict)  # by first key of the slot
    in_place: dict[str, Tensor] = field(default_factory=dict)  # read, but written only when all else is settled
    hidden: dict[str, Tensor] = field(default_factory=dict)  # state that the state_dict does not hold
    extra: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, str] = field(default_factory=dict)


def stage(plan: Plan, reading: Reading) -> Staged:
    """Read every tensor that the plan copies, in the dtype and on the device where it will live.

    Raises:
        PlanError: Values that a cast would destroy, or tied names with different values.
    """
    schema, slots = reading.description.schema, reading.description.view.slots
    staged = Staged()
    problems: list[Problem] = []
    origin: dict[str, str] = {}
    copies: list[tuple[Tensor, Tensor]] = []
    for step in plan.steps:
        if isinstance(step, Copy) or (isinstance(step, Derive) and step.value):
            origin_key = step.source if isinstance(step, Copy) else step.value
            _stage_one(step.key, origin_key, reading, schema[step.key].role, slots, staged, origin, copies, problems)
            reading.advance()
        elif isinstance(step, Synthesize) and step.how is How.RECORD:
            value = reading.saved[canonical(step.key)]
            slot = slots.get(step.key)
            if slot is None:
                staged.hidden[step.key] = value.clone()
            else:
                staged.tensors[slot.key] = value.to(slot.tensor.device, slot.tensor.dtype, copy=True)
    if problems:
        raise PlanError(problems, file=plan.source)
    copy_all(copies)
    return staged


def _stage_one(
    key: str,
    source: str,
    reading: Reading,
    role: Role,
    slots: Mapping[str, Slot],
    staged: Staged,
    origin: dict[str, str],
    copies: list[tuple[Tensor, Tensor]],
    problems: list[Problem],
) -> None:
    if role is Role.EXTRA:
        staged.extra[key] = reading.read(source)
        return
    value = _read(reading, source)
    slot = slots.get(key)
    if role.is_observed and slot is not None:  # another framework's shape of the same numbers, (C, 1, 1, 1) of (C,)
        value = value.reshape(slot.tensor.shape if value.numel() == slot.tensor.numel() else -1)
    if slot is None:
        staged.hidden[key] = value.clone()
        return
    if slot.key in origin:
        if origin[slot.key] != source and not _equal(_read(reading, origin[slot.key]), value):
            detail = f"{origin[slot.key]} and {source} differ, and the model ties {' and '.join(slot.keys[:2])}"
            problems.append(Problem(ProblemKind.MISMATCHED, key, detail, f"drop={source!r} keeps the other one"))
        return
    origin[slot.key] = source
    target = slot.tensor
    device = target.device if target.device.type != "meta" else reading.device or torch.device("cpu")
    if value.dtype != target.dtype:
        loss = cast_loss(value, target.dtype)
        if loss is not None and loss.fatal:
            problems.append(Problem(ProblemKind.LOSSY, key, loss.text, "prepare the model in the file's dtype"))
            return
        if loss is not None:
            staged.losses[key] = loss.text
    if reading.mmap and value.dtype == target.dtype and value.device == device and value.shape == target.shape:
        staged.tensors[slot.key] = value.detach()
        return
    if reading.inplace and slot.is_parameter and target.device.type != "meta":
        staged.in_place[slot.key] = value
        return
    like = target if target.device.type != "meta" else None
    fresh = empty_like_spec(tuple(value.shape), target.dtype, device, like)
    staged.tensors[slot.key] = fresh
    copies.append((fresh, value))


def _read(reading: Reading, source: str) -> Tensor:
    """One tensor with memory of its own; whatever goes wrong is a :class:`CheckpointError`."""
    try:
        value = reading.read(source)
    except CompatError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the tensor cannot be read: {type(error).__name__}: {error}", file=reading.name, key=source
        ) from error
    if value.layout is not torch.strided or value.is_meta or value.is_quantized:
        kind = "meta" if value.is_meta else "quantized" if value.is_quantized else str(value.layout)
        raise CheckpointError(
            "the tensor holds no plain values",
            file=reading.name,
            key=source,
            expected="a dense tensor with data",
            found=f"a {kind} tensor",
            remedy="save a dense, dequantized tensor under this name, or drop= it",
        )
    return value


def _equal(left: Tensor, right: Tensor) -> bool:
    """Bit for bit, so that NaN equals itself."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if left.is_floating_point():
        return bool(((left == right) | ((left != left) & (right != right))).all())
    return torch.equal(left, right)
