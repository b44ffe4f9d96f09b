"""torchao QAT: `quantize_(model, QATConfig(...))`.

What is known here, and what it rests on (torchao 0.18):

* `FakeQuantizedLinear` / `FakeQuantizedEmbedding` keep the names of the float model; their quantizers are
  `weight_fake_quantizer` and `activation_fake_quantizer`.
* A dynamic quantizer has no state at all. A static one (`is_dynamic=False`) computes `scale` and `zero_point` in its
  first forward and keeps them as plain attributes, which no state_dict holds. With range learning they become
  Parameters then (`initialize_fake_quantizers`).
* There is no observer apart from the fake-quantizer: what the quantizers see during calibration is fake-quantized
  upstream, as in torchao's own first forward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qat_compat.derived import weight_like, weight_of
from qat_compat.errors import Problem, ProblemKind, QParamError
from qat_compat.frameworks.base import Framework, KeyView, ModelView, Needs, Quantizer, Reduction, plain_entry
from qat_compat.frameworks.torchao_grids import as_json, rebuilt, rounding
from qat_compat.ranges import RangeOver, value_range
from qat_compat.schema import UNROUNDED, Entry, Role, Rounding, Schema, Spec, Stage
from qat_compat.state import join_path, modules_like, split_path

__all__ = ["TorchAOQAT"]

_WEIGHT = "weight_fake_quantizer"
_ACTIVATION = "activation_fake_quantizer"
_RECORD = "fake_quantizers"  # quantizer -> its config, in the record of a file
_LEAVES: Mapping[str, Role] = {"scale": Role.SCALE, "zero_point": Role.ZERO_POINT}


_LAST = "_maybe_update_qparams_for_range_learning"  # what a forward calls when it has its qparams, and then never again


class _EnoughError(Exception):
    """A forward has done all that is wanted of it."""


def _is_quantizer(module: nn.Module) -> bool:
    return any(base.__name__ == "FakeQuantizerBase" for base in type(module).__mro__)


class IntxQuantizer(Quantizer):
    """A torchao fake-quantizer."""

    def __init__(self, names: tuple[str, ...], module: nn.Module, host: nn.Module, host_path: str, leaf: str) -> None:
        config: Any = getattr(module, "config", None)
        static = not getattr(config, "is_dynamic", True)
        weight = leaf == _WEIGHT
        needs = Needs.NOTHING if not static else Needs.WEIGHTS if weight else Needs.DATA
        kind = "weight" if weight else "input"
        super().__init__(
            names, module, f"{kind}:{host_path}", needs, (lambda: weight_of(host)) if static and weight else None
        )
        self.learns = bool(getattr(config, "range_learning", False))
        self._host, self._host_path, self._is_weight = host, host_path, weight
        self._enabled = True
        self._before: dict[str, nn.Parameter | None] = {}

    def disable(self) -> None:
        """Nothing to switch: torchao's own first forward, which is its calibration, fake-quantizes."""

    def start_observing(self) -> None:
        module: Any = self.module
        self._enabled = module.enabled
        module.enabled = True
        self._before = dict(module._parameters)
        for name in _LEAVES:
            module._parameters.pop(name, None)
            setattr(module, name, None)
        # torchao's `initialize_fake_quantizers` sets it in the same way: a range-learning quantizer refuses to run
        # before
        module._initialized = True

    def observe(self, value: Tensor) -> None:
        wanted = self.reduction()
        if wanted is not None and value.numel():
            self.observe_range(*value_range(value, group=wanted.group))
        else:
            self.module(value)

    def observes_in_training(self) -> bool:
        return not self.learns  # such a one refuses to run before it has a scale

    def reduction(self) -> Reduction | None:
        """The qparams of a group of weights are worked out from its two ends."""
        weight = weight_like(self._host)
        if type(self.module).__name__ != "IntxFakeQuantizer" or self.source is None or weight.dim() != 2:
            return None
        granularity = self._granularity()
        group = weight.shape[1] if type(granularity).__name__ == "PerAxis" else getattr(granularity, "group_size", 0)
        if group < 2 or weight.shape[1] % group or not RangeOver.takes(weight.dtype):
            return None  # torchao's own function refuses those
        return Reduction(join_path(self._host_path, "weight"), None, group)

    def _granularity(self) -> Any:
        return getattr(getattr(self.module, "config", None), "granularity", None)

    def observe_range(self, low: Tensor, high: Tensor) -> None:
        """A weight of which each group is the two ends of the range has the same qparams.

        The forward ends when it has found those: nobody asks for that weight, fake-quantized.
        """
        module: Any = self.module
        config = module.config
        pairs = copy.copy(config)
        if type(self._granularity()).__name__ != "PerAxis":  # per row is per group of all there is
            pairs.granularity = replace(self._granularity(), group_size=2)
        module.config = pairs
        last: Callable[[], None] | None = getattr(module, _LAST, None)

        def enough() -> None:
            assert last is not None
            last()
            raise _EnoughError

        if last is not None:
            module.__dict__[_LAST] = enough
        try:
            with suppress(_EnoughError):
                module(torch.stack([low, high], -1).flatten(1))
        finally:
            module.__dict__.pop(_LAST, None)
            module.config = config

    def compute_qparams(self) -> None:
        """The forward has written scale and zero_point already, as Parameters where ranges are learnt."""
        module: Any = self.module
        module.enabled = self._enabled
        for name, before in self._before.items():
            after = getattr(module, name, None)
            if isinstance(after, Tensor) and isinstance(before, nn.Parameter):
                before.data = after.data  # an optimizer may hold the parameter that was there
                setattr(module, name, before)

    def ranges(self) -> list[Tensor]:
        found = [getattr(self.module, name, None) for name in _LEAVES]
        return [tensor for tensor in found if isinstance(tensor, Tensor)]

    def check(self) -> Iterable[Problem]:
        scale = getattr(self.module, "scale", None)
        if self.needs is Needs.NOTHING or not isinstance(scale, Tensor):
            return
        # a learnt scale may have been trained below zero, which torchao itself accepts: see `findings`
        bad = int((~torch.isfinite(scale) | ((scale <= 0) & (not self.learns))).sum())
        if bad:
            detail = f"{bad} of {scale.numel()} scales are not finite and positive"
            yield Problem(ProblemKind.INVALID, f"{self.name}.scale", detail, "calibrate this quantizer anew")

    def soundness(self) -> Tensor | None:
        scale = getattr(self.module, "scale", None)
        return (torch.isfinite(scale) & (scale > 0)).all() if isinstance(scale, Tensor) else None

    def findings(self) -> Iterable[str]:
        scale = getattr(self.module, "scale", None)
        if self.learns and isinstance(scale, Tensor) and bool((scale <= 0).any()):
            yield f"{self.name}: {int((scale <= 0).sum())} of {scale.numel()} learnt scales are not positive"

    def quantized_parameters(self) -> Mapping[str, Callable[[], Tensor]]:
        return {join_path(self._host_path, "weight"): self._quantized} if self._is_weight else {}

    def _quantized(self) -> Tensor:
        return self._seen()[0]

    def _seen(self) -> tuple[Tensor, Tensor, Tensor]:
        """What the quantizer makes of the weight, with which scale and zero point."""
        module: Any = self.module
        before = {name: getattr(module, name, None) for name in _LEAVES}
        if self.learns and before["scale"] is None:
            raise QParamError(
                "the weight quantizer has learnt nothing yet",
                key=self.name,
                remedy="load or calibrate the model first, or take the latent weights",
            )
        enabled, module.enabled = module.enabled, True
        try:
            with torch.no_grad():
                value: Tensor = module(weight_of(self._host))
            return value, module.scale, module.zero_point
        finally:
            module.enabled = enabled
            for name, old in before.items():
                setattr(module, name, old)

    def roundings(self) -> Mapping[str, Rounding]:
        config = getattr(self.module, "config", None)
        if not self._is_weight or config is None:
            return {}
        inputs = getattr(getattr(self._host, _ACTIVATION, None), "config", None)
        key, weight = join_path(self._host_path, "weight"), weight_like(self._host)
        spec = Spec(tuple(weight.shape), weight.dtype)
        found = rounding(key, as_json(config), None if inputs is None else as_json(inputs), spec, (), self._seen)
        return {} if found is None else {key: found}

    def grid(self) -> str:
        from torchao.quantization.quant_primitives import _DTYPE_TO_QVALUE_BOUNDS

        config: Any = getattr(self.module, "config", None)
        bounds = _DTYPE_TO_QVALUE_BOUNDS.get(getattr(config, "dtype", None))
        if bounds is None:
            return ""
        centred = "affine" if not config.is_symmetric else "symmetric" if bounds[0] < 0 else "centred"
        return f"{bounds[0]}..{bounds[1]} {centred}"

    def channels(self) -> int | None:
        """One scale per row and group of a weight; a static activation quantizer has what its first batch gives."""
        granularity: Any = getattr(getattr(self.module, "config", None), "granularity", None)
        if not self._is_weight or granularity is None:
            return None
        rows, columns = weight_like(self._host).shape
        return int(rows * (columns // getattr(granularity, "group_size", columns)))

    def restore(self, leaf: str, value: Tensor) -> None:
        module: Any = self.module
        module._initialized = True
        if self._is_weight:  # one number per row or group, in whatever shape another framework has them
            precision = getattr(module.config, f"{leaf}_precision")
            value = value.reshape(len(weight_like(self._host)), -1).to(precision)
        constant = leaf == "zero_point" and module.config.is_symmetric
        learnt = self.learns and value.is_floating_point() and not constant
        setattr(module, leaf, nn.Parameter(value) if learnt else value)
        if leaf == "scale" and module.zero_point is None:
            module.zero_point = torch.zeros_like(value, dtype=module.config.zero_point_precision)


class TorchAOQAT(Framework):
    """torchao's QATConfig flow."""

    name = "torchao"

    def owns_model(self, view: ModelView) -> bool:
        return any(_is_quantizer(module) for module in view.kinds)

    def quantizers(self, view: ModelView) -> list[IntxQuantizer]:  # type: ignore[override]
        found: list[IntxQuantizer] = []
        for names, module in modules_like(view.model, _is_quantizer):
            parent, leaf = split_path(names[0])
            found.append(IntxQuantizer(names, module, view.modules[parent], parent, leaf))
        return found

    def notes(self, view: ModelView, float_model: nn.Module | None) -> list[str]:
        if any(q.learns and "scale" not in q.module._parameters for q in self.quantizers(view)):
            return [
                "the scales that quantizers learn become parameters with this load: make the optimizer after it, or add"
                " them with add_param_group"
            ]
        return []

    def leaf_entry(self, quantizer: Quantizer, leaf: str, key: str, spec: Spec) -> Entry:
        return Entry(quantizer.site, _LEAVES.get(leaf, Role.BUFFER), *spec, quantizer.name, leaf)

    def hidden_entries(self, quantizer: Quantizer) -> Iterable[tuple[str, Entry]]:
        """`scale` and `zero_point` of a static quantizer, whether or not they have been computed yet."""
        if quantizer.needs is Needs.NOTHING:
            return
        module: Any = quantizer.module
        for leaf, role in _LEAVES.items():
            if leaf in module._parameters or leaf in module._buffers:
                continue
            value = getattr(module, leaf, None)
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            precision = getattr(module.config, f"{leaf}_precision", torch.float32)
            dtype = value.dtype if isinstance(value, Tensor) else precision
            key = join_path(quantizer.name, leaf)
            if role is Role.ZERO_POINT and module.config.range_learning and module.config.is_symmetric:
                role = Role.CONSTANT  # always 0, and never saved
            yield key, Entry(quantizer.site, role, shape, dtype, quantizer.name, leaf, hidden=True)

    def record(self, view: ModelView) -> Mapping[str, Any]:
        """The config of each quantizer, on which its keys say nothing."""
        found = {
            q.name: as_json(config) for q in self.quantizers(view) if (config := getattr(q.module, "config", None))
        }
        return {_RECORD: found} if found else {}

    def owns_keys(self, view: KeyView) -> bool:
        return _RECORD in view.record or any(_quantizer_of(key) is not None for key, _ in view.kinds)

    def describe_keys(self, view: KeyView) -> Schema:
        entries: dict[str, Entry] = {}
        for key, spec in view.specs.items():
            quantizer = _quantizer_of(key)
            if quantizer is None:
                entries[key] = plain_entry(key, spec)
                continue
            parent, name = split_path(quantizer)
            site = f"{'weight' if name == _WEIGHT else 'input'}:{parent}"
            leaf = split_path(key)[1]
            entries[key] = Entry(site, _LEAVES[leaf], *spec, quantizer, leaf)
        return Schema(entries, self.name, Stage.PREPARED, roundings=_recorded_roundings(view))


def _recorded_roundings(view: KeyView) -> dict[str, Rounding | str]:
    """Weight -> its integers as the record of the file describes them, or why there are none."""
    configs = view.record.get(_RECORD)
    known = {str(name): one for name, one in configs.items() if isinstance(one, Mapping)} if configs else {}
    found: dict[str, Rounding | str] = {}
    for host in dict.fromkeys(split_path(name)[0] for name in known):
        key, quantizer = join_path(host, "weight"), join_path(host, _WEIGHT)
        if key not in view.specs:
            found[key] = UNROUNDED  # the layer computes it in every forward
            continue
        about = known.get(quantizer, {})
        leaves = tuple(leaf for leaf in _LEAVES if join_path(quantizer, leaf) in view.specs)
        sources = (key, *(join_path(quantizer, leaf) for leaf in leaves))
        seen = partial(rebuilt, about, leaves)
        one = rounding(key, about, known.get(join_path(host, _ACTIVATION)), view.specs[key], sources, seen)
        found[key] = one or UNROUNDED
    return found


def _quantizer_of(key: str) -> str | None:
    parent, leaf = split_path(key)
    return parent if leaf in _LEAVES and split_path(parent)[1] in (_WEIGHT, _ACTIVATION) else None
