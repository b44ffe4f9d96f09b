"""How a prepared model is called: its eval form, its train form, and what a batch becomes."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qat_compat.devices import forked_rng

Inputs = Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]


def is_exported(model: nn.Module) -> bool:
    return isinstance(model, torch.fx.GraphModule) and any("val" in node.meta for node in model.graph.nodes)


def training_modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@contextmanager
def in_mode(model: nn.Module, mode: str) -> Iterator[nn.Module]:
    """What to call for a forward in that mode."""
    if mode == "eval":
        with eval_form(model) as runner:
            yield runner
    elif is_exported(model):
        yield model
    else:
        yield model.train()


@contextmanager
def eval_form(model: nn.Module) -> Iterator[nn.Module]:
    """What to call for a forward in eval mode; every module's mode is afterwards as it was."""
    if is_exported(model):
        assert isinstance(model, torch.fx.GraphModule)
        pt2e = importlib.import_module("torchao.quantization.pt2e")
        form = torch.fx.GraphModule(model, copy.deepcopy(model.graph))
        if hasattr(model, "_exported_training"):
            form._exported_training = model._exported_training
        with forked_rng():  # it traces its patterns with random inputs
            form = pt2e.move_exported_model_to_eval(form)
        yield form
        return
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


class DefaultInputs:
    """The default `batch -> (args, kwargs)`."""

    def __init__(self, model: nn.Module) -> None:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        parameters = inspect.signature(model.forward).parameters.values()
        self.variadic = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
        self.positional = sum(p.kind in kinds for p in parameters)

    def __call__(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(batch, Mapping):
            return (), {key: _tensor(value) for key, value in batch.items()}
        if isinstance(batch, (tuple, list)):
            return tuple(_tensor(v) for v in (batch if self.variadic else batch[: self.positional])), {}
        return (_tensor(batch),), {}


def _tensor(value: Any) -> Any:
    return torch.as_tensor(value) if type(value).__module__ == "numpy" else value
