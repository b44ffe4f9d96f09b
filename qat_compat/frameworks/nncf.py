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
from collections.abc import Mapping

from torch import nn

from qat_compat.errors import CompatError
from qat_compat.frameworks.base import KeyView, ModelView, Quantizer
from qat_compat.frameworks.key_tables import KeyedFramework, Place, site_of
from qat_compat.frameworks.nncf_hooks import SAVED, Factor, HookQuantizer, is_quantizer
from qat_compat.schema import Entry, Role, Spec
from qat_compat.state import join_path, modules_like

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
_WEIGHTED = ("conv", "linear", "embedding", "addmm", "matmul")


def _holds_state(module: nn.Module) -> bool:
    return is_quantizer(module) or "_scale_value" in (*module._parameters, *module._buffers)


class NNCF(KeyedFramework):
    """NNCF."""

    name = "nncf"

    # --- models -----------------------------------------------------------------------------------------------------

    def owns_model(self, view: ModelView) -> bool:
        return any(is_quantizer(module) for module in view.kinds)

    def quantizers(self, view: ModelView) -> list[Quantizer]:
        found: list[Quantizer] = []
        for names, module in modules_like(view.model, _holds_state):
            if getattr(module, "is_using_log_scale_storage", False):
                raise CompatError(
                    "the quantizer keeps the logarithm of its scale, as NNCF 2.x could",
                    key=names[0],
                    expected="a model that NNCF 3.x quantized",
                    remedy="quantize the float model again",
                )
            site = _site(names[0])
            if not is_quantizer(module):
                found.append(Factor(names, module, site))
                continue
            kind, _, host = site.partition(":")
            owner = view.modules.get(host) if kind == "weight" else None
            weighted = owner if owner is not None and "weight" in owner._parameters else None
            if kind == "weight" and weighted is None:  # its name lacks a part, and could be that of several modules
                site = f"graph:{names[0]}"
            parameter = join_path(host, "weight")
            found.append(HookQuantizer(names, module, site, weighted, parameter))
        return found

    def leaf_entry(self, quantizer: Quantizer, leaf: str, key: str, spec: Spec) -> Entry:
        name = SAVED.get(leaf, leaf)
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
