"""NNCF for PyTorch, 2.x and 3.x.

What is known here, and what it rests on (nncf 3.4; state_dicts in the tests of nncf 2.x):

* 3.x keeps the float names. Quantizers are hooks on the operations of a forward:
  `__nncf_hooks.pre_hooks.<operation>__<port>.<n>` before an input and `post_hooks` after an output. An operation is
  `<module>/<function>/<call>`, where the module's path is written with `/`; a model's input is its name alone.
  Input 1 of a convolution or linear layer is its weight. What holds modules and is not called itself (a `ModuleList`)
  is left out of the path, with the names in it: `encoder/fc/linear/1` is of the second module in `encoder.layer`.
* 2.x puts `nncf_module.` before every name. The quantizer of a weight is `<m>.pre_ops.<n>.op`; those of activations
  are in `external_quantizers` (once `activation_quantizers`), named by their place in the traced graph.
* Symmetric quantizers have `scale` (a largest magnitude) and `signed_tensor`, asymmetric ones `input_low` and
  `input_range`. In a live quantizer they are `_scale_param_storage` and `_input_range_param_storage`; so they were in
  files before 2.x.
* `nncf_padding_value` is a setting of a convolution.
* Quantizers do not observe. `nncf.quantize` collects minima and maxima of the float model beside them: of weights once,
  of activations the mean over the batches, or the extremes where there is a range per channel; symmetric quantizers
  take the largest magnitude. `calculate_quantizer_parameters` makes the quantizer's parameters of them.
* Whether a weight uses only half of its levels (`overflow_fix`, which depends on the machine) is no state: its scale is
  then 2 * 127 / 127 as large as the weight. By default `nncf.quantize` changes biases, too (`fast_bias_correction`).
* SmoothQuant (`model_type=TRANSFORMER`) divides weights and hooks the factor before their operation (`_scale_value`);
  a LoRA quantizer adds a low-rank product to its weight.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qat_compat.conventions import Encoding, Grid
from qat_compat.errors import CompatError, Problem, ProblemKind, QParamError
from qat_compat.frameworks.base import KeyView, ModelView, Needs, Quantizer
from qat_compat.frameworks.key_tables import KeyedFramework, Place, site_of
from qat_compat.schema import Entry, Role, Spec
from qat_compat.state import join_path, modules_of

__all__ = ["NNCF"]

LEAVES: Mapping[str, Role] = {
    "scale":                       Role.AMAX,
    "_scale":                      Role.SCALE,
    "_scale_param_storage":        Role.AMAX,
    "input_low":                   Role.MIN,
    "input_range":                 Role.MAX,
    "_input_range_param_storage":  Role.MAX,
    "_zero_point":                 Role.ZERO_POINT,
    "enabled":                     Role.ENABLED,
    "signed_tensor":               Role.ZERO_POINT,
    "_scale_value":                Role.SMOOTHING,
    "lora_A":                      Role.SMOOTHING,
    "lora_B":                      Role.SMOOTHING,
    "_num_bits":                   Role.CONSTANT,
}  # fmt: skip

_HOOK = re.compile(r"(?:.+\.)?__nncf_hooks\.(?P<when>pre|post)_hooks\.(?P<op>.+)__(?P<port>\d+)\.\d+\.(?P<leaf>\w+)$")
_PRE_OP = re.compile(r"(?:(?P<host>.+)\.)?pre_ops\.(?P<n>\d+)\.op\.(?P<leaf>\w+)$")
_EXTERNAL = re.compile(r"(?:.+\.)?(?:external|activation)_quantizers\.(?P<where>.+)\.(?P<leaf>\w+)$")
# attribute of a live quantizer -> name that its state_dict gives it
_SAVED = {"_scale_param_storage": "scale", "_input_range_param_storage": "input_range"}
_HALF_RANGE = 2.0
_WEIGHTED = ("conv", "linear", "embedding", "addmm", "matmul")


def _is_quantizer(module: nn.Module) -> bool:
    return any(b.__name__ == "BaseQuantizer" and b.__module__.startswith("nncf.") for b in type(module).__mro__)


class HookQuantizer(Quantizer):
    """A quantizer that NNCF 3.x hooks on an operation."""

    def __init__(self, names: tuple[str, ...], module: nn.Module, site: str, host: nn.Module | None, path: str) -> None:
        source = (lambda: _weight_of(host)) if host is not None else None
        super().__init__(names, module, site, Needs.WEIGHTS if host is not None else Needs.DATA, source)
        owner: Any = module
        self._symmetric = "_scale_param_storage" in module._parameters
        self._shape: tuple[int, ...] = tuple(owner.scale_shape)
        self._parameter = path
        self._half: bool | None = None
        self._low: list[Tensor] = []
        self._high: list[Tensor] = []
        self._hook: Any = None

    def hold(self) -> None:
        owner: Any = self.module
        owner.enabled.fill_(0)

    def listen(self) -> None:
        self._low, self._high = [], []
        if self.source is None and self._hook is None:
            self._hook = self.module.register_forward_pre_hook(lambda _module, args: self.observe(args[0]))

    def release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def observe(self, value: Tensor) -> None:
        if not value.numel():
            return
        with torch._C.DisableTorchFunction():  # NNCF counts the functions that run in a forward
            value = value.detach()
            per_channel = len(self._shape) == value.dim()
            axes = [axis for axis in range(value.dim()) if not per_channel or self._shape[axis] == 1]
            self._low.append(value.amin(axes, keepdim=True))
            self._high.append((value.abs() if self._symmetric else value).amax(axes, keepdim=True))

    def ranges(self) -> list[Tensor]:
        return [*self._low[-1:], *self._high[-1:]]

    def settle(self) -> None:
        if self.source is not None and not self._low:
            self.observe(self.source())
        low, high = torch.stack(self._low), torch.stack(self._high)
        if self.source is not None or low[0].numel() > 1:
            self._write(low.amin(0), high.amax(0))
        else:
            self._write(low.mean(0), high.mean(0))

    def _write(self, low: Tensor, high: Tensor) -> None:
        """Make the quantizer's own parameters, with NNCF's arithmetic."""
        if not bool(torch.isfinite(low).all() and torch.isfinite(high).all()):
            raise QParamError("the tensor that it quantizes holds NaN or inf", key=self.name, expected="finite values")
        found = _parameters(self.module, low, high, half_range=bool(self._half))
        owner: Any = self.module
        eps: float = owner.eps  # a forward adds it again
        lowest, highest = found.input_low.data, found.input_high.data
        if self._symmetric:
            owner.signed_tensor.data = torch.full_like(owner.signed_tensor.data, int(bool((lowest < 0).any())))
            owner._scale_param_storage.data = (highest - eps).reshape(self._shape)
        else:
            owner.input_low.data = lowest.reshape(self._shape)
            owner._input_range_param_storage.data = (highest - lowest - eps).reshape(self._shape)
        owner.set_levels()

    def adopt(self, leaves: Collection[str]) -> None:
        owner: Any = self.module
        owner.set_levels()
        owner.initialized = True

    def refusal(self) -> str:
        if len(self.names) > 1:
            return "it is shared by several operations, whose ranges NNCF unifies by rules that are no state"
        if self.source is None:
            return ""
        ratio = self.drift()
        if ratio is None or not self._symmetric:
            return ""
        reach = 1 / ratio
        if not (0.75 < reach < 1.5 or 0.75 < reach / _HALF_RANGE < 1.5):
            return (
                f"its scale is {reach:.3g} times its weight, so that it does not tell whether half its levels are used"
            )
        self._half = reach > 1.5
        return ""

    def check(self) -> Iterable[Problem]:
        remedy = "calibrate this quantizer anew, or take it from a sound file"
        for leaf in ("_scale_param_storage", "input_low", "_input_range_param_storage"):
            value = self.module._parameters.get(leaf)
            if value is None:
                continue
            key = join_path(self.name, _SAVED.get(leaf, leaf))
            sound = torch.isfinite(value) if leaf == "input_low" else torch.isfinite(value) & (value > 0)
            bad = int((~sound).sum())
            if bad:
                yield Problem(ProblemKind.INVALID, key, f"{bad} of {value.numel()} are not finite and positive", remedy)
            if tuple(value.shape) != self._shape:
                detail = f"expected the shape {list(self._shape)}, found {list(value.shape)}"
                yield Problem(ProblemKind.INVALID, key, detail, remedy)

    def channels(self) -> int | None:
        return torch.Size(self._shape).numel()

    def encoding(self) -> Encoding | None:
        owner: Any = self.module
        names = ("scale",) if self._symmetric else ("input_low", "input_range")
        tensors = {name: getattr(owner, name).detach() for name in names}
        signed = owner.level_low < 0
        grid = Grid(owner.num_bits, signed, signed and -owner.level_low == owner.level_high)
        return Encoding("nncf.symmetric" if self._symmetric else "nncf.asymmetric", tensors, grid)

    def drift(self) -> float | None:
        scale = self.module._parameters.get("_scale_param_storage")
        if self.source is None or scale is None:
            return None
        seen = float(scale.detach().abs().max())
        with torch.no_grad():
            now = float(self.source().abs().max())
        return now / seen if seen > 0 and now > 0 else None

    def quantized_parameters(self) -> Mapping[str, Callable[[], Tensor]]:
        return {self._parameter: self._quantized} if self.source is not None else {}

    def _quantized(self) -> Tensor:
        assert self.source is not None
        with torch.no_grad():
            value: Tensor = self.module(self.source())
        return value


class Factor(Quantizer):
    """What SmoothQuant multiplies an input by; no float model has it."""

    def __init__(self, names: tuple[str, ...], module: nn.Module, site: str) -> None:
        super().__init__(names, module, site, Needs.DEFINITION)

    def hold(self) -> None:
        """It has no switch."""

    def listen(self) -> None:
        """It sees nothing."""

    def observe(self, value: Tensor) -> None:
        """It sees nothing."""

    def settle(self) -> None:
        """It is what it is."""

    def ranges(self) -> list[Tensor]:
        return []

    def check(self) -> Iterable[Problem]:
        return ()


def _weight_of(host: nn.Module) -> Tensor:
    weight: Tensor = host.weight  # type: ignore[assignment]
    return weight


def _parameters(module: nn.Module, low: Tensor, high: Tensor, *, half_range: bool) -> Any:
    """NNCF's `FakeQuantizeParameters` of a range."""
    from nncf.common.quantization.structs import QuantizerConfig, QuantizerGroup
    from nncf.common.tensor_statistics.statistics import MinMaxTensorStatistic
    from nncf.quantization.fake_quantize import calculate_quantizer_parameters
    from nncf.tensor import Tensor as NNCFTensor

    owner: Any = module
    config = QuantizerConfig(
        owner.num_bits,
        owner.get_quantizer_config().mode,
        owner._signedness_to_force,
        low.numel() > 1,
        owner.narrow_range,
    )
    group = QuantizerGroup.WEIGHTS if half_range else QuantizerGroup.ACTIVATIONS
    statistics = MinMaxTensorStatistic(min_values=NNCFTensor(low), max_values=NNCFTensor(high))
    return calculate_quantizer_parameters(statistics, config, group, half_range)


class NNCF(KeyedFramework):
    """NNCF."""

    name = "nncf"

    # --- models -----------------------------------------------------------------------------------------------------

    def owns_model(self, view: ModelView) -> bool:
        return any(_is_quantizer(module) for module in view.modules.values())

    def quantizers(self, view: ModelView) -> list[Quantizer]:
        names: dict[int, list[str]] = {}
        modules: dict[int, Any] = {}
        for path, module in modules_of(view.model):
            if _is_quantizer(module) or "_scale_value" in (*module._parameters, *module._buffers):
                names.setdefault(id(module), []).append(path)
                modules[id(module)] = module
        for ident, module in modules.items():
            if getattr(module, "is_using_log_scale_storage", False):
                raise CompatError(
                    "the quantizer keeps the logarithm of its scale, as NNCF 2.x could",
                    key=names[ident][0],
                    expected="a model that NNCF 3.x quantized",
                    remedy="quantize the float model again",
                )
        found: list[Quantizer] = []
        for ident, module in modules.items():
            site = _site(names[ident][0])
            if not _is_quantizer(module):
                found.append(Factor(tuple(names[ident]), module, site))
                continue
            kind, _, host = site.partition(":")
            owner = view.modules.get(host) if kind == "weight" else None
            weighted = owner if owner is not None and "weight" in owner._parameters else None
            if kind == "weight" and weighted is None:  # its name lacks a part, and could be that of several modules
                site = f"graph:{names[ident][0]}"
            parameter = join_path(host, "weight")
            found.append(HookQuantizer(tuple(names[ident]), module, site, weighted, parameter))
        return found

    def leaf_entry(self, quantizer: Quantizer, leaf: str, key: str, spec: Spec) -> Entry:
        name = _SAVED.get(leaf, leaf)
        return Entry(quantizer.site, LEAVES.get(name, Role.CONSTANT), *spec, quantizer.name, name)

    def notes(self, view: ModelView, float_model: nn.Module | None) -> list[str]:
        return ["biases are those of the source: nncf.quantize would correct them for the quantization of weights"]

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def place(self, key: str, spec: Spec) -> Place | None:
        if found := _HOOK.match(key) if "__nncf_hooks." in key else None:
            site = _hooked(found["op"], found["port"], found["when"])
        elif found := _PRE_OP.match(key) if ".op." in key else None:
            site = f"weight:{_own_name(found['host'] or '')}"
        elif found := _EXTERNAL.match(key) if "|" in key or "nncf" in key else None:
            site = f"graph:{found['where']}"
        elif key.endswith("nncf_padding_value"):
            host = _own_name(key.rpartition(".")[0])
            return Place(host, f"input:{host}", "nncf_padding_value", Role.CONSTANT)
        if found is None:
            return None
        return Place(key[: found.start("leaf") - 1], site, found["leaf"], LEAVES.get(found["leaf"], Role.CONSTANT))

    def float_site(self, key: str, view: KeyView) -> str:
        return _own_name(key)


def _site(path: str) -> str:
    found = _HOOK.match(f"{path}.scale")
    return _hooked(found["op"], found["port"], found["when"]) if found is not None else f"graph:{path}"


def _own_name(name: str) -> str:
    return name.removeprefix("nncf_module.")


def _module_and_function(op: str) -> tuple[str, str]:
    """The path of a module and what it calls: `blocks/0/fc/linear/0` -> `blocks.0.fc`, `linear`."""
    *path, function = op.rpartition("/")[0].replace(":", ".").split("/")
    return ".".join(path), function


def _hooked(op: str, port: str, when: str) -> str:
    if "/" not in op and when == "post":  # a placeholder of the forward, or a parameter by its own name
        host, _, leaf = op.replace(":", ".").rpartition(".")
        return site_of("weight", host) if leaf == "weight" else site_of("input", op)
    module, function = _module_and_function(op)
    if when == "pre" and port == "1" and module and function.startswith(_WEIGHTED):
        return site_of("weight", module)
    return site_of("input" if when == "pre" else "output", module or function, port)
