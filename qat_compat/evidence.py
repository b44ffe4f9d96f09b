"""Gather what a model, its float twin and one batch of data show of the normalizations that fusion renamed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat_compat.driving import Inputs, run_once
from qat_compat.errors import Problem, ProblemKind
from qat_compat.frameworks import Description, describe_model
from qat_compat.norms import Evidence, Match
from qat_compat.state import modules_of
from qat_compat.trace import followers, watch_followers
from qat_compat.transaction import rehearsal

__all__ = ["contradictions", "from_float_model", "from_forward", "from_statistics"]

Read = Callable[[str], Tensor]

# how many times better than the next one a normalization must fit the data to be taken for the right one
_MARGIN = 4.0


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm)


def _is_host(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))


def _hosts(modules: Mapping[str, nn.Module]) -> list[str]:
    return [path for path, module in modules.items() if path and _is_host(module)]


def from_float_model(model: nn.Module) -> Evidence:
    """What the trace of an unprepared model says.

    Example:
        >>> from torch import nn
        >>> from_float_model(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))).by_host
        {'0': ('1',)}
    """
    chains = followers(model, _hosts(dict(modules_of(model))), [], _is_norm)
    return Evidence({host: chain[:1] for host, chain in chains.items()}, "trace of the float model")


def from_forward(
    description: Description, float_model: nn.Module | None, batch: Any, inputs: Inputs | None
) -> list[Evidence]:
    """Run one batch and see which emptied place each fused module's output goes to, and where in the float model."""
    found: list[Evidence] = []
    framework = description.framework
    if framework is None:
        return found
    model = description.view.model
    hosts = [one.host for one in description.schema.fused if one.host in description.view.modules]
    with rehearsal(description), framework.evaluation(model) as call:
        for quantizer in description.quantizers:
            quantizer.disable()
        chains = watch_followers(
            lambda: run_once(call, model, batch, inputs, 0), model, hosts, lambda module: type(module) is nn.Identity
        )
    found.append(Evidence(chains, "order of calls in a forward"))
    if float_model is not None:
        found.append(_from_float_forward(float_model, batch, inputs))
    return found


def _from_float_forward(float_model: nn.Module, batch: Any, inputs: Inputs | None) -> Evidence:
    floating = describe_model(float_model)
    modes = [(module, module.training) for module in float_model.modules()]
    try:
        with rehearsal(floating):
            float_model.eval()
            chains = watch_followers(
                lambda: run_once(float_model, float_model, batch, inputs, 0),
                float_model,
                _hosts(floating.view.modules),
                _is_norm,
            )
    finally:
        for module, training in modes:
            module.training = training
    return Evidence(chains, "order of calls in a forward of the float model")


def from_statistics(
    description: Description,
    found: Match,
    options: Mapping[str, Mapping[str, Mapping[str, str]]],
    read: Read,
    batch: Any,
    inputs: Inputs | None,
) -> Evidence:
    """Tell normalizations apart by their running statistics: they are those of the output of their own host.

    The source's weights stand in for the model's own while one batch runs. When a host in question is reached, all that
    comes before it is settled; the normalization that fits its output best, by a wide margin, is put in place, and the
    forward goes on.

    Args:
        description: The prepared model.
        found: What is known already.
        options: Prefix of a fused normalization -> float module path -> leaf -> source key.
        read: Reads a source tensor.
        batch: One calibration batch.
        inputs: `callable(batch) -> (args, kwargs)`.
    """
    framework = description.framework
    chosen: dict[str, tuple[str, ...]] = {}
    if framework is None or not options:
        return Evidence(chosen, "running statistics")
    model, modules = description.view.model, description.view.modules
    values = {k: partial(read, origin) for k, (origin, _) in found.pairs.items() if k in description.view.slots}
    prefixes = {one.host: one.prefix for one in description.schema.fused if one.prefix in options}
    handles = []

    def arriving(host: str) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            prefix = prefixes[host]
            before = framework.before_norm(module, args[0]) if args and host not in chosen else None
            if before is None:
                return
            taken = {path for paths in chosen.values() for path in paths}
            left = {path: keys for path, keys in options[prefix].items() if path not in taken}
            best = _best_fit(before, left, read)
            if best is not None:
                chosen[host] = (best,)
                _fill(modules[prefix], left[best], read)

        return hook

    with rehearsal(description, values), framework.evaluation(model) as call:
        for quantizer in description.quantizers:
            quantizer.disable()
        try:
            for host in prefixes:
                handles.append(modules[host].register_forward_pre_hook(arriving(host)))
            run_once(call, model, batch, inputs, 0)
        finally:
            for handle in handles:
                handle.remove()
    return Evidence(chosen, "running statistics of the calibration data")


def _best_fit(output: Tensor, options: Mapping[str, Mapping[str, str]], read: Read) -> str | None:
    """The option whose running statistics are those of `output` (N, C, ...), if it is the best by a wide margin."""
    axes = [axis for axis in range(output.dim()) if axis != 1]
    mean, var = output.double().mean(axes), output.double().var(axes, unbiased=False)
    scores = sorted((_misfit(mean, var, keys, read), path) for path, keys in options.items())
    if not scores:
        return None
    if len(scores) == 1 or scores[0][0] * _MARGIN < scores[1][0]:
        return scores[0][1]
    return None


def _misfit(mean: Tensor, var: Tensor, keys: Mapping[str, str], read: Read) -> float:
    """Mean squared distance of means, in standard deviations, and of log variances; 0 for a perfect fit."""
    if "running_mean" not in keys or "running_var" not in keys:
        return float("inf")
    their_mean = read(keys["running_mean"]).to(mean.device, torch.float64)
    their_var = read(keys["running_var"]).to(mean.device, torch.float64).clamp(min=1e-12)
    if their_mean.shape != mean.shape:
        return float("inf")
    offset = (mean - their_mean).square() / their_var
    spread = (var.clamp(min=1e-12) / their_var).log().square()
    return float((offset + spread).mean())


def _fill(norm: nn.Module, keys: Mapping[str, str], read: Read) -> None:
    """Put the source's values into a normalization that stands on scratch tensors."""
    for leaf, key in keys.items():
        tensor = norm._parameters.get(leaf, norm._buffers.get(leaf))
        if tensor is not None:
            tensor.data = read(key).to(tensor.device, tensor.dtype, copy=True)


def contradictions(seen: Evidence, guessed: Mapping[str, str], prefixes: Mapping[str, str]) -> Sequence[Problem]:
    """Names given by convention that the data speaks against.

    Args:
        seen: What the statistics say, by host.
        guessed: Prefix -> float module path that the convention says.
        prefixes: Prefix -> host.
    """
    problems = []
    for prefix, path in guessed.items():
        shown = seen.by_host.get(prefixes[prefix], ())
        if shown and shown[0] != path:
            problems.append(
                Problem(
                    ProblemKind.AMBIGUOUS,
                    prefix,
                    f"its name says {path}, and the running statistics of {shown[0]} fit the calibration data",
                    f"pass float_model=, or rename= one of them to {prefix}",
                )
            )
    return problems
