"""What a framework file must answer about its own framework, and nothing else."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from qat_compat.conventions import Form
from qat_compat.errors import Problem
from qat_compat.memory import read_numbers
from qat_compat.schema import Entry, Fused, Role, Rounding, Schema, Spec, Stage
from qat_compat.state import Slot, split_path

__all__ = [
    "CAPTURED",
    "Beside",
    "Framework",
    "KeyView",
    "ModelView",
    "Needs",
    "Quantizer",
    "Reduction",
    "is_captured",
    "plain_entry",
    "tensorless_places",
    "uncompiled",
]

CAPTURED = "a tensor that the tracer captured: not in the float model's state_dict"
_DIGITS = re.compile(r"\d+")
_NUMBERED = re.compile(r"(?:^|\.)(?:_tensor_constant|_?lifted_tensor_(?:constant)?|_torchbind_obj)\d+$")


class Needs(Enum):
    """What the range of a quantizer depends on."""

    NOTHING = "nothing"  # dynamic: computed anew for every tensor
    DEFINITION = "definition"  # fixed when the quantizer was made
    WEIGHTS = "weights"  # a tensor that the model holds
    DATA = "data"  # what flows through the model


class Reduction(NamedTuple):
    """A parameter whose range is all that a quantizer takes of it.

    Args:
        parameter: Its key.
        axis: The axis that has a range per index; None for one range of all.
        group: Number of neighbours along the last axis that share a range, where they do; `axis` is then None.
    """

    parameter: str
    axis: int | None
    group: int | None = None


class Quantizer(ABC):
    """One quantizer of a live model: how it is cleared, driven, read and checked.

    The engine only calls these methods on tensors that it has put in place of the model's own, so that an error
    leaves the model untouched.

    Args:
        name: The first name of the quantizer module.
        names: Every name that reaches it.
        module: The module itself.
        site: What it quantizes, in the float model's words (`weight:conv1`).
        needs: What its range depends on.
        source: Computes the tensor that it quantizes, where that needs no data.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        module: nn.Module,
        site: str,
        needs: Needs,
        source: Callable[[], Tensor] | None = None,
    ) -> None:
        self.name = names[0]
        self.names = names
        self.module = module
        self.site = site
        self.needs = needs
        self.source = source

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {self.site!r}, needs={self.needs.value})"

    @abstractmethod
    def disable(self) -> None:
        """Neither observe nor quantize."""

    @abstractmethod
    def start_observing(self) -> None:
        """Forget every range and observe; do not quantize, where the framework can tell the two apart."""

    @abstractmethod
    def observe(self, value: Tensor) -> None:
        """See one tensor, as the forward of the model would show it."""

    def reduction(self) -> Reduction | None:
        """What :meth:`observe_range` is enough for in place of :meth:`observe`, where it is."""
        return None

    def observe_range(self, low: Tensor, high: Tensor) -> None:
        """See the range of the parameter that :meth:`reduction` names in place of what :attr:`source` makes of it."""
        raise NotImplementedError(f"{type(self.module).__name__} looks at more than a range")

    def needs_no_forward(self) -> bool:
        """Whether it hands its weight on as it is when it is held, so that it need not run with the data: the range of
        a weight is the same in every batch."""
        return False

    @abstractmethod
    def compute_qparams(self) -> None:
        """Compute scale and zero_point from what was observed and write them to the quantizer's own tensors."""

    @classmethod
    def compute_all_qparams(cls, quantizers: Sequence[Self]) -> None:
        """:meth:`compute_qparams` of each; a device waits less if that can be done for many at once."""
        for quantizer in quantizers:
            quantizer.compute_qparams()

    @abstractmethod
    def ranges(self) -> list[Tensor]:
        """The tensors that hold what was observed; NaN or inf in them means NaN or inf in what was seen."""

    def misshapen(self, leaves: Collection[str]) -> Iterable[Problem]:
        """Say which of these tensors of its state, which a checkpoint gave, have a shape that no quantizer can use."""
        return ()

    @abstractmethod
    def check(self) -> Iterable[Problem]:
        """Say what no quantizer can use: scales, zero points, channel counts."""

    def soundness(self) -> Tensor | None:
        """A 0-dimensional flag: whether :meth:`check` and :meth:`findings` have nothing to say. None where only they
        can tell."""
        return None

    @classmethod
    def doubtful(cls, quantizers: Sequence[Self]) -> list[Self]:
        """Those of which :meth:`check` or :meth:`findings` may have something to say, by one look at all of them."""
        flags = {quantizer: flag for quantizer in quantizers if (flag := quantizer.soundness()) is not None}
        sound = dict(zip(flags, read_numbers(list(flags.values())), strict=True))
        return [quantizer for quantizer in quantizers if not sound.get(quantizer, False)]

    def hides_infinity(self) -> bool:
        """Whether NaN and inf leave no trace in :meth:`ranges`, so that the input itself must be looked at."""
        return False

    def takes_range(self) -> bool:
        """Whether :meth:`set_range` can be used."""
        return type(self).set_range is not Quantizer.set_range

    def findings(self) -> Iterable[str]:
        """What is sound and should still be known: a constant input, say."""
        return ()

    def magnitudes(self) -> tuple[Tensor, Tensor] | None:
        """The largest magnitude in the tensor that a weight quantizer sees, and in the range that it holds: two
        0-dimensional float64, the second one infinite where it has seen nothing."""
        return None

    def observes_in_training(self) -> bool | Tensor:
        """Whether the forwards of a training give it a range, if it has none of the data yet; or the switch, of one
        element, that says so."""
        return True

    def has_moving_average(self) -> bool:
        """Whether its range moves after its weight in training, so that a run may be in a state where it lags far."""
        return False

    def restore_switches(self) -> None:  # noqa: B027  (most frameworks keep their switches in tensors)
        """Put the switches back that :meth:`disable` or :meth:`start_observing` found, where they are no tensors."""

    def state(self, leaf: str, value: Tensor) -> Tensor | None:
        """One tensor of its state as its own `state_dict` would give it; None where that says nothing yet."""
        return value

    def adopt(self, leaves: Collection[str]) -> None:  # noqa: B027  (most frameworks need nothing)
        """Know that these tensors of its state now hold what a checkpoint held, and are not to be made anew."""

    def refusal(self) -> str:
        """Why the engine cannot find this quantizer's range as its framework would, or ""."""
        return ""

    def restore(self, leaf: str, value: Tensor) -> None:
        """Take a value that the model's state_dict does not hold."""
        raise NotImplementedError(f"{type(self.module).__name__} has no hidden state {leaf}")

    def quantized_parameters(self) -> Mapping[str, Callable[[], Tensor]]:
        """Parameter key -> what the quantizer makes of that parameter, in the parameter's own units."""
        return {}

    def grid(self) -> str:
        """Its integers, its zero point and the axis of its ranges, if that is not the first; "" where not known.

        The zero point of `-128..127 symmetric` is 0, of `0..255 centred` in the middle, of `0..255 affine` anywhere.
        """
        return ""

    def compute_range(self) -> None:
        """Set what was observed to the range that scale and zero_point span on the grid."""
        raise NotImplementedError(f"{type(self.module).__name__} keeps no range")

    def roundings(self) -> Mapping[str, Rounding]:
        """Parameter key -> the integers that the quantizer rounds that parameter to, where others can take them."""
        return {}

    def channels(self) -> int | None:
        """Number of scales that the quantizer must have, 1 per tensor, or None where only data can tell."""
        return 1

    def form(self) -> Form | None:
        """How it writes its range down; None where it has none, or none that other frameworks could tell."""
        return None

    def refuses_transfer(self) -> str:
        """Why it takes no range of another framework, whatever that is, or ""."""
        return "its quantizers take no other framework's range" if self.form() is None else ""

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take a range chosen by another statistic than the quantizer's own."""
        raise NotImplementedError(f"{type(self.module).__name__} takes no range from outside")


def drifts(quantizers: Iterable[Quantizer]) -> dict[Quantizer, float]:
    """How many times larger the tensor that a weight quantizer sees is than the range it holds; those are left out of
    which that is not known. One look at all of them."""
    found = {quantizer: pair for quantizer in quantizers if (pair := quantizer.magnitudes()) is not None}
    numbers = read_numbers([torch.stack([now, seen.to(now.device)]) for now, seen in found.values()])
    known = {quantizer: pair for quantizer, pair in zip(found, numbers, strict=True) if pair[0] != 0}
    return {q: now / seen if seen else math.inf for q, (now, seen) in known.items() if seen != math.inf}


@dataclass(frozen=True)
class ModelView:
    """What a framework may look at to describe a model."""

    model: nn.Module
    modules: Mapping[str, nn.Module]
    slots: Mapping[str, Slot]
    cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)  # what a framework worked out once

    @cached_property
    def kinds(self) -> list[nn.Module]:
        """One module of each class: enough to tell whose model it is."""
        return list({type(module): module for module in self.modules.values()}.values())

    @cached_property
    def _devices(self) -> dict[str, torch.device]:
        found: dict[str, torch.device] = {}
        for key, slot in self.slots.items():
            path = key
            while path and (path := split_path(path)[0]) not in found:
                found[path] = slot.tensor.device
        return found

    def device(self, path: str) -> torch.device:
        """Where the tensors of a module are, or, if it has none, those of the closest module around it that has."""
        while path and path not in self._devices:
            path = split_path(path)[0]
        return self._devices.get(path, torch.device("cpu"))


@dataclass(frozen=True)
class KeyView:
    """What a framework may look at to describe a checkpoint: keys, specs, and the few tensors that it consults.

    Args:
        specs: Key -> shape and dtype.
        versions: The `_metadata` of the state_dict, where the file kept it.
        record: What :func:`qat_compat.save_checkpoint` wrote about the keys.
        attributes: Name of a tensor subclass (`fc.weight`) -> `class`, `shape`, `dtype`, `tensors` (part -> key) and
            the attributes of its class, as JSON values; the keys are those of the tensors in it.
        config: `quantization_config` of the `config.json` beside the file.
        metadata: Training state beside the weights, as plain data.
        numbers: Key of a small tensor that a framework consults (`fc.weight_shape`) -> what it holds.
    """

    specs: Mapping[str, Spec]
    versions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @cached_property
    def kinds(self) -> list[tuple[str, Spec]]:
        """One key of each dtype and name, whatever the numbers in it: enough to tell how most layouts name things."""
        found = {(_DIGITS.sub("0", key), spec.dtype): (key, spec) for key, spec in self.specs.items()}
        return list(found.values())


class Beside(NamedTuple):
    """What other files than that of the weights say: as a record of ours would have it, and notes for the report."""

    record: Mapping[str, Any]
    notes: tuple[str, ...] = ()


class Framework(ABC):
    """All that the package knows of one QAT framework."""

    name: str
    live_stage: Stage = Stage.PREPARED  # of a model that it owns
    extends: str = ""  # name of the framework whose modules it wraps: the same state, in other places

    @abstractmethod
    def owns_model(self, view: ModelView) -> bool:
        """Whether the model holds quantizers of this framework."""

    def consults(self, key: str, spec: Spec) -> bool:
        """Whether the keys cannot be described without the numbers in this small tensor."""
        return False

    @abstractmethod
    def owns_keys(self, view: KeyView) -> bool:
        """Whether the keys are laid out as this framework writes them."""

    @abstractmethod
    def describe_keys(self, view: KeyView) -> Schema:
        """The meaning of every key of a checkpoint."""

    @abstractmethod
    def quantizers(self, view: ModelView) -> list[Quantizer]:
        """Every quantizer of the model, each once, in the model's order."""

    def leaf_entry(self, quantizer: Quantizer, leaf: str, key: str, spec: Spec) -> Entry | None:
        """The meaning of one tensor of a quantizer; None for one that is a means and no state."""
        raise NotImplementedError

    def hidden_entries(self, quantizer: Quantizer) -> Iterable[tuple[str, Entry]]:
        """State of the quantizer that the model's state_dict does not hold."""
        return ()

    def sites(self, view: ModelView) -> Mapping[str, str]:
        """Path of a module in the prepared model, or key of a tensor, -> its name in the float model, where the two
        differ."""
        return {}

    def fused(self, view: ModelView) -> list[Fused]:
        """Batch normalizations that fusion moved under another name."""
        return []

    def constants(self, view: ModelView) -> Mapping[str, str]:
        """Keys of the prepared model that the float model's state_dict may lack by design, and why."""
        return {}

    def unreadable(self, view: ModelView) -> Mapping[str, str]:
        """Keys of tensors of the float model that the prepared one holds in another form, and in which."""
        return {}

    def record(self, view: ModelView) -> Mapping[str, Any]:
        """What only the live model tells of its keys, as plain data that a file of it carries along."""
        return {}

    def beside(self, view: KeyView) -> Beside | None:
        """What its own files beside the weights say of them (`view.metadata`), where there are any."""
        return None

    def before_norm(self, host: nn.Module, value: Tensor) -> Tensor | None:
        """What a fused module hands to its normalization for one input, (N, C, ...); None where that is not known."""
        return None

    def notes(self, view: ModelView, float_model: nn.Module | None) -> list[str]:
        """What a user of this model should know and the framework does not say."""
        return []

    @contextmanager
    def evaluation(self, model: nn.Module) -> Iterator[Callable[..., Any]]:
        """A callable that runs the model in eval mode; the model's own modes are as before afterwards."""
        modes = [(module, module.training) for module in model.modules()]
        inner = uncompiled(model)
        if isinstance(inner, nn.DataParallel):
            inner = inner.module  # of its replicas on several devices only the first would keep what it sees
        try:
            inner.eval()
            yield inner
        finally:
            for module, training in modes:
                module.training = training


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given, or the model as it is; a part of it may be called `_orig_mod`, too."""
    compiled = any(kind.__name__ == "OptimizedModule" for kind in type(model).__mro__)
    inner = model._modules.get("_orig_mod") if compiled else None
    return model if inner is None else inner


def is_captured(key: str) -> bool:
    """Whether a tracer gave this name, to a tensor that it met and that had none.

    Example:
        >>> is_captured("_tensor_constant0"), is_captured("block.weight")
        (True, False)
    """
    return _NUMBERED.search(key) is not None


def plain_entry(site: str, spec: Spec) -> Entry:
    """The meaning of a tensor that the float model holds too; by its key, a parameter looks like a buffer."""
    leaf = split_path(site)[1]
    if leaf == "_extra_state":
        return Entry(site, Role.EXTRA, *spec)
    role = Role.BUFFER if leaf in ("running_mean", "running_var", "num_batches_tracked") else Role.PARAMETER
    return Entry(site, role, *spec)


def tensorless_places(view: KeyView) -> frozenset[str]:
    """Modules that the state_dict's own version record lists and that hold no tensor: where fusion left an identity."""
    holding = set()
    for key in view.specs:
        parent = split_path(key)[0]
        while parent and parent not in holding:
            holding.add(parent)
            parent = split_path(parent)[0]
    return frozenset(path for path in view.versions if path and path not in holding)
