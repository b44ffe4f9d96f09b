"""The names of what torch.ao and torchao's pt2e have in common: classes of quantizers, and the keys of their state.

What is known here, and what it rests on (torch 2.13, torchao 0.18): the two packages have one set of classes each, with
the same names, the same buffers and the same arithmetic, so classes are told by name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache

from qat_compat.schema import Role

__all__ = [
    "LEAVES",
    "OBSERVER",
    "has_base",
    "is_fake_quant",
    "is_observer",
    "keeps_min_max",
    "quantizer_of",
    "quantizers_of",
]

OBSERVER = "activation_post_process"
_QUANTIZER = re.compile(r"(?:^|\.)(weight_fake_quant|activation_post_process(?:_\d+)?)(?=\.)")

# leaf of a quantizer's state -> role; the same table for models and for files
LEAVES: Mapping[str, Role] = {
    "scale":                            Role.SCALE,
    "zero_point":                       Role.ZERO_POINT,
    "fake_quant_enabled":               Role.ENABLED,
    "observer_enabled":                 Role.ENABLED,
    "static_enabled":                   Role.ENABLED,
    "learning_enabled":                 Role.ENABLED,
    "eps":                              Role.EPS,
    "min_val":                          Role.MIN,
    "max_val":                          Role.MAX,
    "histogram":                        Role.HISTOGRAM,
    f"{OBSERVER}.eps":                  Role.EPS,
    f"{OBSERVER}.min_val":              Role.MIN,
    f"{OBSERVER}.max_val":              Role.MAX,
    f"{OBSERVER}.histogram":            Role.HISTOGRAM,
    f"{OBSERVER}.scale":                Role.CONSTANT,
    f"{OBSERVER}.zero_point":           Role.CONSTANT,
}  # fmt: skip

# names of older torch versions -> today's
_OLD_LEAVES = {"min_vals": "min_val", "max_vals": "max_val"}

_MIN_MAX_OBSERVERS = frozenset(
    {
        "MinMaxObserver",
        "MovingAverageMinMaxObserver",
        "PerChannelMinMaxObserver",
        "MovingAveragePerChannelMinMaxObserver",
    }
)


def quantizer_of(key: str, known: Collection[str] = ()) -> tuple[str, str] | None:
    """The quantizer that a key belongs to, and the name of the tensor within it, in today's words.

    A module of the user's own may be called like a quantizer: one is told by a tensor that quantizers have.

    Example:
        >>> quantizer_of("fc.weight_fake_quant.scale"), quantizer_of("activation_post_process.0.weight")
        (('fc.weight_fake_quant', 'scale'), None)

    Args:
        key: Key of a state_dict.
        known: Quantizers of which other tensors told: all that is under their names is theirs.
    """
    for match in _QUANTIZER.finditer(key):
        name, *parts = key[: match.end()], *key[match.end() + 1 :].split(".")
        leaf = ".".join([*parts[:-1], _OLD_LEAVES.get(parts[-1], parts[-1])])
        if leaf in LEAVES or name in known:
            return name, leaf
    return None


def quantizers_of(keys: Iterable[str]) -> set[str]:
    """The quantizers that keys tell of."""
    return {found[0] for key in keys if (found := quantizer_of(key)) is not None}


def has_base(module: object, name: str) -> bool:
    """Whether a class of this name is among the bases; torch.ao and torchao.pt2e have one set of classes each."""
    return name in _names_of_bases(type(module))  # type: ignore[arg-type]


@lru_cache(maxsize=256)
def _names_of_bases(cls: type) -> frozenset[str]:
    return frozenset(base.__name__ for base in cls.__mro__)


def is_fake_quant(module: object) -> bool:
    return has_base(module, "FakeQuantizeBase")


def is_observer(module: object) -> bool:
    return has_base(module, "ObserverBase")


def keeps_min_max(observer: object) -> bool:
    """Whether its smallest and its largest value are all that an observer keeps of its first tensor."""
    return type(observer).__name__ in _MIN_MAX_OBSERVERS
