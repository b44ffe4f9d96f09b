"""A model that the compatibility matrix is run over, as a test file declares it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat_compat.devices import forked_rng
from qat_compat.testing.modes import DefaultInputs, Inputs
from qat_compat.testing.scrambling import settle

__all__ = ["QATModel", "qat_model"]

Prepare = Callable[[nn.Module], nn.Module]
Fusions = Sequence[Sequence[str]] | Callable[[nn.Module], Sequence[Sequence[str]]]
Weights = str | PathLike[str] | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class QATModel:
    """One model of the matrix.

    In a test file, one of these, or a list of them, stands at the top level; the pytest plugin makes one test per cell.
    :func:`qat_model` makes one from a factory function.

    Example:
        >>> import torch
        >>> mlp = QATModel("mlp", lambda: torch.nn.Linear(4, 2), lambda: torch.randn(3, 4))
        >>> sorted(mlp.state()), mlp.batches()[0].shape
        (['bias', 'weight'], torch.Size([3, 4]))

    Args:
        name: Its name in test ids and reports.
        build: Makes the float model; called several times, each time with the same random seed.
        example: One batch, or a function that makes one from torch's random numbers.
        checkpoint: Float weights, as a file or a state_dict. Without them the weights are random, and batch
            normalizations get statistics from forwards.
        calibration: Batches to calibrate with. Default: two of `example`.
        inputs: `batch -> (args, kwargs)`, as in :func:`qat_compat.load_checkpoint`.
        fuse: What eager mode's `fuse_modules_qat` is told, or a function of the model that gives it.
        skip: Modules that eager and FX mode leave in float.
        flows: Globs of the flows that are tried.
        prepare: Own flows, by name: a function from the float model to the prepared one.
        refused: Glob over `flow/direction/granularity` (or its beginning) -> regex of the error with which the
            framework itself refuses this model. If given, these cells must be refused so, and any other refusal is a
            failure; if not, each is shown as one.
        unsupported: The same for what this package refuses. Such a cell fails once it works; any other refusal of a
            direction that everyone needs is a failure anyway.
        witness: Whether loads are given the float model (`float_model=`), because the names alone do not tell.
    """

    name: str
    build: Callable[[], nn.Module]
    example: Any
    checkpoint: Weights | None = None
    calibration: Sequence[Any] | None = None
    inputs: Inputs | None = None
    fuse: Fusions = ()
    skip: Sequence[str] = ()
    flows: Sequence[str] = ("*",)
    prepare: Mapping[str, Prepare] = field(default_factory=dict)
    refused: Mapping[str, str] | None = None
    unsupported: Mapping[str, str] = field(default_factory=dict)
    witness: bool = False

    def __call__(self) -> nn.Module:
        return self.make()

    def make(self, seed: int = 0) -> nn.Module:
        """The float model in train mode; equal for equal seeds."""
        with forked_rng():
            torch.manual_seed(seed)
            model = self.build().train()
            settle(model, [self.arguments(model, self._example()) for _ in range(2)])
        return model

    def state(self, seed: int = 1) -> dict[str, Tensor]:
        """The float state_dict that is loaded: of the checkpoint, or one that `make()` does not have by itself."""
        model = self.make(seed)
        if self.checkpoint is not None:
            model.load_state_dict(_weights(self.checkpoint))
        return {key: copy.deepcopy(value) for key, value in model.state_dict().items()}

    def batches(self, count: int = 2, seed: int = 100) -> list[Any]:
        """What quantizers are calibrated with."""
        if self.calibration is not None:
            return list(self.calibration)
        with forked_rng():
            torch.manual_seed(seed)
            return [self._example() for _ in range(count)]

    def arguments(self, model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What `forward` is called with for a batch."""
        return (self.inputs or DefaultInputs(model))(batch)

    def fusions(self, model: nn.Module) -> list[list[str]]:
        """What `fuse_modules_qat` is told."""
        return [list(names) for names in (self.fuse(model) if callable(self.fuse) else self.fuse)]

    def _example(self) -> Any:
        return self.example() if callable(self.example) else self.example


def qat_model(
    example: Any, *, name: str | None = None, **options: Any
) -> Callable[[Callable[[], nn.Module]], QATModel]:
    """Declare the model that a function makes: the decorator form of :class:`QATModel`.

    Example:
        >>> import torch
        >>> @qat_model(lambda: torch.randn(2, 3, 8, 8), fuse=[["0", "1"]])
        ... def stem():
        ...     return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
        >>> stem.name
        'stem'

    Args:
        example: As in :class:`QATModel`, which also says what `options` are.
        name: Its name in test ids and reports. Default: that of the function.
    """

    def declare(build: Callable[[], nn.Module]) -> QATModel:
        return QATModel(name or build.__name__, build, example, **options)

    return declare


def _weights(checkpoint: Weights) -> Mapping[str, Any]:
    """The float state_dict of a file, by the container's own package where it is nothing but one."""
    if isinstance(checkpoint, Mapping):
        return checkpoint
    path = Path(checkpoint)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    found: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if not all(isinstance(value, Tensor) for value in found.values()):
        raise TypeError(f"{path} holds more than a state_dict: give checkpoint= the part that is one, as a mapping")
    return found
