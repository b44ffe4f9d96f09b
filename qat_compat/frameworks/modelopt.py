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

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qat_compat.conventions import Grid
from qat_compat.encodings import Encoded, as_amax
from qat_compat.frameworks.base import KeyView, ModelView, Needs, Quantizer
from qat_compat.frameworks.key_tables import KeyedFramework, Place, site_of
from qat_compat.frameworks.modelopt_quantizer import (
    TURNED,
    AmaxQuantizer,
    Settings,
    is_quantizer,
    is_turned,
    settings_from,
)
from qat_compat.schema import Entry, Role, Spec, Stage
from qat_compat.state import join_path, modules_like, split_path

__all__ = ["CompressedModelOpt", "ModelOpt", "settings_of"]

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
        found.update({name: settings_from(one) for name, one in quantizers.items() if "_num_bits" in one})
    return found


class ModelOpt(KeyedFramework):
    """NVIDIA ModelOpt."""

    name = "modelopt"

    # --- models -----------------------------------------------------------------------------------------------------

    def owns_model(self, view: ModelView) -> bool:
        return any(is_quantizer(module) for module in view.kinds)

    def quantizers(self, view: ModelView) -> list[Quantizer]:
        algorithm = _algorithm(view)
        listed = modules_like(view.model, is_quantizer)
        found = {id(module): AmaxQuantizer(names, module, _site(names[0]), algorithm) for names, module in listed}
        _find_weights(view, found)
        lazy = not any("_amax" in module._buffers for _, module in listed)
        for quantizer in found.values():
            quantizer.lazy = lazy
        return list(found.values())

    def unreadable(self, view: ModelView) -> Mapping[str, str]:
        turned = [path for path, module in view.modules.items() if is_turned(module)]
        return {join_path(path, "weight"): TURNED for path in turned}

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
            getattr(module, "_dequantize", False) for module in view.modules.values() if is_quantizer(module)
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
                    found[id(module)].take_weight(source, host, join_path(path, name) if name else "", whole)
