"""Normalizations that are folded into convolutions, written back into an architecture that has them.

Folding leaves nothing of a normalization but a convolution's weight and bias. The float model with the folded weight,
the folded bias and a normalization that changes nothing computes the same. With `y = (x - mean) / sqrt(var + eps) *
gamma + beta`, nothing is changed by `mean = 0, var = 1, gamma = sqrt(1 + eps), beta = 0`; a convolution that has no
bias leaves the folded one to `beta`. Without gamma and beta (`affine=False`) the same is `var = 1 - eps` and
`mean = -bias`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat_compat.norms import Evidence, Match
from qat_compat.schema import Entry, Recipe, Role, Schema, Stage
from qat_compat.state import join_path, modules_of, split_path

__all__ = ["norm_eps", "unfold"]

_OUT_OF_USE = "a normalization that was folded into its convolution, out of use"


def norm_eps(models: Sequence[nn.Module]) -> dict[str, float]:
    """Module path -> eps of every normalization of the models; the first model that has a path tells.

    Example:
        >>> norm_eps([nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2, eps=1e-3))])
        {'1': 0.001}
    """
    found: dict[str, float] = {}
    for model in models:
        for path, module in modules_of(model):
            if isinstance(module, _BatchNorm):
                found.setdefault(path, module.eps)
    return found


@dataclass(frozen=True)
class _Norm:
    """A normalization of the target: its path there, that of its host, its eps, and the keys of its tensors."""

    path: str
    host: str
    eps: float
    keys: Mapping[str, str]


def unfold(
    source: Schema, target: Schema, found: Match, evidence: Sequence[Evidence], eps: Mapping[str, float]
) -> Schema:
    """The source with an identity for every normalization of the target that was folded into its host.

    Pairs what it adds in `found`. Only a normalization that a witness names is written, after a host whose weight the
    source holds in converted form or folded.

    Args:
        source: Schema of what is read; returned as it is unless its stage is FOLDED.
        target: Schema of what is filled.
        found: The pairs so far.
        evidence: Which normalization follows which host, in the target's words.
        eps: See :func:`norm_eps`, by module path of the target.
    """
    if source.stage is not Stage.FOLDED:
        return source
    entries, recipes = dict(source.entries), dict(source.recipes)
    origin_of = {target[key].site: origin for key, (origin, _) in found.pairs.items()}
    biases = {source[key].site: key for key in source.float_keys() if split_path(source[key].site)[1] == "bias"}
    taken = {origin for origin, _ in found.pairs.values()}
    for norm in _norms(target, evidence, eps):
        weight = origin_of.get(join_path(norm.host, "weight"))
        if weight is None or (source.recipes and weight not in source.recipes):
            continue
        stale = [found.pairs[key][0] for key in norm.keys.values() if key in found.pairs]
        convolution = len(source[weight].shape) > 2
        if stale and not (convolution and source.doubtful.issuperset(stale)):
            continue  # the source has this normalization: it was not folded
        for origin in stale:
            entries[origin] = entries[origin]._replace(role=Role.CONSTANT, optional=_OUT_OF_USE)
        bias = biases.get(join_path(split_path(source[weight].site)[0], "bias"))
        for leaf, key in norm.keys.items():
            name = f"identity:{key}"
            recipe = _recipe(leaf, target[key], norm, _bias(source, bias) if bias not in taken else None)
            entries[name] = target[key]._replace(site=name, quantizer="", optional="")
            recipes[name] = recipe
            found.pairs[key] = (name, "folded normalization")
        if bias is not None and bias not in taken:
            entries[bias] = entries[bias]._replace(role=Role.CONSTANT, optional=f"moved into {norm.path}")
            taken.add(bias)
    doubtful = frozenset() if evidence else source.doubtful
    return replace(source, entries=entries, recipes=recipes, doubtful=doubtful)


def _norms(target: Schema, evidence: Sequence[Evidence], eps: Mapping[str, float]) -> Iterator[_Norm]:
    """Every normalization of the target of which it is known what it follows."""
    by_module: dict[str, dict[str, str]] = {}
    for key in target.float_keys():
        parent, leaf = split_path(key)
        by_module.setdefault(parent, {})[leaf] = key
    for fused in target.fused:
        if fused.prefix in eps:
            yield _Norm(fused.prefix, fused.host, eps[fused.prefix], by_module.get(fused.prefix, {}))
    inside = {fused.host for fused in target.fused}
    for one in evidence:
        for host, paths in one.by_host.items():
            if host not in inside and len(paths) == 1 and paths[0] in eps and paths[0] in by_module:
                inside.add(host)
                yield _Norm(paths[0], host, eps[paths[0]], by_module[paths[0]])


def _bias(source: Schema, key: str | None) -> Recipe | None:
    """How the folded bias is read, which may itself be computed."""
    return None if key is None else source.recipes.get(key, Recipe((key,), "", _same))


def _recipe(leaf: str, entry: Entry, norm: _Norm, bias: Recipe | None) -> Recipe:
    """One tensor of a normalization that adds `bias`, or nothing."""
    how = f"{leaf} of a normalization that is folded into {norm.host}"
    affine = "weight" in norm.keys
    if bias is not None and leaf == ("bias" if affine else "running_mean"):
        read = bias.compute
        return Recipe(bias.sources, how, read if affine else lambda *tensors: -read(*tensors))
    constants = {
        "weight": math.sqrt(1.0 + norm.eps),
        "running_var": 1.0 if affine else 1.0 - norm.eps,
    }
    return Recipe((), how, _filled(entry, constants.get(leaf, 0.0)))


def _same(value: Tensor) -> Tensor:
    return value


def _filled(entry: Entry, value: float) -> Callable[[], Tensor]:
    return lambda: torch.full(entry.shape, value, dtype=entry.dtype, device="cpu")
