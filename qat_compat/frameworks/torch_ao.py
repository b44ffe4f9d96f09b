"""torch.ao eager-mode QAT: `fuse_modules_qat` + `prepare_qat`.

What is known here, and what it rests on (torch 2.13):

* A quantizer is a `FakeQuantizeBase` (or a bare observer) at `<m>.weight_fake_quant` or
  `<m>.activation_post_process`; inside a fake-quantizer the observer is again called `activation_post_process`.
* A fused convolution keeps its name, the batch normalization becomes `<conv>.bn`, and an `nn.Identity` stays in its
  place. A module that was fused but not prepared is an `nn.Sequential` of its parts at the convolution's name.
* A fused module quantizes `weight * gamma / sqrt(running_var + eps)` (`_ConvBnNd._forward_approximate`,
  `LinearBn1d.forward`).
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat_compat.errors import Problem, ProblemKind, QParamError
from qat_compat.frameworks.base import (
    Framework,
    KeyView,
    ModelView,
    Needs,
    Quantizer,
    plain_entry,
    tensorless_places,
)
from qat_compat.schema import Entry, Fused, Role, Schema, Spec, Stage
from qat_compat.state import join_path, modules_of, split_path
from qat_compat.trace import followers

__all__ = ["FakeQuant", "TorchAO", "is_fake_quant", "is_observer"]

OBSERVER = "activation_post_process"

# leaf of a quantizer's state -> role; the same table for models and for files
LEAVES: Mapping[str, Role] = {
    "scale":                            Role.SCALE,
    "zero_point":                       Role.ZERO_POINT,
    "fake_quant_enabled":               Role.ENABLED,
    "observer_enabled":                 Role.ENABLED,
    "static_enabled":                   Role.ENABLED,
    "learning_enabled":                 Role.ENABLED,
    "eps":                              Role.EPS,
    "min_val":                          Role.MIN,
    "max_val":                          Role.MAX,
    "histogram":                        Role.HISTOGRAM,
    f"{OBSERVER}.eps":                  Role.EPS,
    f"{OBSERVER}.min_val":              Role.MIN,
    f"{OBSERVER}.max_val":              Role.MAX,
    f"{OBSERVER}.histogram":            Role.HISTOGRAM,
    f"{OBSERVER}.scale":                Role.CONSTANT,
    f"{OBSERVER}.zero_point":           Role.CONSTANT,
}  # fmt: skip

# names of older torch versions -> today's
_OLD_LEAVES = {"min_vals": "min_val", "max_vals": "max_val"}
_OLD_BN_LEAVES = {
    "gamma":               "weight",
    "beta":                "bias",
    "running_mean":        "running_mean",
    "running_var":         "running_var",
    "num_batches_tracked": "num_batches_tracked",
}  # fmt: skip

# a fused kernel and the Python formula differ in the last bits; another grid differs by a factor near 2
_SCALE_TOLERANCE = 0.05

_MIN_MAX_OBSERVERS = frozenset(
    {
        "MinMaxObserver",
        "MovingAverageMinMaxObserver",
        "PerChannelMinMaxObserver",
        "MovingAveragePerChannelMinMaxObserver",
    }
)

_QUANTIZER = re.compile(r"(?:^|\.)(weight_fake_quant|activation_post_process(?:_\d+)?)(?=\.)")


def _has_base(module: object, name: str) -> bool:
    """Whether a class of this name is among the bases; torch.ao and torchao.pt2e have one set of classes each."""
    return any(base.__name__ == name for base in type(module).__mro__)


def is_fake_quant(module: object) -> bool:
    return _has_base(module, "FakeQuantizeBase")


def is_observer(module: object) -> bool:
    return _has_base(module, "ObserverBase")


class FakeQuant(Quantizer):
    """A `FakeQuantizeBase` with its observer, or a bare observer, of torch.ao or torchao's pt2e."""

    def __init__(
        self,
        names: tuple[str, ...],
        module: nn.Module,
        site: str,
        source: Callable[[], Tensor] | None = None,
        channels: int | None = None,
        parameter: str = "",
        factor: Callable[[], Tensor] | None = None,
    ) -> None:
        observer = getattr(module, OBSERVER, module)
        if _has_base(observer, "FixedQParamsObserver"):
            needs = Needs.DEFINITION
        elif source is not None:
            needs = Needs.WEIGHTS
        elif getattr(module, "is_dynamic", False) or not list(observer.buffers(recurse=False)):
            needs = Needs.NOTHING
        else:
            needs = Needs.DATA
        super().__init__(names, module, site, needs, source)
        self.observer: Any = observer
        self._channels = channels
        self._parameter = parameter  # key of the parameter that `source` is made from
        self._factor = factor  # what that parameter is multiplied by on the way, per channel

    @property
    def per_channel(self) -> bool:
        return _has_base(self.observer, "PerChannelMinMaxObserver")

    def channels(self) -> int | None:
        return self._channels if self.per_channel else 1

    def _switch(self, name: str, on: bool) -> None:
        flag = getattr(self.module, name, None)
        if isinstance(flag, Tensor):
            flag.fill_(int(on))

    def hold(self) -> None:
        for name in ("fake_quant_enabled", "observer_enabled", "static_enabled", "learning_enabled"):
            self._switch(name, False)

    def listen(self) -> None:
        low, high = getattr(self.observer, "min_val", None), getattr(self.observer, "max_val", None)
        if isinstance(low, Tensor) and isinstance(high, Tensor):
            # not `reset_min_max_vals`: it puts new CPU tensors in place of buffers that may be elsewhere
            shape = (0,) if self.per_channel else ()
            low.resize_(shape).fill_(float("inf"))
            high.resize_(shape).fill_(float("-inf"))
        histogram = getattr(self.observer, "histogram", None)
        if isinstance(histogram, Tensor):
            histogram.resize_(self.observer.bins).zero_()
        self._switch("observer_enabled", True)
        self._switch("static_enabled", True)

    def observe(self, value: Tensor) -> None:
        if type(self.observer).__name__ not in _MIN_MAX_OBSERVERS or not value.numel():
            self.module(value)
            return
        # what these observers hold after their first tensor is its range; `amin` and `amax` are several times faster
        # than the `aminmax(dim=1)` on a float32 copy that they call, and give the same values
        if self.per_channel:
            axis = self.observer.ch_axis % value.dim()
            others = [dim for dim in range(value.dim()) if dim != axis]
            low, high = (value.amin(others), value.amax(others)) if others else (value, value)
        else:
            low, high = torch.aminmax(value)
        for mine, bound in ((self.observer.min_val, low), (self.observer.max_val, high)):
            mine.resize_(bound.shape).copy_(bound)

    def settle(self) -> None:
        if not hasattr(self.module, "scale"):
            return  # a bare observer: its ranges are its state
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scale, zero_point = self._calculate_qparams()
        self._write(scale, zero_point)

    def _calculate_qparams(self) -> tuple[Tensor, Tensor]:
        # a learnable fake-quantizer's own method returns what it has learnt, not what was observed
        owner: Any = self.observer if hasattr(self.module, "learning_enabled") else self.module
        scale, zero_point = owner.calculate_qparams()
        return scale, zero_point

    def _write(self, scale: Tensor, zero_point: Tensor) -> None:
        module: Any = self.module
        if module.scale is None:
            module._initialize_or_update_qparams(scale, zero_point)
            return
        for mine, value in ((module.scale, scale), (module.zero_point, zero_point)):
            if mine.shape != value.shape:
                mine.data = torch.empty(value.shape, dtype=mine.dtype, device=mine.device)
            mine.data.copy_(value)

    def quantized_parameters(self) -> Mapping[str, Callable[[], Tensor]]:
        return {self._parameter: self._quantized} if self._parameter and self.source is not None else {}

    def _quantized(self) -> Tensor:
        assert self.source is not None
        module: Any = self.module
        if self._untouched():
            raise QParamError(
                "the weight quantizer has seen nothing yet",
                key=self.name,
                remedy="load or calibrate the model first, or take the latent weights",
            )
        # a copy of the module itself: the fused kernel works out a slightly other scale than `calculate_qparams`
        quantizer = copy.deepcopy(module)
        for name, on in (("observer_enabled", 0), ("static_enabled", 0), ("fake_quant_enabled", 1)):
            flag = getattr(quantizer, name, None)
            if isinstance(flag, Tensor):
                flag.fill_(on)
        with torch.no_grad():
            value: Tensor = quantizer(self.source())
            return value if self._factor is None else value / self._factor()

    def ranges(self) -> list[Tensor]:
        found = [getattr(self.observer, name, None) for name in ("min_val", "max_val")]
        return [tensor for tensor in found if isinstance(tensor, Tensor) and tensor.numel()]

    def set_range(self, low: Tensor, high: Tensor) -> None:
        observer = self.observer
        for mine, value in ((observer.min_val, low), (observer.max_val, high)):
            mine.resize_(value.shape).copy_(value)
        if hasattr(self.module, "scale"):
            self._write(*observer._calculate_qparams(observer.min_val, observer.max_val))

    def _untouched(self) -> bool:
        """Whether the quantizer has yet to see its first tensor, so that its scale is the default of 1."""
        low = getattr(self.observer, "min_val", None)
        if not isinstance(low, Tensor):
            return False
        return low.numel() == 0 or bool((low == float("inf")).all())

    def check(self) -> Iterable[Problem]:
        scale, zero_point = getattr(self.module, "scale", None), getattr(self.module, "zero_point", None)
        if not isinstance(scale, Tensor) or not isinstance(zero_point, Tensor):
            return
        key, remedy = f"{self.name}.scale", "calibrate this quantizer anew, or take it from a sound file"
        untouched = self._untouched()
        if not untouched and any(not bool(torch.isfinite(value).all()) for value in self.ranges()):
            yield Problem(ProblemKind.INVALID, self.name, "its min_val or max_val is not finite", remedy)
        bad = int((~torch.isfinite(scale) | (scale <= 0)).sum())
        if bad:
            yield Problem(
                ProblemKind.INVALID, key, f"{bad} of {scale.numel()} scales are not finite and positive", remedy
            )
        qmin, qmax = getattr(self.observer, "quant_min", None), getattr(self.observer, "quant_max", None)
        whole = not zero_point.is_floating_point() or hasattr(self.module, "learning_enabled")
        if whole and qmin is not None and qmax is not None:
            outside = int(((zero_point < qmin) | (zero_point > qmax) | (zero_point != zero_point)).sum())
            if outside:
                yield Problem(
                    ProblemKind.INVALID,
                    f"{self.name}.zero_point",
                    f"{outside} of {zero_point.numel()} are outside [{qmin}, {qmax}]",
                    remedy,
                )
        expected = self.channels()
        if not untouched and expected is not None and scale.numel() != expected:
            detail = f"expected {expected} scale(s), found {scale.numel()}"
            yield Problem(ProblemKind.INVALID, key, detail, remedy)

    def hides_infinity(self) -> bool:
        return _has_base(self.observer, "HistogramObserver")  # it skips inf, and `histc` stops at NaN

    def findings(self) -> Iterable[str]:
        ranges = self.ranges()
        if len(ranges) != 2 or self._untouched():
            return
        flat = int((ranges[0] == ranges[1]).sum())
        if flat:
            yield f"{self.name}: {flat} of {ranges[0].numel()} ranges hold one value only; their scale is a default"
        if self.needs is not Needs.DATA or not hasattr(self.module, "scale") or hasattr(self.observer, "histogram"):
            return
        scale, _ = self._calculate_qparams()
        held: Any = self.module.scale
        if held.shape == scale.shape and bool(((held / scale - 1).abs() > _SCALE_TOLERANCE).any()):
            yield (
                f"{self.name}: scale {float(held.flatten()[0]):.6g} is not what its range gives on this grid"
                f" ({float(scale.flatten()[0]):.6g}): the source had another quantization grid, or never updated it"
            )

    def drift(self) -> float | None:
        ranges = self.ranges()
        if self.source is None or len(ranges) != 2 or self._untouched():
            return None
        seen = float(torch.stack([value.abs().max() for value in ranges]).max())
        with torch.no_grad():
            low, high = torch.aminmax(self.source())
        now = max(-float(low), float(high))
        return now / seen if seen > 0 and now > 0 else None


def quantized_weight(module: nn.Module) -> Tensor:
    """The tensor that a QAT module hands to its weight quantizer.

    Source: `_ConvBnNd._forward_approximate` and `LinearBn1d.forward` of torch 2.13, operation by operation, so that
    the bits are the same.
    """
    owner: Any = module
    weight: Tensor = owner.weight
    return weight * norm_factor(module) if _is_fused_qat(module) else weight


def norm_factor(module: nn.Module) -> Tensor:
    """`gamma / sqrt(running_var + eps)` of a fused module, shaped to multiply its weight."""
    owner: Any = module
    running_std = torch.sqrt(owner.bn.running_var + owner.bn.eps)
    factor: Tensor = owner.bn.weight / running_std
    return factor.reshape([-1] + [1] * (owner.weight.dim() - 1))


def _is_fused_qat(module: nn.Module) -> bool:
    return "weight_fake_quant" in module._modules and isinstance(module._modules.get("bn"), _BatchNorm)


def _is_wrapper(module: nn.Module) -> bool:
    """A `QuantWrapper`, which preparing a model puts around it or around its layers."""
    return _has_base(module, "QuantWrapper")


def _without(path: str, inner: Collection[str]) -> str:
    """A path less the segments that end one of `inner`."""
    parts = path.split(".")
    ends = range(1, len(parts) + 1)
    return ".".join(part for part, end in zip(parts, ends, strict=True) if ".".join(parts[:end]) not in inner)


def _is_fused_float(module: nn.Module) -> bool:
    """A fused module that was not prepared: a Sequential of its float parts."""
    return _has_base(module, "_FusedModule") and "weight" not in module._parameters and "0" in module._modules


class TorchAO(Framework):
    """torch.ao eager mode."""

    name = "torch_ao"

    def owns_model(self, view: ModelView) -> bool:
        return any(is_fake_quant(m) or is_observer(m) for m in view.modules.values())

    # --- models -----------------------------------------------------------------------------------------------------

    def quantizers(self, view: ModelView) -> list[Quantizer]:
        names: dict[int, list[str]] = {}
        modules: dict[int, nn.Module] = {}
        for path, module in modules_of(view.model):
            inside = is_observer(module) and is_fake_quant(view.modules.get(split_path(path)[0]))
            if (is_fake_quant(module) or is_observer(module)) and not inside:
                names.setdefault(id(module), []).append(path)
                modules[id(module)] = module
        return [self._quantizer(view, tuple(names[ident]), module) for ident, module in modules.items()]

    def _quantizer(self, view: ModelView, names: tuple[str, ...], module: nn.Module) -> FakeQuant:
        parent, leaf = split_path(names[0])
        host = view.modules[parent]
        if leaf == "weight_fake_quant":
            weight: Any = host.weight
            axis = getattr(module, "ch_axis", -1)
            channels = weight.shape[axis] if axis >= 0 else None
            factor = (lambda: norm_factor(host)) if _is_fused_qat(host) else None
            key = join_path(parent, "weight")
            return FakeQuant(names, module, f"weight:{parent}", lambda: quantized_weight(host), channels, key, factor)
        return FakeQuant(names, module, f"output:{parent}")

    def leaf_entry(self, quantizer: Quantizer, leaf: str, key: str, spec: Spec) -> Entry:
        role = LEAVES.get(leaf, Role.BUFFER)
        if quantizer.needs is Needs.DEFINITION and role in (Role.SCALE, Role.ZERO_POINT):
            role = Role.CONSTANT
        return Entry(quantizer.site, role, spec.shape, spec.dtype, quantizer.name, leaf)

    def sites(self, view: ModelView) -> Mapping[str, str]:
        inner = {join_path(path, "module") for path, module in view.modules.items() if _is_wrapper(module)}
        found = {path: _without(path, inner) for path in inner}
        for path, module in view.modules.items():
            if _is_fused_float(module):
                found[join_path(path, "0")] = _without(path, inner)
        return found

    def fused(self, view: ModelView) -> list[Fused]:
        norms: dict[str, tuple[str, int]] = {}  # prefix of the norm -> host, how many modules were fused after the host
        for path, module in view.modules.items():
            if _is_fused_qat(module):
                norms[join_path(path, "bn")] = (path, 2 if "ReLU" in type(module).__name__ else 1)
            elif _is_fused_float(module) and isinstance(module._modules.get("1"), _BatchNorm):
                norms[join_path(path, "1")] = (path, len(module._modules) - 1)
        chains = self.chains(view, [host for host, _ in norms.values()])
        return [
            self._fused(view.modules[prefix], prefix, host, chains.get(host, ()), length)
            for prefix, (host, length) in norms.items()
        ]

    def chains(self, view: ModelView, hosts: list[str]) -> Mapping[str, tuple[str, ...]]:
        """Host -> the places that fusion left empty and that the model calls on its output."""
        leaves = [view.modules[host] for host in hosts]
        leaves += [m for m in view.modules.values() if is_fake_quant(m) or is_observer(m)]
        return followers(view.model, hosts, leaves, is_empty_place)

    def _fused(self, norm: nn.Module, prefix: str, host: str, chain: tuple[str, ...], length: int) -> Fused:
        # the norm comes first of those fused into the host; identities of the model's own may stand anywhere in the
        # chain
        candidates = chain[: max(1, len(chain) - length + 1)]
        tensors = [n for n, t in (*norm._parameters.items(), *norm._buffers.items()) if t is not None]
        channels: Any = norm.num_features
        return Fused(prefix, host, channels, tuple(tensors), candidates, "trace of the prepared model")

    def before_norm(self, host: nn.Module, value: Tensor) -> Tensor | None:
        owner: Any = host
        if _is_fused_float(host):
            first: Tensor = owner[0](value)
            return first
        if isinstance(host, nn.Linear):
            return nn.functional.linear(value, host.weight, host.bias)
        if hasattr(host, "_conv_forward"):
            before: Tensor = owner._conv_forward(value, owner.weight, owner.bias)
            return before
        return None

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def owns_keys(self, view: KeyView) -> bool:
        return any(_QUANTIZER.search(key) for key in view.specs)

    def describe_keys(self, view: KeyView) -> Schema:
        entries: dict[str, Entry] = {}
        hosts: set[str] = set()
        for key, spec in view.specs.items():
            match = _QUANTIZER.search(key)
            if match is None:
                continue
            quantizer = key[: match.end()]
            parent, name = split_path(quantizer)
            parts = key[match.end() + 1 :].split(".")
            leaf = ".".join([*parts[:-1], _OLD_LEAVES.get(parts[-1], parts[-1])])
            kind = "weight" if name == "weight_fake_quant" else "output"
            if kind == "weight":
                hosts.add(parent)
            site = f"{kind}:{parent}" if parent or name == OBSERVER else f"graph:{name}"
            entries[key] = Entry(site, LEAVES.get(leaf, Role.BUFFER), *spec, quantizer, leaf)
        norms: dict[str, dict[str, Spec]] = {}
        for key, spec in view.specs.items():
            if key in entries:
                continue
            site = self._float_site(key, view, hosts)
            entries[key] = plain_entry(site, spec)
            parent, leaf = split_path(site)
            if split_path(parent)[1] == "bn" and split_path(parent)[0] in hosts:
                norms.setdefault(parent, {})[leaf] = spec
        ordered = {key: entries[key] for key in view.specs}
        places = tensorless_places(view)
        fused = [self._fused_keys(prefix, split_path(prefix)[0], tensors, True) for prefix, tensors in norms.items()]
        fused += self._perhaps_fused(ordered)
        return Schema(ordered, self.name, Stage.PREPARED, tuple(fused), places)

    @staticmethod
    def _fused_keys(prefix: str, host: str, tensors: Mapping[str, Spec], certain: bool) -> Fused:
        channels = max(spec.shape[0] for spec in tensors.values() if spec.shape)
        return Fused(prefix, host, channels, tuple(tensors), certain=certain)

    def _perhaps_fused(self, entries: Mapping[str, Entry]) -> list[Fused]:
        """`conv.0` and `conv.1` without quantizers: fused and not prepared, or a Sequential; the keys do not tell."""
        norms: dict[str, dict[str, Spec]] = {}
        for key, entry in entries.items():
            parent, leaf = split_path(key)
            host, child = split_path(parent)
            if child == "1" and not entry.quantizer and join_path(host, "0", "weight") in entries:
                norms.setdefault(parent, {})[leaf] = entry.spec
        return [
            self._fused_keys(prefix, split_path(prefix)[0], tensors, False)
            for prefix, tensors in norms.items()
            if "running_mean" in tensors and not _is_quantized(entries, join_path(split_path(prefix)[0], "0"))
        ]

    @staticmethod
    def _float_site(key: str, view: KeyView, hosts: set[str]) -> str:
        """Today's name of a float tensor; ConvBn modules of torch 1.x kept the norm's tensors as their own."""
        parent, leaf = split_path(key)
        if parent in hosts and leaf in _OLD_BN_LEAVES and join_path(parent, "weight") in view.specs:
            return join_path(parent, "bn", _OLD_BN_LEAVES[leaf])
        return key


def _is_quantized(entries: Mapping[str, Entry], path: str) -> bool:
    return any(join_path(path, "weight_fake_quant", leaf) in entries for leaf in ("scale", "fake_quant_enabled"))


def is_empty_place(module: nn.Module) -> bool:
    return type(module) is nn.Identity
