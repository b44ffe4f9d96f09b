"""NNCF for PyTorch, 2.x and 3.x.

What is known here, and what it rests on (nncf 3.4; state_dicts in the tests of nncf 2.x):

* 3.x keeps the float names. Quantizers are hooks on the operations of a forward:
  `__nncf_hooks.pre_hooks.<operation>__<port>.<n>` before an input and `post_hooks` after an output. An operation is
  `<module>/<function>/<call>`, with `:` for `.` in the module's path; a model's input is its name alone.
  Input 1 of a convolution or linear layer is its weight.
* 2.x puts `nncf_module.` before every name. The quantizer of a weight is `<m>.pre_ops.<n>.op`; those of activations
  are in `external_quantizers` (once `activation_quantizers`), named by their place in the traced graph.
* Symmetric quantizers have `scale` (a largest magnitude) and `signed_tensor`, asymmetric ones `input_low` and
  `input_range`. Before 2.x saved by these names it used `_scale_param_storage` and `_input_range_param_storage`.
* `nncf_padding_value` is a setting of a convolution.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from qat_compat.frameworks.base import KeyView
from qat_compat.frameworks.key_tables import KeyedFramework, Place, site_of
from qat_compat.schema import Role, Spec

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
    "signed_tensor":               Role.CONSTANT,
    "_num_bits":                   Role.CONSTANT,
}  # fmt: skip

_HOOK = re.compile(r"(?:.+\.)?__nncf_hooks\.(?P<when>pre|post)_hooks\.(?P<op>.+)__(?P<port>\d+)\.\d+\.(?P<leaf>\w+)$")
_PRE_OP = re.compile(r"(?:(?P<host>.+)\.)?pre_ops\.(?P<n>\d+)\.op\.(?P<leaf>\w+)$")
_EXTERNAL = re.compile(r"(?:.+\.)?(?:external|activation)_quantizers\.(?P<where>.+)\.(?P<leaf>\w+)$")
_WEIGHTED = ("conv", "linear", "embedding", "addmm", "matmul")


class NNCF(KeyedFramework):
    """NNCF."""

    name = "nncf"

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


def _own_name(name: str) -> str:
    return name.removeprefix("nncf_module.")


def _hooked(op: str, port: str, when: str) -> str:
    module, _, rest = op.replace(":", ".").partition("/")
    function = rest.partition("/")[0]
    if not rest and when == "post":  # a placeholder of the forward, or a parameter by its own name
        host, _, leaf = module.rpartition(".")
        return site_of("weight", host) if leaf == "weight" else site_of("input", module)
    if when == "pre" and port == "1" and module and function.startswith(_WEIGHTED):
        return site_of("weight", module)
    return site_of("input" if when == "pre" else "output", module or function, port)
