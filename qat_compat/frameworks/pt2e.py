"""PT2E: `torchao.quantization.pt2e.prepare_qat_pt2e` on an exported program. Extends FX: a graph with quantizer
modules.

What is known here, and what it rests on (torchao 0.18):

* Parameters and batch normalizations keep their original names; there is nothing to un-fuse.
* Weight and activation quantizers share the numbering `activation_post_process_N`, and one module may stand under
  several names; a weight quantizer is one whose input depends on no placeholder.
* An exported module has no `.train()`/`.eval()`; `move_exported_model_to_eval` rewrites its graph, so it is given a
  copy.
* `prepare_qat_pt2e` sets eps and momentum of every fused batch normalization to 1e-5 and 0.1 (pytorch/ao#2980).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat_compat.frameworks.base import KeyView, ModelView
from qat_compat.frameworks.fx import BATCH_NORMS, FX, graphs_of, is_exported
from qat_compat.isolation import quiet
from qat_compat.schema import Entry, Fused
from qat_compat.state import split_path

__all__ = ["PT2E"]


class PT2E(FX):
    """torchao's PyTorch 2 export flow."""

    name = "pt2e"

    def owns_model(self, view: ModelView) -> bool:
        return any(is_exported(module) for module in graphs_of(view).values())

    def owns_keys(self, view: KeyView) -> bool:
        """Every quantizer is numbered, those of weights too; in FX they stay with their modules."""
        return super().owns_keys(view) and not any(".weight_fake_quant." in key for key in view.specs)

    def _perhaps_fused(self, entries: Mapping[str, Entry]) -> list[Fused]:
        return []  # this flow renames nothing

    def chains(self, view: ModelView, hosts: list[str]) -> Mapping[str, tuple[str, ...]]:
        return {}

    def notes(self, view: ModelView, float_model: nn.Module | None) -> list[str]:
        """Every batch normalization whose eps or momentum the export flow changed."""
        norms: Mapping[str, nn.Module] = {}
        if float_model is not None:
            norms = {p: m for p, m in float_model.named_modules() if isinstance(m, _BatchNorm)}
        found: list[str] = []
        unchecked = 0
        for root in graphs_of(view).values():
            for node in root.graph.nodes:
                if not _is_batch_norm(node):
                    continue
                target = node.args[1]
                path = split_path(str(getattr(target, "target", "")))[0]
                source: Any = norms.get(path)
                if source is None:
                    unchecked += 1
                    continue
                for name, index, mine in (("momentum", 6, source.momentum), ("eps", 7, source.eps)):
                    theirs = node.args[index] if len(node.args) > index else None
                    if isinstance(theirs, float) and mine is not None and theirs != mine:
                        found.append(f"{path}: {name} is {theirs} in the exported graph and {mine} in the float model")
        if unchecked:
            found.append(
                f"eps and momentum of {unchecked} batch normalizations were not compared (prepare_qat_pt2e resets them"
                " to 1e-5 and 0.1); pass float_model= to compare them"
            )
        return found

    @contextmanager
    def evaluation(self, model: nn.Module) -> Iterator[Callable[..., Any]]:
        from torchao.quantization.pt2e import move_exported_model_to_eval

        replaced: list[tuple[nn.Module, str, nn.Module]] = []
        runner: nn.Module = model
        modules = dict(model.named_modules())
        try:
            for path, module in modules.items():
                if not is_exported(module):
                    continue
                twin = _shallow_copy(module)
                with quiet():
                    move_exported_model_to_eval(twin)
                if path:
                    parent, name = split_path(path)
                    replaced.append((modules[parent], name, module))
                    modules[parent]._modules[name] = twin
                else:
                    runner = twin
            if runner is model:
                with super().evaluation(model) as call:
                    yield call
            else:
                yield runner
        finally:
            for owner, name, module in replaced:
                owner._modules[name] = module


def _is_batch_norm(node: torch.fx.Node) -> bool:
    return node.op == "call_function" and str(node.target).split(".")[1:2] in ([name] for name in BATCH_NORMS)


def _shallow_copy(module: nn.Module) -> torch.fx.GraphModule:
    """A graph module of its own graph that shares every submodule and tensor with `module`."""
    assert isinstance(module, torch.fx.GraphModule)
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    twin = torch.fx.GraphModule(module, graph)
    graph._codegen = copy.copy(module.graph._codegen)
    twin.meta = dict(module.meta)
    if hasattr(module, "_exported_training"):
        twin._exported_training = module._exported_training
    twin.recompile()
    return twin
