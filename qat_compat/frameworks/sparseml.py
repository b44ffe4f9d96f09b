"""`QuantWrapper`: SparseML's eager-mode QAT, and torch's own use of the class. Extends torch.ao: the quantizers and the
fused modules are the same.

What is known here, and what it rests on (torch 2.13; sparseml 1.8 and its checkpoints; lightning 1.9):

* A `QuantWrapper` has `quant`, which quantizes the input, and `module`, which is the module. So
  `conv1.quant.activation_post_process` is the input of `conv1`, `conv1.module.weight` is `conv1.weight`, and
  `conv1.module.bn` is the normalization that was fused into `conv1`.
* SparseML wraps every layer; Lightning's `QuantizationAwareTraining` callback wraps the whole model once.
* A normalization that SparseML could not fuse is in a `_BNWrapper` of its own, in which `bn` is all there is:
  `bn1.bn.module.weight`.
* Its `QATWrapper` has the module at `forward_fn`, and quantizers at `input_quant_stubs.<n>`, `output_quant_stubs.<n>`.
* Its generic checkpoints hold every tensor in float32, switches and zero points too; the values are exact.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from qat_compat.frameworks.base import KeyView, ModelView
from qat_compat.frameworks.key_tables import site_of
from qat_compat.frameworks.torch_ao import TorchAO
from qat_compat.schema import Entry, Fused, Schema
from qat_compat.state import join_path, split_path

__all__ = ["QuantWrapped", "SparseML"]

_QUANT = re.compile(r"(?:(?P<host>.+)\.)?quant\.activation_post_process\.")
_STUB = re.compile(r"(?:(?P<host>.+)\.)?(?P<kind>input|output)_quant_stubs\.(?P<index>\d+)\.activation_post_process\.")
_NORM = ".bn.module.running_mean"


class QuantWrapped(TorchAO):
    """torch.ao eager mode with `QuantWrapper` around the model, or around parts of it."""

    def owns_model(self, view: ModelView) -> bool:
        return False  # its modules are torch.ao's

    def owns_keys(self, view: KeyView) -> bool:
        return bool(_wrapped(view))

    def describe_keys(self, view: KeyView) -> Schema:
        schema = super().describe_keys(view)
        wrapped = self._wrappers(view)
        bare = _Names(wrapped, _stubbed(view), _lonely_norms(view))
        fused = {one.prefix: replace(one, host=bare(one.host)) for one in schema.fused}
        entries = {key: _entry(key, entry, wrapped, bare, fused) for key, entry in schema.items()}
        places = frozenset(map(bare, schema.places))
        return replace(schema, entries=entries, fused=tuple(fused.values()), places=places)

    def _wrappers(self, view: KeyView) -> set[str]:
        return _wrapped(view)


class SparseML(QuantWrapped):
    """SparseML."""

    name = "sparseml"
    extends = "torch_ao"

    def owns_keys(self, view: KeyView) -> bool:
        """A wrapper around a single layer, which holds its weight right there."""
        return bool(_stubbed(view)) or any(join_path(path, "module.weight") in view.specs for path in _wrapped(view))

    def _wrappers(self, view: KeyView) -> set[str]:
        """A pooling layer has no tensors, and a layer may have no quantizer for its input."""
        children = _children(view)
        hosts = {found["host"] or "" for key in view.specs if (found := _QUANT.match(key))}
        hosts |= {path.removesuffix(".module") for path, inside in children.items()
                  if path.endswith(".module") and "weight_fake_quant" in inside}  # fmt: skip
        return {path for path in hosts if children[path] <= {"quant", "module"}}


def _wrapped(view: KeyView) -> set[str]:
    """Modules whose children are `quant`, with a quantizer in it, and `module`."""
    if not any(_QUANT.match(key) for key, _ in view.kinds):
        return set()
    hosts = {found["host"] or "" for key in view.specs if (found := _QUANT.match(key))}
    children = _children(view)
    return {path for path in hosts if children[path] == {"quant", "module"}}


def _stubbed(view: KeyView) -> set[str]:
    if not any(_STUB.match(key) for key, _ in view.kinds):
        return set()
    return {found["host"] or "" for key in view.specs if (found := _STUB.match(key))}


def _lonely_norms(view: KeyView) -> set[str]:
    """Modules with `bn` as their only child, and a wrapped normalization in it."""
    norms = {key.removesuffix(_NORM) for key in view.specs if key.endswith(_NORM)}
    children = _children(view) if norms else {}
    return {path for path in norms if children[path] == {"bn"}}


def _children(view: KeyView) -> dict[str, set[str]]:
    """Module path -> the names right under it."""
    found: dict[str, set[str]] = {}
    for key in view.specs:
        path = key
        while path:
            path, leaf = split_path(path)
            found.setdefault(path, set()).add(leaf)
    return found


def _entry(key: str, entry: Entry, wrapped: set[str], bare: _Names, fused: Mapping[str, Fused]) -> Entry:
    if not entry.quantizer:
        return entry if split_path(entry.site)[0] in fused else entry._replace(site=bare(entry.site))
    if found := _STUB.match(key):
        return entry._replace(site=site_of(found["kind"], bare(found["host"] or ""), found["index"]))
    found = _QUANT.match(key)
    if found and (found["host"] or "") in wrapped:
        return entry._replace(site=site_of("input", bare(found["host"] or "")))
    kind, _, where = entry.site.partition(":")
    host, plus, after = where.partition("+")
    return entry._replace(site=f"{site_of(kind, bare(host))}{plus}{after}")


class _Names:
    """Takes the segments out of a name that wrappers put in.

    Args:
        wrapped: Modules that are a `QuantWrapper`.
        stubbed: Modules that are a `QATWrapper`.
        norms: Modules that are a `_BNWrapper`.
    """

    def __init__(self, wrapped: set[str], stubbed: set[str], norms: set[str]) -> None:
        self._segments = {join_path(path, "module") for path in wrapped}
        self._segments |= {join_path(path, "forward_fn") for path in stubbed}
        self._segments |= {join_path(path, name) for path in norms for name in ("bn", "bn.module")}

    def __call__(self, name: str) -> str:
        kept: list[str] = []
        path = ""
        for part in name.split("."):
            path = join_path(path, part)
            if path not in self._segments:
                kept.append(part)
        return ".".join(kept)
