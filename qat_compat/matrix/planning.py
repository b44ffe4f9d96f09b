"""Which cells there are: the values of each axis here and now, what cannot occur and why, and the design over the
rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import product

from torch import nn

from qat_compat.devices import accelerator
from qat_compat.matrix.cases import AXES, DTYPES, Cell
from qat_compat.matrix.containers import CONTAINERS
from qat_compat.matrix.design import Axes, Chosen, Design, Target, covering, pairs, singles
from qat_compat.matrix.directions import DIRECTIONS
from qat_compat.matrix.flows import FLOWS, Flow
from qat_compat.testing import QATModel

__all__ = ["SIZES", "Matrix", "declared_reason", "donor_of", "excluded", "plan_matrix"]

OWN = "own"  # granularity of a flow that a declaration brings along: it is what it is

# size -> what its cells cover
SIZES: Mapping[str, str] = {
    "small": "every flow in every direction, and every value of every axis",
    "full": "every pair of values of two axes that can occur, and a load of every model in every flow",
}


@dataclass(frozen=True)
class Matrix:
    """The cells over the models of one test file.

    Args:
        cells: In the order in which they were made.
        design: What they cover; without the cells that only show a declared refusal.
        flows: Name -> flow, the models' own included.
        absent: Value of an axis that is not here -> why.
    """

    cells: tuple[Cell, ...]
    design: Design
    flows: Mapping[str, Flow]
    absent: Mapping[str, str]


def plan_matrix(models: Sequence[QATModel], size: str, only: Mapping[str, Sequence[str]] | None = None) -> Matrix:
    """The cells of some models.

    Example:
        >>> import torch
        >>> mlp = QATModel("mlp", lambda: torch.nn.Linear(8, 2), lambda: torch.randn(3, 8), flows=["eager-*"])
        >>> matrix = plan_matrix([mlp], "small", {"direction": ["load", "back"]})
        >>> sorted({cell.flow for cell in matrix.cells}), len(matrix.cells)
        (['eager-fbgemm', 'eager-qnnpack', 'eager-x86'], 9)

    Args:
        models: Their declarations.
        size: One of :data:`SIZES`.
        only: Axis -> globs of the values to keep.
    """
    declared = {model.name: model for model in models}
    flows, absent = _flows(models)
    device = accelerator()
    here = {
        "model": list(declared),
        "flow": list(flows),
        "direction": list(DIRECTIONS),
        "container": [name for name, container in CONTAINERS.items() if container.installed],
        "granularity": list(dict.fromkeys(grain for flow in flows.values() for grain in flow.prepare)),
        "dtype": list(DTYPES),
        "device": ["cpu", *([device] if device else [])],
    }
    absent |= {name: f"needs the package {c.needs}" for name, c in CONTAINERS.items() if not c.installed}
    absent |= {} if device else {"cuda": "no such device here"}
    globs = only or {}
    axes = {axis: [value for value in here[axis] if _matches(value, globs.get(axis, ("*",)))] for axis in AXES}
    design = (
        covering(axes, _targets(axes, size), partial(excluded, models=declared, flows=flows))
        if all(axes.values())
        else Design(axes, (), (), ())
    )
    cells = [Cell(**chosen) for chosen in design.cells]
    cells += _probes(axes, declared, flows, size)
    return Matrix(tuple(dict.fromkeys(cells)), design, flows, absent)


def _targets(axes: Axes, size: str) -> Iterator[Target]:
    if size == "small":
        yield from pairs(axes, ("flow", "direction"))
        yield from singles(axes)
        return
    for model, flow in product(axes["model"], axes["flow"]) if "load" in axes["direction"] else ():
        yield ("model", model), ("flow", flow), ("direction", "load")
    yield from pairs(axes)


def donor_of(flow: Flow) -> Flow:
    """The flow that a state of another flow comes from: eager mode's, or FX's for eager mode itself."""
    return FLOWS["fx-x86" if flow.name.startswith("eager-") else "eager-x86"]


def declared_reason(reasons: Mapping[str, str] | None, flow: str, direction: str, granularity: str) -> str | None:
    """The regex that a declaration gives for a flow, a direction and a granularity.

    Example:
        >>> declared_reason({"fx-*": "control flow", "pt2e-*/converted": "LSTM"}, "pt2e-x86", "converted", "per_tensor")
        'LSTM'
    """
    where = f"{flow}/{direction}/{granularity}"
    return next((text for glob, text in (reasons or {}).items() if _matches(where, (glob, f"{glob}/*"))), None)


def _expected(model: QATModel, flow: str, direction: str, granularity: str) -> str | None:
    reasons = (model.refused, model.unsupported)
    return next((text for one in reasons if (text := declared_reason(one, flow, direction, granularity))), None)


def _flows(models: Sequence[QATModel]) -> tuple[dict[str, Flow], dict[str, str]]:
    """The flows that are here, with the models' own, and why others are not."""
    flows = {name: flow for name, flow in FLOWS.items() if not flow.missing}
    absent = {name: f"needs the package {', '.join(f.missing)}" for name, f in FLOWS.items() if f.missing}
    for model in models:
        for name in model.prepare:
            flows[name] = Flow(name, "own", {OWN: partial(_own, name)})
    return flows, absent


def _own(name: str, model: nn.Module, declared: QATModel) -> nn.Module:
    return declared.prepare[name](model)


def _matches(value: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(value, glob) for glob in globs)


def _probes(
    axes: Mapping[str, Sequence[str]], models: Mapping[str, QATModel], flows: Mapping[str, Flow], size: str
) -> Iterator[Cell]:
    """One cell for every declared refusal, so that what has learned to do it is noticed."""
    if size != "full":
        return
    for name, flow in product(axes["model"], axes["flow"]):
        if not _matches(flow, models[name].flows):
            continue
        tried: set[str] = set()
        for direction, grain in product(axes["direction"], flows[flow].prepare):
            reason = _expected(models[name], flow, direction, grain)
            if reason is None or reason in tried or grain not in axes["granularity"]:
                continue
            cell = Cell(name, flow, direction, axes["container"][0], grain, axes["dtype"][0], axes["device"][0])
            if not _convertible(vars(cell), models, flows):
                tried.add(reason)
                yield cell


# --- what cannot occur ------------------------------------------------------------------------------------------------

Rule = Callable[[Chosen, Mapping[str, QATModel], Mapping[str, Flow]], str | None]


def _wanted_flow(chosen: Chosen, models: Mapping[str, QATModel], flows: Mapping[str, Flow]) -> str | None:
    if "model" not in chosen or "flow" not in chosen:
        return None
    model, flow = models[chosen["model"]], flows[chosen["flow"]]
    if OWN in flow.prepare:
        return None if flow.name in model.prepare else "the flow is another model's own"
    if not _matches(flow.name, model.flows):
        return "the model's declaration leaves the flow out"
    if not {"direction", "granularity"} <= set(chosen):
        return None
    declared = _expected(model, flow.name, chosen["direction"], chosen["granularity"])
    return "the declaration says that it is refused" if declared else None


def _own_donor(chosen: Chosen, models: Mapping[str, QATModel], flows: Mapping[str, Flow]) -> str | None:
    if chosen.get("direction") != "transfer" or not {"model", "flow"} <= set(chosen):
        return None
    donor = donor_of(flows[chosen["flow"]])
    refused = declared_reason(models[chosen["model"]].refused, donor.name, "load", next(iter(donor.prepare)))
    return "the flow of origin is refused, as declared" if refused else None


def _granularity(chosen: Chosen, models: Mapping[str, QATModel], flows: Mapping[str, Flow]) -> str | None:
    if "flow" not in chosen or "granularity" not in chosen:
        return None
    return None if chosen["granularity"] in flows[chosen["flow"]].prepare else "the flow has no such granularity"


def _convertible(chosen: Chosen, models: Mapping[str, QATModel], flows: Mapping[str, Flow]) -> str | None:
    if chosen.get("direction") != "converted":
        return None
    if "flow" in chosen and flows[chosen["flow"]].convert is None:
        return "the flow has no model of integers"
    if "container" in chosen and CONTAINERS[chosen["container"]].plain:
        return "the container holds no quantized tensors"
    return "integer kernels run on the CPU" if chosen.get("device", "cpu") != "cpu" else None


def _hidden(chosen: Chosen, models: Mapping[str, QATModel], flows: Mapping[str, Flow]) -> str | None:
    if chosen.get("direction") != "resume" or "flow" not in chosen or not flows[chosen["flow"]].hidden:
        return None
    outside = chosen.get("container", "memory") != "memory"
    return "the framework's state_dict lacks the state of these quantizers" if outside else None


RULES: Sequence[Rule] = (_wanted_flow, _own_donor, _granularity, _convertible, _hidden)


def excluded(chosen: Chosen, models: Mapping[str, QATModel], flows: Mapping[str, Flow]) -> str | None:
    """Why these values, of some axes or of all, cannot occur together."""
    return next((why for rule in RULES if (why := rule(chosen, models, flows))), None)
