"""Brevitas.

What is known here, and what it rests on (brevitas 0.13.4):

* Float names stay. Quantizers are `weight_quant` and `bias_quant`, `input_quant` and `output_quant` of a layer, and
  `act_quant` of an activation (`QuantReLU`, `QuantIdentity`), whose module is the tensor that it quantizes.
* By default the scale of a weight is computed from it in every forward and is no state. With parameter scaling it is
  `weight_quant.tensor_quant.scaling_impl.value`. That of an activation is below `fused_activation_quant_proxy`.
* `scaling_impl.value` is a *threshold*, not a scale: see :mod:`qat_compat.conventions`. Older files say
  `learned_value`.
* A value from statistics starts as 1 (a zero point as 0) and is multiplied by (added to) the statistic once: for a
  weight in its first forward (`init_done`), for an activation when statistics have been collected in training mode for
  `collect_stats_steps` steps (`counter`) or `calibration_mode` ends. Until then `state_dict` does not hold it; the
  buffer that statistics are collected in is never held.
* `calibration_mode` collects without quantizing: `observer_only` on activations, `disable_quant` on parameters, no
  quantized tensors between layers, a true mean over all batches.
* A bit width that is learnt is a setting of the quantizer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qat_compat.errors import CompatError
from qat_compat.frameworks.base import ModelView, Quantizer
from qat_compat.frameworks.brevitas_proxy import Proxy, is_proxy, role_of
from qat_compat.frameworks.key_tables import KeyedFramework, Place, site_of
from qat_compat.schema import Entry, Spec
from qat_compat.state import modules_like, split_path

__all__ = ["Brevitas"]

KINDS: Mapping[str, str] = {
    "weight_quant":  "weight",
    "bias_quant":    "bias",
    "input_quant":   "input",
    "output_quant":  "output",
    "act_quant":     "output",
}  # fmt: skip

_QUANTIZER = re.compile(
    r"(?:(?P<host>.+?)\.)?(?P<kind>weight_quant|bias_quant|input_quant|output_quant|act_quant)"
    r"\.(?P<leaf>(?:fused_activation_quant_proxy\.)?(?:tensor_quant|export_handler|activation_impl)\..+)$"
)


class Brevitas(KeyedFramework):
    """Brevitas."""

    name = "brevitas"

    # --- models -----------------------------------------------------------------------------------------------------

    def owns_model(self, view: ModelView) -> bool:
        return any(is_proxy(module) for module in view.kinds)

    def quantizers(self, view: ModelView) -> list[Quantizer]:
        listed = modules_like(view.model, is_proxy)
        compiled = [names[0] for names, module in listed if _is_scripted(module)]
        if compiled:
            raise CompatError(
                "the model's quantizers are TorchScript modules, whose switches cannot be read",
                key=compiled[0],
                expected="a Brevitas model made without its JIT",
                remedy="set BREVITAS_JIT=0 before brevitas is imported",
            )
        found: list[Quantizer] = []
        for names, module in listed:
            host = split_path(names[0])[0]
            found.append(Proxy(names, module, _site(names[0]), view.modules[host], host))
        return found

    def leaf_entry(self, quantizer: Quantizer, leaf: str, key: str, spec: Spec) -> Entry | None:
        assert isinstance(quantizer, Proxy)
        if leaf not in quantizer.leaves:
            return None
        hidden = not quantizer.has_value(leaf)
        return Entry(quantizer.site, role_of(leaf), *spec, quantizer.name, leaf, hidden=hidden)

    @contextmanager
    def evaluation(self, model: nn.Module) -> Iterator[Callable[..., Any]]:
        """Eval mode, with those quantizers that listen in training mode and no quantized tensors between layers."""
        modules: list[Any] = [module for module in model.modules() if hasattr(module, "return_quant_tensor")]
        returning = [(module, module.return_quant_tensor) for module in modules]
        with super().evaluation(model) as call:
            for module in model.modules():
                if is_proxy(module) and any(getattr(part, "observer_only", False) for part in module.modules()):
                    module.train()
            try:
                for module, _ in returning:
                    module.return_quant_tensor = False
                yield call
            finally:
                for module, before in returning:
                    module.return_quant_tensor = before

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def place(self, key: str, spec: Spec) -> Place | None:
        if "_quant." not in key or (found := _QUANTIZER.match(key)) is None:
            return None
        quantizer = key[: found.start("leaf") - 1]
        return Place(quantizer, site_of(KINDS[found["kind"]], found["host"] or ""), found["leaf"], role_of(key))


def _is_scripted(module: nn.Module) -> bool:
    return any(isinstance(part, torch.jit.ScriptModule) for part in module.modules())


def _site(path: str) -> str:
    host, name = split_path(path)
    return site_of(KINDS[name], host) if name in KINDS else f"graph:{path}"
