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

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat_compat.derived import weight_like, weight_of
from qat_compat.frameworks.base import (
    Framework,
    KeyView,
    ModelView,
    Needs,
    Quantizer,
    plain_entry,
    tensorless_places,
)
from qat_compat.frameworks.fake_quant import FakeQuant
from qat_compat.frameworks.fake_quant_names import (
    LEAVES,
    OBSERVER,
    has_base,
    is_fake_quant,
    is_observer,
    quantizer_of,
    quantizers_of,
)
from qat_compat.frameworks.torch_ao_lstm import is_lstm, lstm_name
from qat_compat.schema import Entry, Fused, Role, Schema, Spec, Stage
from qat_compat.state import join_path, modules_of, split_path
from qat_compat.trace import followers

__all__ = ["FusedAlone", "TorchAO"]

# names of older torch versions -> today's
_OLD_BN_LEAVES = {
    "gamma":               "weight",
    "beta":                "bias",
    "running_mean":        "running_mean",
    "running_var":         "running_var",
    "num_batches_tracked": "num_batches_tracked",
}  # fmt: skip


# what tells from keys that a normalization is fused into a module; that of torch 1.x had its tensors as its own
_NORM_TENSORS = ("bn.running_mean", "gamma")
# a fused module quantizes its weight times what the normalization will multiply it by: another tensor than its weight
_BEFORE_NORM = "+bn"


def quantized_weight(module: nn.Module) -> Tensor:
    """The tensor that a QAT module hands to its weight quantizer.

    Source: `_ConvBnNd._forward_approximate` and `LinearBn1d.forward` of torch 2.13, operation by operation, so that
    the bits are the same.
    """
    weight = weight_of(module)
    return weight * norm_factor(module) if _is_fused_qat(module) else weight


def norm_factor(module: nn.Module) -> Tensor:
    """`gamma / sqrt(running_var + eps)` of a fused module, shaped to multiply its weight."""
    owner: Any = module
    running_std = torch.sqrt(owner.bn.running_var + owner.bn.eps)
    factor: Tensor = owner.bn.weight / running_std
    return factor.reshape([-1] + [1] * (weight_like(module).dim() - 1))


def _is_fused_qat(module: nn.Module) -> bool:
    return "weight_fake_quant" in module._modules and isinstance(module._modules.get("bn"), _BatchNorm)


def fused_after(module: nn.Module) -> str:
    """What a fused module does after its host, so that the site of its output names one tensor in every flow.

    Example:
        >>> import torch.ao.nn.intrinsic.qat as nniqat
        >>> qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
        >>> fused_after(nniqat.ConvBnReLU2d(1, 2, 1, qconfig=qconfig)), fused_after(nn.Conv2d(1, 2, 1))
        ('+bn+relu', '')
    """
    kind = type(module)
    if not kind.__module__.startswith("torch.ao.nn.intrinsic."):
        return ""
    return ("+bn" if "Bn" in kind.__name__ else "") + ("+relu" if "ReLU" in kind.__name__ else "")


def _is_wrapper(module: nn.Module) -> bool:
    """A `QuantWrapper`, which preparing a model puts around it or around its layers."""
    return has_base(module, "QuantWrapper")


def _without(path: str, inner: Collection[str]) -> str:
    """A path less the segments that end one of `inner`."""
    parts = path.split(".")
    ends = range(1, len(parts) + 1)
    return ".".join(part for part, end in zip(parts, ends, strict=True) if ".".join(parts[:end]) not in inner)


def _is_fused_float(module: nn.Module) -> bool:
    """A fused module that was not prepared: a Sequential of its float parts."""
    return has_base(module, "_FusedModule") and "weight" not in module._parameters and "0" in module._modules


class TorchAO(Framework):
    """torch.ao eager mode."""

    name = "torch_ao"

    def owns_model(self, view: ModelView) -> bool:
        return any(is_fake_quant(m) or is_observer(m) for m in view.kinds)

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
            weight = weight_like(host)
            axis = getattr(module, "ch_axis", -1)
            channels = weight.shape[axis] if axis >= 0 else None
            factor = (lambda: norm_factor(host)) if _is_fused_qat(host) else None
            key = join_path(parent, "weight")
            site = f"weight:{parent}{_BEFORE_NORM if factor else ''}"
            return FakeQuant(names, module, site, lambda: quantized_weight(host), channels, key, factor)
        return FakeQuant(names, module, f"output:{parent}{fused_after(host)}")

    def leaf_entry(self, quantizer: Quantizer, leaf: str, key: str, spec: Spec) -> Entry:
        role = LEAVES.get(leaf, Role.BUFFER)
        if quantizer.needs is Needs.DEFINITION and role in (Role.SCALE, Role.ZERO_POINT):
            role = Role.CONSTANT
        return Entry(quantizer.site, role, spec.shape, spec.dtype, quantizer.name, leaf)

    def hidden_entries(self, quantizer: Quantizer) -> Iterator[tuple[str, Entry]]:
        assert isinstance(quantizer, FakeQuant)
        for leaf, shape in quantizer.absent():
            spec = Spec(shape, torch.float32)
            yield (
                join_path(quantizer.name, leaf),
                Entry(quantizer.site, LEAVES[leaf], *spec, quantizer.name, leaf, hidden=True),
            )

    def sites(self, view: ModelView) -> Mapping[str, str]:
        inner = {join_path(path, "module") for path, module in view.modules.items() if _is_wrapper(module)}
        found = {path: _without(path, inner) for path in inner}
        for path, module in view.modules.items():
            if _is_fused_float(module):
                found[join_path(path, "0")] = _without(path, inner)
            elif is_lstm(module):
                keys = [join_path(path, name) for name, _ in module.named_parameters(remove_duplicate=False)]
                found.update({key: name for key in keys if (name := lstm_name(_without(key, inner)))})
        return found

    def fused(self, view: ModelView) -> list[Fused]:
        norms: dict[str, tuple[str, int]] = {}  # prefix of the norm -> host, how many modules were fused after the host
        for path, module in view.modules.items():
            if _is_fused_qat(module):
                norms[join_path(path, "bn")] = (path, 2 if "ReLU" in type(module).__name__ else 1)
            elif _is_fused_float(module) and isinstance(module._modules.get("1"), _BatchNorm):
                norms[join_path(path, "1")] = (path, len(module._modules) - 1)
        # a model is traced only where some key does not tell
        chains = cache(lambda: self.chains(view, [host for host, _ in norms.values()]))
        return [self._fused(view, prefix, host, chains, length) for prefix, (host, length) in norms.items()]

    def chains(self, view: ModelView, hosts: list[str]) -> Mapping[str, tuple[str, ...]]:
        """Host -> the places that fusion left empty and that the model calls on its output."""
        leaves = [view.modules[host] for host in hosts]
        leaves += [m for m in view.modules.values() if is_fake_quant(m) or is_observer(m)]
        return followers(view.model, hosts, leaves, is_empty_place)

    def _fused(
        self, view: ModelView, prefix: str, host: str, chains: Callable[[], Mapping[str, tuple[str, ...]]], length: int
    ) -> Fused:
        def candidates() -> tuple[str, ...]:
            # the norm comes first of those fused into the host; identities of the model's own may stand anywhere in the
            # chain
            chain = chains().get(host, ())
            return chain[: max(1, len(chain) - length + 1)]

        norm: Any = view.modules[prefix]
        tensors = [n for n, t in (*norm._parameters.items(), *norm._buffers.items()) if t is not None]
        return Fused(prefix, host, norm.num_features, tuple(tensors), candidates, "trace of the prepared model")

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
        return any(quantizer_of(key) for key, _ in view.kinds)

    def describe_keys(self, view: KeyView) -> Schema:
        entries: dict[str, Entry] = {}
        hosts: set[str] = set()
        known = quantizers_of(view.specs)
        for key, spec in view.specs.items():
            found = quantizer_of(key, known)
            if found is None:
                continue
            quantizer, leaf = found
            parent, name = split_path(quantizer)
            kind = "weight" if name == "weight_fake_quant" else "output"
            if kind == "weight":
                hosts.add(parent)
            if kind == "weight" and any(join_path(parent, name) in view.specs for name in _NORM_TENSORS):
                parent += _BEFORE_NORM
            site = f"{kind}:{parent}" if parent or name == OBSERVER else f"graph:{name}"
            entries[key] = Entry(site, LEAVES.get(leaf, Role.CONSTANT), *spec, quantizer, leaf)
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
        channels = max((spec.shape[0] for spec in tensors.values() if spec.shape), default=0)
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
        return lstm_name(key) or key


class FusedAlone(TorchAO):
    """A model that is fused and holds no quantizer, yet or ever: fusion alone gives its parts other names."""

    def owns_model(self, view: ModelView) -> bool:
        return any(map(_is_fused_float, view.kinds))

    def owns_keys(self, view: KeyView) -> bool:
        return False  # its keys are those of a Sequential


def _is_quantized(entries: Mapping[str, Entry], path: str) -> bool:
    return any(join_path(path, "weight_fake_quant", leaf) in entries for leaf in ("scale", "fake_quant_enabled"))


def is_empty_place(module: nn.Module) -> bool:
    return type(module) is nn.Identity
