"""A calibration that is kept: ranges of every activation quantizer, saved once and used again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from qat_compat.casting import bits_of
from qat_compat.driving import Data, Inputs, check_data, drive
from qat_compat.errors import CalibrationError, CheckpointError
from qat_compat.frameworks import Description, Needs, describe_model
from qat_compat.memory import read_numbers
from qat_compat.names import by_form, canonical
from qat_compat.qparams import STATISTICS
from qat_compat.storage import open_source, save
from qat_compat.transaction import rehearsal

__all__ = ["Calibration", "calibrate", "fingerprint"]

_KIND = "qat_compat.calibration"
_BLOCK = 1 << 18  # elements that are added up at a time


@dataclass(frozen=True, eq=False)
class Calibration:
    """State of the activation quantizers of one model with one set of weights.

    Args:
        tensors: Key of a quantizer's state -> value.
        statistic: The statistic that chose the ranges.
        batches: Number of batches seen (0 where a callable ran the model).
        weights: Fingerprint of the float weights that the ranges belong to.
    """

    tensors: Mapping[str, Tensor]
    statistic: str
    batches: int
    weights: str

    def of(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """What is held for the keys of a model, which may be under other wrappers than the one that was calibrated.

        Names are the same without wrapper segments only where nothing else is called so on either side: a part of a
        model may have a wrapper's name.
        """
        mine, theirs = by_form(keys), by_form(self.tensors)
        found: dict[str, Tensor] = {}
        for form, names in mine.items():
            held = theirs.get(form, [])
            if set(names) <= set(held):
                found.update((name, self.tensors[name]) for name in names)
            elif len(names) == len(held) == 1:
                found[names[0]] = self.tensors[held[0]]
        return found

    def save(self, path: str | PathLike[str]) -> Path:
        """Write to a file that :meth:`load`, and `calibration=path`, read.

        Raises:
            SaveError: The file cannot be written; what stood there is still there.
        """
        about = {"kind": _KIND, "statistic": self.statistic, "batches": self.batches, "weights": self.weights}
        return save(self.tensors, path, record=about)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: The file is something else.
        """
        checkpoint = open_source(path)
        about = checkpoint.record
        if about.get("kind") != _KIND:
            raise CheckpointError(
                "this is not a saved calibration",
                file=path,
                expected="a file written by Calibration.save",
                found=f"a checkpoint of {len(checkpoint)} tensors",
                remedy="make one with qat_compat.calibrate(model, batches).save(path)",
            )
        try:
            told = str(about["statistic"]), int(about["batches"]), str(about["weights"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                "the record of the saved calibration is malformed",
                file=path,
                expected="its statistic, its number of batches and the fingerprint of the weights",
                found=f"{type(error).__name__}: {error}",
                remedy="make it again with qat_compat.calibrate(model, batches).save(path)",
            ) from error
        return cls({key: checkpoint[key].clone() for key in checkpoint}, *told)


def calibrate(model: nn.Module, data: Data, *, inputs: Inputs | None = None, statistic: str = "native") -> Calibration:
    """Find the ranges of every activation quantizer of a prepared model; the model stays as it is.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.ao.quantization as tq
        >>> model = nn.Sequential(tq.QuantStub(), nn.Linear(4, 2))
        >>> model.qconfig = tq.get_default_qat_qconfig("x86")
        >>> model = tq.prepare_qat(model.train())
        >>> calibration = calibrate(model, [torch.ones(3, 4)])
        >>> calibration.batches, sorted(calibration.tensors)[0]
        (1, '0.activation_post_process.activation_post_process.max_val')

    Args:
        model: A QAT-prepared model that holds the weights the ranges are for.
        data: Batches, or a callable that is given the model in eval mode and runs it.
        inputs: `callable(batch) -> (args, kwargs)`.
        statistic: "native", "percentile", "mse" or "entropy".

    Raises:
        CalibrationError: See :func:`qat_compat.driving.drive`; also a model without activation quantizers.
    """
    check_statistic(statistic)
    if not isinstance(model, nn.Module):
        raise CalibrationError(
            "this is no model", key="model", expected="a QAT-prepared module", found=type(model).__name__
        )
    check_data(data, "data", "an iterable of batches or a callable(model)")
    description = describe_model(model)
    chosen = [q for q in description.quantizers if q.needs in (Needs.DATA, Needs.NOTHING)]
    if not any(q.needs is Needs.DATA for q in chosen):
        raise CalibrationError(
            f"{type(model).__name__} has no quantizer that data could calibrate",
            expected="a QAT-prepared model with static activation quantizers",
            found=f"{len(description.quantizers)} quantizers",
        )
    with rehearsal(description):
        # what quantizes a weight while data runs changes what the others see
        weights = [q for q in description.quantizers if q.needs is Needs.WEIGHTS and not q.needs_no_forward()]
        batches = drive(description, [*weights, *chosen], data, inputs=inputs, statistic=statistic)
        names = {q.name for q in chosen}
        tensors = {
            key: _current(description, key).detach().clone()
            for key, entry in description.schema.items()
            if entry.quantizer in names and entry.role.is_observed
        }
    return Calibration(tensors, statistic, batches, fingerprint(description))


def _current(description: Description, key: str) -> Tensor:
    """The value that a quantizer's tensor has now, also where the quantizer put another tensor in its place."""
    slot = description.view.slots.get(key)
    if slot is not None and not slot.is_parameter:
        module, name = slot.owners[0]
        value = module._buffers[name]
        assert value is not None
        return value
    parent, _, leaf = key.rpartition(".")
    value = getattr(description.view.modules[parent], leaf)
    assert isinstance(value, Tensor)
    return value


def fingerprint(description: Description) -> str:
    """A digest of the bits of the float tensors.

    It does not depend on wrappers, on the order of keys, on the device or on the number of threads: the sums in it are
    of integers, which are the same in any order.
    """
    slots = description.view.slots
    held = {key: slots[key].tensor for key in description.schema.float_keys() if key in slots}
    held = {key: value for key, value in held.items() if not value.is_meta and value.is_floating_point()}
    with torch.no_grad():
        sums = read_numbers([_sums(value.reshape(-1)) for value in held.values()])
    rows = [
        f"{canonical(key)}={value.dtype},{value.numel()},{total},{ramped}"
        for (key, value), (total, ramped) in zip(held.items(), sums, strict=True)
    ]
    return hashlib.blake2b("\n".join(sorted(rows)).encode(), digest_size=16).hexdigest()


def _sums(values: Tensor) -> Tensor:
    """Sums, modulo 2**64, of elements read as integers, and of these times their place, so that their order counts:
    two int64."""
    bits = bits_of(values)
    place = torch.arange(1, 1 + min(_BLOCK, len(bits)), device=bits.device)
    sums = torch.zeros(2, dtype=torch.int64, device=bits.device)
    for number, block in enumerate(torch.split(bits, _BLOCK)):  # in the cache, and without a copy of the whole
        block = block.long()
        total = block.sum()
        sums += torch.stack([total, (block * place[: len(block)]).sum() + number * _BLOCK * total])
    return sums


def check_statistic(statistic: str) -> None:
    if statistic not in STATISTICS:
        raise CalibrationError("unknown statistic", key="statistic", expected=" | ".join(STATISTICS), found=statistic)
