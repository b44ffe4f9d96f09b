"""NVIDIA ModelOpt: `mtq.quantize`, its `mto.save` files, and Ultralytics' ranges beside a plain module.

What is known here, and what it rests on (nvidia-modelopt 0.47, `mtq.quantize` with its INT8, FP8, INT4, AWQ,
SmoothQuant, NVFP4 and MX configurations):

* Float names stay. A quantizer is a module whose name ends in `_quantizer`: `input_quantizer`, `weight_quantizer`,
  `output_quantizer`, and those of attention (`q_bmm_quantizer`, `k_bmm_quantizer`, `v_bmm_quantizer`).
  Two in a row (W4A8) are `weight_quantizer.0` and `weight_quantizer.1`.
* `_amax` is the largest magnitude, () or one per channel with its axes kept, (C, 1, 1, 1), or (blocks, 1). It is a
  buffer that comes into being with the first calibration; dynamic quantizers have no state.
* Calibration (`max_calibrate`) switches quantization off and collection on by plain attributes; the range collected so
  far is in a plain object, `_calibrator`. Which algorithm was used is in the model's `_modelopt_state`.
* `_pre_quant_scale` (AWQ, SmoothQuant) multiplies the input, and the stored weight has been divided by it; SVDQuant
  takes a low-rank part out of the weight. These are part of what the layer computes, so that dropping them with the
  quantizer would give a wrong model.
* After `mtq.compress` the weight is packed, and its quantizer has a `_scale`.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qat_compat.conventions import Encoding, Form, Grid
from qat_compat.encodings import Encoded, as_amax
from qat_compat.errors import Problem, ProblemKind, QParamError
from qat_compat.frameworks.base import KeyView, ModelView, Needs, Quantizer
from qat_compat.frameworks.key_tables import KeyedFramework, Place, site_of
from qat_compat.schema import Entry, Role, Spec, Stage
from qat_compat.state import join_path, modules_of, split_path

__all__ = ["CompressedModelOpt", "ModelOpt", "Settings", "amax_shape", "settings_of"]

LEAVES: Mapping[str, Role] = {
    "_amax":            Role.AMAX,
    "_global_amax":     Role.AMAX,
    "_bias_value":      Role.ZERO_POINT,
    "_scale":           Role.SCALE,
    "_double_scale":    Role.SCALE,
    "_zeros":           Role.ZERO_POINT,
    "_pre_quant_scale": Role.SMOOTHING,
    "svdquant_lora_a":  Role.SMOOTHING,
    "svdquant_lora_b":  Role.SMOOTHING,
}  # fmt: skip

_QUANTIZER = re.compile(
    r"(?:(?P<host>.+)\.)?(?P<kind>[A-Za-z]\w*)_quantizer(?:\.\d+)?\.(?P<leaf>_\w+|svdquant_lora_[ab])$"
)
_PLAIN_ALGORITHMS = ("max_calibrate", "_no_calibrate", "quantize")


class Settings(NamedTuple):
    """What a quantizer does with its `_amax`: read off a live quantizer or the state of one in a `mto.save` file.

    Args:
        bits: An integer's, or (exponent, mantissa) of a floating-point format.
        axis: Axes that keep their size in `_amax`; None for one range per tensor.
        unsigned: Whether zero is the lowest level.
        narrow_range: Whether the lowest level is minus the highest.
        block_sizes: Axis -> block size, with "type" ("static" or "dynamic") and "scale_bits"; None without blocks.
        dynamic: Whether ranges are made anew for every tensor.
        enabled: Whether it quantizes at all.
    """

    bits: int | tuple[int, int]
    axis: int | tuple[int, ...] | None
    unsigned: bool
    narrow_range: bool
    block_sizes: Mapping[Any, Any] | None
    dynamic: bool
    enabled: bool

    @property
    def blocks(self) -> Mapping[int, int]:
        """Axis -> size of blocks that have a range each."""
        sizes = self.block_sizes or {}
        if sizes.get("type") == "dynamic":
            return {}
        return {axis: size for axis, size in sizes.items() if isinstance(axis, int) and size is not None}


def _settings(state: Mapping[str, Any]) -> Settings:
    bits, blocks = state["_num_bits"], state.get("_block_sizes")
    return Settings(
        tuple(bits) if isinstance(bits, (tuple, list)) else int(bits),
        state.get("_axis"),
        bool(state.get("_unsigned")),
        bool(state.get("_narrow_range")),
        dict(blocks) if blocks is not None else None,
        bool(state.get("_dynamic")),
        not state.get("_disabled"),
    )


def settings_of(metadata: Mapping[str, Any]) -> dict[str, Settings]:
    """Quantizer name -> settings, from what a `mto.save` file holds beside the weights.

    Example:
        >>> state = {"fc.weight_quantizer": {"_num_bits": 8, "_axis": 0, "_disabled": False}}
        >>> modes = [("quantize", {"config": {}, "metadata": {"quantizer_state": state}})]
        >>> found = settings_of({"modelopt_state": {"modelopt_state_dict": modes}})
        >>> found["fc.weight_quantizer"].bits, found["fc.weight_quantizer"].axis
        (8, 0)

    Args:
        metadata: Of an opened checkpoint; without a `modelopt_state` the result is empty.
    """
    found: dict[str, Settings] = {}
    beside = metadata.get("modelopt")  # where Ultralytics keeps it
    ours = beside.get("modelopt") if isinstance(beside, Mapping) else None
    for _mode, state in (metadata.get("modelopt_state") or ours or {}).get("modelopt_state_dict", ()):
        quantizers = (state.get("metadata") or {}).get("quantizer_state") or {}
        found.update({name: _settings(one) for name, one in quantizers.items() if "_num_bits" in one})
    return found


def amax_shape(shape: tuple[int, ...], settings: Settings) -> tuple[int, ...]:
    """The shape of `_amax` of a tensor: reduced axes are kept with size 1, blocks are counted, one range is ().

    Example:
        >>> int4 = Settings(4, None, False, False, {-1: 128, "type": "static"}, False, True)
        >>> amax_shape((16, 256), int4), amax_shape((16, 256), int4._replace(block_sizes=None, axis=0))
        ((32, 1), (16, 1))

    Source: `TensorQuantizer._setup_for_blockquant` and `reduce_amax` of nvidia-modelopt 0.47.
    """
    blocks = {axis % len(shape): size for axis, size in settings.blocks.items()}
    if list(blocks) == [len(shape) - 1]:
        found = [math.prod(shape[:-1]) * math.ceil(shape[-1] / blocks[len(shape) - 1]), 1]
    elif blocks:
        found = [n for axis, size in enumerate(shape) for n in _split(size, blocks.get(axis))]
    else:
        axes = settings.axis if isinstance(settings.axis, (tuple, list)) else (settings.axis,)
        kept = {axis % len(shape) for axis in axes if axis is not None}
        found = [size if axis in kept else 1 for axis, size in enumerate(shape)]
    return tuple(found) if math.prod(found) > 1 else ()


def _split(size: int, block: int | None) -> tuple[int, ...]:
    return (size,) if block is None else (math.ceil(size / block), 1)


def _is_quantizer(module: nn.Module) -> bool:
    return any(
        base.__name__ == "TensorQuantizer" and base.__module__.startswith("modelopt.") for base in type(module).__mro__
    )


class AmaxQuantizer(Quantizer):
    """A ModelOpt `TensorQuantizer`."""

    def __init__(self, names: tuple[str, ...], module: nn.Module, site: str, algorithm: str) -> None:
        super().__init__(names, module, site, Needs.DATA)
        self.settings = _settings(vars(module))
        self.parameter = ""  # key of the weight that `source` gives
        self.whole: nn.Module = module  # all quantizers in a row
        self.lazy = False  # whether the model has yet to be calibrated
        self._algorithm = algorithm
        self._before: tuple[bool, bool] | None = None
        owner: Any = module
        if not self.settings.enabled or owner._use_constant_amax or owner._constant_amax is not None:
            self.needs = Needs.DEFINITION
        elif self.settings.dynamic or owner.is_mx_format:
            self.needs = Needs.NOTHING

    def take_weight(self, source: Callable[[], Tensor], parameter: str, whole: nn.Module) -> None:
        """Say that this quantizes a tensor of the model's own."""
        self.parameter, self.whole = parameter, whole
        if self.needs is Needs.DATA:
            self.needs, self.source = Needs.WEIGHTS, source

    def _shape(self) -> tuple[int, ...] | None:
        """The shape that `_amax` must have, where that is known without data."""
        if self.source is not None:
            return amax_shape(tuple(self.source().shape), self.settings)
        return () if self.settings.axis is None and not self.settings.blocks else None

    def channels(self) -> int | None:
        shape = self._shape()
        return None if shape is None else math.prod(shape)

    def hold(self) -> None:
        module: Any = self.module
        if self._before is None:
            self._before = module._if_quant, module._if_calib
        module._if_quant = module._if_calib = False

    def listen(self) -> None:
        module: Any = self.module
        # a copy, since what it has collected is no attribute of the module and would outlive a roll-back
        module._calibrator = copy.copy(module._calibrator)
        module._calibrator.reset()
        module._if_calib = True

    def observe(self, value: Tensor) -> None:
        if not bool(torch.isfinite(value).all()):
            raise QParamError("the tensor that it quantizes holds NaN or inf", key=self.name, expected="finite values")
        self.module(value)

    def settle(self) -> None:
        module: Any = self.module
        self._write(module._calibrator.compute_amax())

    def release(self) -> None:
        module: Any = self.module
        if self._before is not None:
            module._if_quant, module._if_calib = self._before
            self._before = None

    def _write(self, value: Tensor) -> None:
        module: Any = self.module
        held = module._buffers.get("_amax")
        if held is not None and held.shape != value.shape:
            del module._buffers["_amax"]
        module.amax = value

    def restore(self, leaf: str, value: Tensor) -> None:
        assert leaf == "_amax"
        shape = self._shape()
        self._write(value if shape is None else value.reshape(shape))

    def set_range(self, low: Tensor, high: Tensor) -> None:
        module: Any = self.module
        self._write(torch.maximum(-low, high).to(module._amax))

    def takes_range(self) -> bool:
        return self._shape() == ()

    def ranges(self) -> list[Tensor]:
        seen = getattr(getattr(self.module, "_calibrator", None), "_calib_amax", None)
        return [seen] if isinstance(seen, Tensor) else []

    def hides_infinity(self) -> bool:
        return True  # its calibrator stops at NaN and inf with an assertion

    def refusal(self) -> str:
        module: Any = self.module
        if self._algorithm not in _PLAIN_ALGORITHMS:
            name = self._algorithm.removesuffix("_calibrate")
            return f"the model was calibrated with {name!r}, which the engine does not run; it runs 'max'"
        if type(module._calibrator).__name__ != "MaxCalibrator":
            return f"its calibrator is a {type(module._calibrator).__name__}, not a MaxCalibrator"
        if module._bias is not None:
            return "it has an affine bias, which the engine does not calibrate"
        if module.is_nvfp4_static or getattr(module, "_global_amax", None) is not None:
            return "its blocks share a second range, which the engine does not calibrate"
        return ""

    def check(self) -> Iterable[Problem]:
        module: Any = self.module
        amax = module._buffers.get("_amax")
        if amax is None:
            return
        key, remedy = f"{self.name}._amax", "calibrate this quantizer anew, or take it from a sound file"
        bad = int((~torch.isfinite(amax) | (amax < 0)).sum())
        if bad:
            yield Problem(ProblemKind.INVALID, key, f"{bad} of {amax.numel()} are negative or not finite", remedy)
        expected = self._shape()
        if expected is not None and tuple(amax.shape) != expected:
            detail = f"expected the shape {list(expected)}, found {list(amax.shape)}"
            yield Problem(ProblemKind.INVALID, key, detail, remedy)

    def form(self) -> Form | None:
        module: Any = self.module
        bits, dynamic = self.settings.bits, (self.settings.block_sizes or {}).get("type") == "dynamic"
        if not isinstance(bits, int) or dynamic or module._bias is not None:
            return None
        grid = Grid(bits, not self.settings.unsigned, self.settings.narrow_range)
        return Form("modelopt.int", grid, {"_amax": "_amax"})

    def declines(self) -> str:
        bits = self.settings.bits
        if not isinstance(bits, int):
            return f"its levels are floating-point numbers, E{bits[0]}M{bits[1]}"
        return super().declines()

    def encoding(self) -> Encoding | None:
        amax = self.module._buffers.get("_amax")
        if amax is None:
            return None
        blocks = self.settings.block_sizes or {}
        if self.settings.bits == (4, 3) and blocks.get("type") != "dynamic":
            return Encoding("modelopt.e4m3", {"_amax": amax}, Grid(8))
        return super().encoding()

    def drift(self) -> float | None:
        amax = self.module._buffers.get("_amax")
        if self.source is None or amax is None:
            return None
        seen = float(amax.max())
        with torch.no_grad():
            now = float(self.source().abs().max())
        return now / seen if seen > 0 and now > 0 else None

    def quantized_parameters(self) -> Mapping[str, Callable[[], Tensor]]:
        return {self.parameter: self._quantized} if self.source is not None else {}

    def _quantized(self) -> Tensor:
        assert self.source is not None
        if not any("_amax" in module._buffers for module in self.whole.modules()):
            raise QParamError(
                "the weight quantizer has seen nothing yet",
                key=self.name,
                remedy="load or calibrate the model first, or take the latent weights",
            )
        with torch.no_grad():
            value: Tensor = copy.deepcopy(self.whole)(self.source())
        return value


class ModelOpt(KeyedFramework):
    """NVIDIA ModelOpt."""

    name = "modelopt"

    # --- models -----------------------------------------------------------------------------------------------------

    def owns_model(self, view: ModelView) -> bool:
        return any(_is_quantizer(module) for module in view.kinds)

    def quantizers(self, view: ModelView) -> list[Quantizer]:
        names: dict[int, list[str]] = {}
        modules: dict[int, nn.Module] = {}
        for path, module in modules_of(view.model):
            if _is_quantizer(module):
                names.setdefault(id(module), []).append(path)
                modules[id(module)] = module
        algorithm = _algorithm(view)
        found = {
            ident: AmaxQuantizer(tuple(names[ident]), module, _site(names[ident][0]), algorithm)
            for ident, module in modules.items()
        }
        _find_weights(view, found)
        lazy = not any("_amax" in module._buffers for module in modules.values())
        for quantizer in found.values():
            quantizer.lazy = lazy
        return list(found.values())

    def leaf_entry(self, quantizer: Quantizer, leaf: str, key: str, spec: Spec) -> Entry:
        return Entry(quantizer.site, LEAVES.get(leaf, Role.CONSTANT), *spec, quantizer.name, leaf)

    def hidden_entries(self, quantizer: Quantizer) -> Iterable[tuple[str, Entry]]:
        """`_amax`, which does not exist before the first calibration."""
        assert isinstance(quantizer, AmaxQuantizer)
        if quantizer.lazy and quantizer.needs in (Needs.WEIGHTS, Needs.DATA):
            dtype = quantizer.source().dtype if quantizer.source is not None else torch.float32
            spec = Spec(quantizer._shape() or (), dtype)
            key = join_path(quantizer.name, "_amax")
            yield key, Entry(quantizer.site, Role.AMAX, *spec, quantizer.name, "_amax", hidden=True)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def encodings(self, view: KeyView) -> Iterable[Encoded]:
        """The largest magnitudes of integer quantizers; the number of bits is beside the weights, or nowhere."""
        settings = settings_of(view.metadata)
        for key, spec in view.specs.items():
            place = self.place(key, spec)
            if place is None or place.leaf != "_amax" or f"{place.quantizer}._global_amax" in view.specs:
                continue
            known = settings.get(place.quantizer)
            if known is None:
                yield Encoded(place.quantizer, place.site, "modelopt.int", [key], as_amax, spec, None)
            elif isinstance(known.bits, int):
                grid = Grid(known.bits, not known.unsigned, known.narrow_range)
                yield Encoded(place.quantizer, place.site, "modelopt.int", [key], as_amax, spec, grid)

    def place(self, key: str, spec: Spec) -> Place | None:
        if "_quantizer." not in key or (found := _QUANTIZER.match(key)) is None:
            return None
        role = LEAVES.get(found["leaf"])
        if role is None:
            return None
        quantizer = key[: found.start("leaf") - 1]
        return Place(quantizer, site_of(found["kind"], found["host"] or ""), found["leaf"], role)


class CompressedModelOpt(ModelOpt):
    """ModelOpt after `mtq.compress`: packed weights."""

    live_stage = Stage.CONVERTED

    def owns_model(self, view: ModelView) -> bool:
        return super().owns_model(view) and any(
            getattr(module, "_dequantize", False) for module in view.modules.values() if _is_quantizer(module)
        )

    def owns_keys(self, view: Any) -> bool:
        return False  # its files are told from others by the dtype of their weights


def _site(path: str) -> str:
    found = _QUANTIZER.match(f"{path}._amax")
    return site_of(found["kind"], found["host"] or "") if found is not None else f"graph:{path}"


def _algorithm(view: ModelView) -> str:
    """The mode that calibrated the model last, as ModelOpt records it: `max_calibrate`, `awq_lite_calibrate`, ..."""
    modes = [mode for module in view.modules.values() for mode, _ in getattr(module, "_modelopt_state", ())]
    return next((mode for mode in reversed(modes) if mode.endswith("_calibrate")), "quantize")


def _find_weights(view: ModelView, found: Mapping[int, AmaxQuantizer]) -> None:
    """Tell the quantizers of weights what they quantize, by ModelOpt's own list of each module's weights."""
    for path, host in view.modules.items():
        listed: Any = getattr(host, "iter_weights_for_calibration", None)
        if listed is None or split_path(path)[1].endswith("_quantizer"):
            continue
        for index, (weight, whole) in enumerate(listed()):
            name = next((n for n, p in host._parameters.items() if p is weight), "")

            def source(listed: Any = listed, index: int = index) -> Tensor:
                value: Tensor = list(listed())[index][0]
                return value

            for module in whole.modules():
                if id(module) in found:
                    found[id(module)].take_weight(source, join_path(path, name) if name else "", whole)
