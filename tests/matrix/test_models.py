"""The compatibility matrix over our own models: `make test` runs the small one, `make matrix` the full one.

What a framework refuses is declared with the text of its error; when one of these begins to work, its cell fails.
"""

from __future__ import annotations

from zoo import ARCHS, NETWORKS

from qat_compat.testing import QATModel

_NO_LINEAR = {"torchao-*": "no linear layer"}
_ITERATES = {"fx-*": "Proxy object cannot be iterated"}
_VARIADIC = {"fx-*": "co_varnames is too small"}
# What torch's own flows refuse; of FX it is mostly that its symbolic tracing cannot follow a forward.
# https://docs.pytorch.org/docs/stable/fx.html#limitations-of-symbolic-tracing
REFUSED = {
    "plain": {},
    "unordered": {},
    "crossed": {},
    "depthwise": _NO_LINEAR,
    "transposed": {**_NO_LINEAR, "fx-*": "Fusing ConvTranspose.BatchNorm not yet supported"},
    "conv1d": _NO_LINEAR,
    "unet": _NO_LINEAR,
    "repvgg": {},
    "lstm": {},
    "transformer": {},
    "decoder": {},
    "moe": {},
    "vit": {},
    "convnext": {},
    "yolo": {**_NO_LINEAR, **_ITERATES},
    "bert": {"fx-*": "does not support item assignment"},
    "llama": _VARIADIC,
    "qwen": _VARIADIC,
    "gpt2": _VARIADIC,
    "t5": _VARIADIC,
    "hf_vit": _ITERATES,
    "hf_resnet": {**_NO_LINEAR, "fx-*": "cannot be used as inputs to control flow"},
    "hf_mobilenet": {"fx-*": "int.. argument must be"},
    "hf_convnext": _ITERATES,
    "whisper": _VARIADIC,
    "clip": _VARIADIC,
}
_ALL = {**ARCHS, **NETWORKS}

MODELS: list[QATModel] = [_ALL[name].declared(refused=refused) for name, refused in REFUSED.items() if name in _ALL]
