"""The QAT frameworks that the package knows, one file each, and the two questions that the engine asks of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from qat_compat.errors import CompatError
from qat_compat.frameworks.aimet import AIMET
from qat_compat.frameworks.base import (
    Beside,
    Framework,
    KeyView,
    ModelView,
    Needs,
    Quantizer,
    Reduction,
    drifts,
    plain_entry,
)
from qat_compat.frameworks.bitsandbytes import BitsAndBytes
from qat_compat.frameworks.brevitas import Brevitas
from qat_compat.frameworks.compressed_tensors import CompressedTensors
from qat_compat.frameworks.converted import Converted
from qat_compat.frameworks.converted_pt2e import ConvertedPT2E
from qat_compat.frameworks.converted_torchao import ConvertedTorchAO
from qat_compat.frameworks.fx import FX
from qat_compat.frameworks.gptq import GPTQ
from qat_compat.frameworks.modelopt import CompressedModelOpt, ModelOpt
from qat_compat.frameworks.modelopt_export import ModelOptExport
from qat_compat.frameworks.nncf import NNCF
from qat_compat.frameworks.pt2e import PT2E
from qat_compat.frameworks.pytorch_quantization import PytorchQuantization
from qat_compat.frameworks.sparseml import QuantWrapped, SparseML
from qat_compat.frameworks.torch_ao import FusedAlone, TorchAO
from qat_compat.frameworks.torchao import TorchAOQAT
from qat_compat.memory import read_numbers
from qat_compat.schema import Entry, Fused, Role, Schema, Spec
from qat_compat.state import collect_slots, has_extra_state, join_path, modules_of, split_path

__all__ = [
    "FRAMEWORKS",
    "Description",
    "KeyView",
    "Needs",
    "Quantizer",
    "Reduction",
    "beside",
    "compute_all_qparams",
    "describe_keys",
    "describe_model",
    "doubtful",
    "drifts",
    "is_consulted",
    "observing_in_training",
    "same_flow",
    "with_sites",
]

# The first that owns a model or a checkpoint describes it. Integers come first, so that what was converted only in part
# is never taken for prepared; what extends another framework stands before it.
FRAMEWORKS: tuple[Framework, ...] = (
    GPTQ(),
    BitsAndBytes(),
    Converted(),
    ConvertedPT2E(),
    ConvertedTorchAO(),
    PT2E(),
    FX(),
    SparseML(),
    QuantWrapped(),
    TorchAO(),
    TorchAOQAT(),
    PytorchQuantization(),
    CompressedModelOpt(),
    ModelOptExport(),
    ModelOpt(),
    Brevitas(),
    AIMET(),
    NNCF(),
    CompressedTensors(),
    FusedAlone(),
)


_CONSULTING = tuple(one for one in FRAMEWORKS if type(one).consults is not Framework.consults)
_FLOWS = {framework.name: framework.extends or framework.name for framework in FRAMEWORKS}


def same_flow(source: Schema, target: Schema) -> bool:
    """Whether quantizers of the two have the same modules under the same names.

    Example:
        >>> same_flow(Schema({}, "sparseml"), Schema({}, "torch_ao")), same_flow(Schema({}, "fx"), Schema({}, "pt2e"))
        (True, False)
    """
    return _FLOWS.get(source.framework, source.framework) == _FLOWS.get(target.framework, target.framework)


@dataclass(frozen=True)
class Description:
    """All that is known of a live model: its schema, and the objects behind it."""

    view: ModelView
    schema: Schema
    quantizers: tuple[Quantizer, ...]
    framework: Framework | None


def compute_all_qparams(quantizers: Iterable[Quantizer]) -> None:
    """Compute scale and zero_point of each from what it has observed."""
    for kind, same in _by_class(quantizers).items():
        kind.compute_all_qparams(same)


def doubtful(quantizers: Iterable[Quantizer]) -> list[Quantizer]:
    """Those that need a closer look, in their order."""
    chosen = list(quantizers)
    found = {quantizer for kind, same in _by_class(chosen).items() for quantizer in kind.doubtful(same)}
    return [quantizer for quantizer in chosen if quantizer in found]


def observing_in_training(quantizers: Iterable[Quantizer]) -> frozenset[str]:
    """Names of those that the forwards of a training give a range; one look at all switches."""
    said = {quantizer.name: quantizer.observes_in_training() for quantizer in quantizers}
    switches = {name: one.reshape(()) > 0 for name, one in said.items() if isinstance(one, Tensor)}
    read = dict(zip(switches, read_numbers(list(switches.values())), strict=True))
    return frozenset(name for name, one in said.items() if read.get(name, one))


def _by_class(quantizers: Iterable[Quantizer]) -> dict[type[Quantizer], list[Quantizer]]:
    found: dict[type[Quantizer], list[Quantizer]] = {}
    for quantizer in quantizers:
        found.setdefault(type(quantizer), []).append(quantizer)
    return found


def is_consulted(key: str, spec: Spec) -> bool:
    """Whether some framework needs the numbers in this small tensor to describe the keys.

    Example:
        >>> is_consulted("fc.weight_shape", Spec((2,), torch.int64)), is_consulted("fc.bias", Spec((2,), torch.float32))
        (True, False)
    """
    return any(framework.consults(key, spec) for framework in _CONSULTING)


def describe_keys(view: KeyView) -> Schema:
    """The meaning of every key of a checkpoint, read off its keys and specs alone.

    Example:
        >>> import torch
        >>> spec = Spec((1,), torch.float32)
        >>> describe_keys(KeyView({"fc.weight_fake_quant.scale": spec})).framework
        'torch_ao'
    """
    for framework in FRAMEWORKS:
        if framework.owns_keys(view):
            return framework.describe_keys(view)
    return Schema({key: plain_entry(key, spec) for key, spec in view.specs.items()})


def beside(view: KeyView) -> Beside | None:
    """What a framework's own files beside the weights say, where the keys are its own or of no framework."""
    told = next(((f, found) for f in FRAMEWORKS if (found := f.beside(view)) is not None), None)
    owner = next((f for f in FRAMEWORKS if f.owns_keys(view)), None) if told is not None else None
    return told[1] if told is not None and owner in (None, told[0]) else None


def describe_model(model: nn.Module) -> Description:
    """The meaning of every key of a live model, with its quantizers.

    Example:
        >>> from torch import nn
        >>> description = describe_model(nn.Linear(2, 3))
        >>> list(description.schema), description.schema.framework
        (['weight', 'bias'], 'plain')
    """
    view = ModelView(model, dict(modules_of(model)), collect_slots(model))
    lazy = [key for key, slot in view.slots.items() if is_lazy(slot.tensor)]
    if lazy:
        raise CompatError(
            "the model has lazy modules that are not built yet",
            key=", ".join(lazy[:4]),
            remedy="run one forward first, so that their shapes are known",
        )
    framework = next((f for f in FRAMEWORKS if f.owns_model(view)), None)
    if framework is None:
        schema = Schema(_entries(view, {}, [], ()), non_persistent=_non_persistent(view))
        return Description(view, schema, (), None)
    quantizers = framework.quantizers(view)
    fused = framework.fused(view)
    entries = _entries(view, framework.sites(view), quantizers, fused, framework)
    schema = Schema(
        entries,
        framework.name,
        framework.live_stage,
        tuple(fused),
        frozenset(path for path, module in view.modules.items() if type(module) is nn.Identity),
        _non_persistent(view),
        recorded=True,
        grids={q.name: grid for q in quantizers if (grid := q.grid())},
        unreadable=framework.unreadable(view),
    )
    return Description(view, schema, tuple(quantizers), framework)


def _non_persistent(view: ModelView) -> frozenset[str]:
    return frozenset(key for key, slot in view.slots.items() if not slot.persistent)


def _entries(
    view: ModelView,
    sites: Mapping[str, str],
    quantizers: list[Quantizer],
    fused: tuple[Fused, ...] | list[Fused],
    framework: Framework | None = None,
) -> dict[str, Entry]:
    """One entry per state_dict key, in the order of the state_dict, then the hidden state of each quantizer."""
    prefixes = {one.prefix for one in fused}
    optional = framework.constants(view) if framework is not None else {}
    owners = _quantizer_owners(view, quantizers)
    entries: dict[str, Entry] = {}
    for path, module in view.modules.items():
        owner = owners.get(path)
        site_path = path if not sites or path in prefixes else _rename(path, sites)
        for name in (*module._parameters, *module._buffers):
            key = join_path(path, name)
            slot = view.slots.get(key)
            if slot is None or name in module._non_persistent_buffers_set:
                continue
            tensor = slot.tensors[0]
            spec = Spec(tuple(tensor.shape), tensor.dtype)
            if owner is not None and framework is not None:
                quantizer, root = owner
                entry = framework.leaf_entry(quantizer, key[len(root) + 1 :], key, spec)
                if entry is not None:
                    entries[key] = entry
            else:
                role = Role.PARAMETER if slot.is_parameter else Role.BUFFER
                site = sites.get(key) or join_path(site_path, name)
                entries[key] = Entry(site, role, *spec, optional=optional.get(key, ""))
        if has_extra_state(module):
            name = torch.nn.modules.module._EXTRA_STATE_KEY_SUFFIX
            entries[join_path(path, name)] = Entry(join_path(site_path, name), Role.EXTRA, (), torch.uint8)
    if framework is not None:
        for quantizer in quantizers:
            entries.update(framework.hidden_entries(quantizer))
    return entries


def _quantizer_owners(view: ModelView, quantizers: list[Quantizer]) -> dict[str, tuple[Quantizer, str]]:
    """Module path -> the quantizer that the module is part of, and the name under which that path reaches it."""
    owners: dict[str, tuple[Quantizer, str]] = {}
    for quantizer in quantizers:
        inside = [name for name, _ in quantizer.module.named_modules(remove_duplicate=False)]
        for root in quantizer.names:
            owners.update({join_path(root, name): (quantizer, root) for name in inside})
    return owners


def _rename(path: str, renamed: Mapping[str, str]) -> str:
    """Apply the longest renamed prefix."""
    rest = ""
    current = path
    while current:
        if current in renamed:
            return join_path(renamed[current], rest)
        current, leaf = split_path(current)
        rest = join_path(leaf, rest)
    return path


def with_sites(schema: Schema, sites: Mapping[str, str]) -> Schema:
    """The same schema with the sites that were written down when its file was saved."""
    entries = {key: entry._replace(site=sites[key]) if key in sites else entry for key, entry in schema.entries.items()}
    moved = {split_path(key)[0] for key in sites if key in schema and schema[key].role.is_float_entry}
    return replace(
        schema,
        entries=entries,
        fused=tuple(one for one in schema.fused if one.prefix not in moved),
        recorded=True,
    )
