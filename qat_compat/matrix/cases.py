"""One cell of the matrix with the objects that it stands for."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qat_compat.devices import forked_rng
from qat_compat.matrix.containers import CONTAINERS
from qat_compat.matrix.flows import Flow, NotApplicable
from qat_compat.testing import QATModel, assert_same_state, scramble
from qat_compat.testing.comparison import output_tensors

__all__ = ["AXES", "DTYPES", "Case", "Cell", "Refused"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

P = ParamSpec("P")
T = TypeVar("T")


class Refused(Exception):
    """The framework itself cannot do what the cell asks of it; this package was not called."""


@dataclass(frozen=True)
class Cell:
    """One value of every axis.

    Example:
        >>> cell = Cell("unet", "fx-x86", "load", "pt", "per_channel", "fp32", "cpu")
        >>> cell.id
        'fx-x86/load/pt/per_channel/fp32/cpu'
    """

    model: str
    flow: str
    direction: str
    container: str
    granularity: str
    dtype: str
    device: str

    @property
    def id(self) -> str:
        """Its name in a test id, where the model stands in front of it."""
        return "/".join((self.flow, self.direction, self.container, self.granularity, self.dtype, self.device))


AXES = tuple(axis.name for axis in fields(Cell))


@contextmanager
def framework_side() -> Iterator[None]:
    """What fails here fails without this package."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (Refused, NotApplicable):
        raise
    except Exception as error:  # whatever a framework raises is its own answer, and is shown as such
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split()) or "no message"
        raise Refused(
            f"the framework refuses: {type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"
        ) from error


def native(call: Callable[P, T]) -> Callable[P, T]:
    """Mark a method as the framework's own side."""

    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with framework_side():
            return call(*args, **kwargs)

    return run


@dataclass
class Case:
    """What the check of one cell works with.

    Args:
        cell: The cell.
        declared: Its model, as declared.
        flow: Its flow.
        donor: The flow that a QAT state of another flow comes from.
        folder: An empty folder.
    """

    cell: Cell
    declared: QATModel
    flow: Flow
    donor: Flow
    folder: Path
    inputs: Any = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = self.declared.inputs
        device = torch.device(self.cell.device)
        if device.type != "cpu":
            self.declared = _on_device(self.declared, device)

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """The float state_dict that everything starts from."""
        dtype = DTYPES[self.cell.dtype]
        state = self.declared.state()
        if dtype is torch.float32:
            return state
        return {key: value.to(dtype) if value.dtype is torch.float32 else value for key, value in state.items()}

    @cached_property
    def batches(self) -> list[Any]:
        return self.declared.batches()

    @cached_property
    def witness(self) -> Mapping[str, Any]:
        """Load options that the names of this model make necessary, and the user's own."""
        options: dict[str, Any] = {} if self.inputs is None else {"inputs": self.inputs}
        return options | ({"float_model": self.declared.make()} if self.declared.witness else {})

    @native
    def prepared(self, model: nn.Module, flow: Flow | None = None) -> nn.Module:
        """A float model as the flow prepares it."""
        flow = flow or self.flow
        grains = flow.prepare
        prepare = grains.get(self.cell.granularity) or next(iter(grains.values()))
        return prepare(model, self.declared)

    @native
    def calibrated(self, flow: Flow | None = None) -> nn.Module:
        """The twin: loaded as float, prepared, calibrated, all of it by the framework."""
        model = self.declared.make()
        model.load_state_dict(self.state)
        model = self.prepared(model, flow)
        (flow or self.flow).calibrate(model, self.batches, self.inputs)
        return model

    def repeatable(self) -> None:
        """See that the framework's own result is the same twice, without which nothing can be told from it.

        Raises:
            Refused: It is not.
        """
        try:
            assert_same_state(self.calibrated(), self.calibrated())
        except AssertionError as error:
            raise Refused(f"the framework's own calibration is not the same twice: {error}") from None

    @native
    def trained(self, model: nn.Module) -> nn.Module:
        """The same model after a training step."""
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.is_floating_point()], lr=1e-4)
        args, kwargs = self.declared.arguments(model, self.batches[0])
        with forked_rng():
            torch.manual_seed(0)
            outputs = [o for o in output_tensors(model(*args, **kwargs)) if o.requires_grad]
            torch.stack([output.float().square().mean() for output in outputs]).sum().backward()  # type: ignore[no-untyped-call]
        # Gradients through random weights may be of any size; ranges that do not move would be of no use after them.
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return model

    @native
    def converted(self, model: nn.Module) -> nn.Module:
        """The framework's own model of integers."""
        assert self.flow.convert is not None
        return self.flow.convert(model, self.declared, self.cell.granularity)

    @native
    def written(self, state: Mapping[str, Any]) -> Any:
        """The state_dict in the cell's container."""
        return CONTAINERS[self.cell.container].write(state, self.folder)

    def fresh(self) -> nn.Module:
        """A prepared model with other weights, so that nothing in it is right by chance."""
        return self.prepared(scramble(self.declared.make()))


def _on_device(declared: QATModel, device: torch.device) -> QATModel:
    def moved(value: Any) -> Any:
        return pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, value)

    return replace(
        declared,
        build=lambda: declared.build().to(device),
        example=lambda: moved(declared._example()),
        calibration=None if declared.calibration is None else moved(list(declared.calibration)),
    )
