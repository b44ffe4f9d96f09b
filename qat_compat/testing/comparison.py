"""Equality bit for bit: of states, of ties, of outputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qat_compat.devices import forked_rng
from qat_compat.testing.modes import DefaultInputs, Inputs, in_mode
from qat_compat.testing.quantizers import intx_quantizers

_SHOWN = 40


def assert_same_state(actual: nn.Module | Mapping[str, Any], expected: nn.Module | Mapping[str, Any]) -> None:
    """Assert that two models, or two state dicts, hold the same bits under the same names.

    Of models it also compares what is not in a state dict: the `scale` and `zero_point` attributes of torchao's static
    and range-learning quantizers (those of dynamic ones are scratch, made anew by each forward) and which names share
    memory.

    Example:
        >>> import torch
        >>> assert_same_state({"w": torch.tensor([float("nan")])}, {"w": torch.tensor([float("nan")])})
        >>> assert_same_state({"w": torch.ones(2)}, {"w": torch.tensor([1.0, 1.5]), "b": torch.ones(1)})
        Traceback (most recent call last):
        ...
        AssertionError: 2 entries differ
          b: missing
          w: 1 of 2 values differ, at most by 0.5

    Args:
        actual: What is judged.
        expected: What it should be.

    Raises:
        AssertionError: With every entry that differs and by how much.
    """
    found, wanted = full_state(actual), full_state(expected)
    lines = [f"{key}: missing" for key in wanted if key not in found]
    lines += [f"{key}: not expected" for key in found if key not in wanted]
    for key, value in wanted.items():
        if key in found and (difference := _difference(found[key], value)):
            lines.append(f"{key}: {difference}")
    if isinstance(actual, nn.Module) and isinstance(expected, nn.Module):
        lines += [f"{group}: share memory, but should not" for group in sorted(_ties(actual) - _ties(expected))]
        lines += [f"{group}: should share memory" for group in sorted(_ties(expected) - _ties(actual))]
    fail_with(lines)


def assert_same_output(
    actual: nn.Module, expected: nn.Module, batches: Sequence[Any], *, inputs: Inputs | None = None, train: bool = True
) -> None:
    """Assert that two models compute the same bits, in eval mode and after it in train mode, and stay equal while they
    do.

    The models are copied first, so that observers and BN statistics of the given ones stay as they are. An exported
    program runs in its eval form first and then as it stands.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> assert_same_output(model, copy.deepcopy(model), [torch.ones(3, 2)])

    Args:
        actual: What is judged.
        expected: What it should be.
        batches: Inputs, used in both modes.
        inputs: As in :func:`native_calibration`.
        train: Whether to go on in train mode, too.

    Raises:
        AssertionError: With the outputs, or the state left by the forward, that differ.
    """
    pair = {"actual": copy.deepcopy(actual), "expected": copy.deepcopy(expected)}
    for mode in ["eval", "train"][: 1 + train]:
        with ExitStack() as stack:
            forms = {name: stack.enter_context(in_mode(model, mode)) for name, model in pair.items()}
            for batch in batches:
                results = {}
                for name, form in forms.items():
                    args, kwargs = (inputs or DefaultInputs(pair[name]))(batch)
                    with forked_rng(), torch.no_grad():
                        torch.manual_seed(0)
                        results[name] = {
                            f"{mode} output {i}": v for i, v in enumerate(output_tensors(form(*args, **kwargs)))
                        }
                assert_same_state(results["actual"], results["expected"])
        assert_same_state(pair["actual"], pair["expected"])


def full_state(source: nn.Module | Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict, and of static torchao quantizers what it does not hold."""
    if not isinstance(source, nn.Module):
        return dict(source)
    state = dict(source.state_dict())
    intx = {id(quantizer) for quantizer in intx_quantizers(source)}
    for name, module in source.named_modules():
        if id(module) in intx and not module.config.is_dynamic:
            for field in ("scale", "zero_point"):
                value = getattr(module, field)
                state[f"{name}.{field}"] = value.detach() if isinstance(value, Tensor) else value
                state[f"{name}.{field} is a parameter"] = isinstance(value, nn.Parameter)
    return state


def _difference(actual: Any, expected: Any) -> str:
    """In what `actual` differs from `expected`, or ""."""
    if not isinstance(actual, Tensor) or not isinstance(expected, Tensor):
        same = type(actual) is type(expected) and actual == expected
        return "" if same else f"is {actual!r}, should be {expected!r}"
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return f"is {_spec(actual)}, should be {_spec(expected)}"
    if actual.is_meta or expected.is_meta:
        return "" if actual.is_meta and expected.is_meta else f"is on {actual.device}, should be on {expected.device}"
    if torch.equal(_bits(actual), _bits(expected)):
        return ""
    a, b = actual.detach().cpu().double(), expected.detach().cpu().double()
    unequal = (_bits(actual).view(a.numel(), -1) != _bits(expected).view(a.numel(), -1)).any(1).sum().item()
    return f"{unequal} of {a.numel()} values differ, at most by {(a - b).abs().max().item():.6g}"


def _bits(tensor: Tensor) -> Tensor:
    """Its bytes: NaN equals NaN, and -0.0 is not 0.0. Of a quantized tensor, those of integers and values."""
    if tensor.is_quantized:  # torch crashes on a view of one as another dtype
        return torch.cat([_bits(part).view(tensor.numel(), -1) for part in (tensor.int_repr(), tensor.dequantize())], 1)
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _spec(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _ties(model: nn.Module) -> set[tuple[str, ...]]:
    """Names that share memory, as sorted groups."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor.numel() and not tensor.is_meta:
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.dtype)
            groups.setdefault(place, []).append(name)
    return {tuple(sorted(names)) for names in groups.values() if len(names) > 1}


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors of any output; a mapping that pytree does not know is taken by its values."""
    leaves: list[Tensor] = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Mapping):
            leaves += output_tensors(list(leaf.values()))
        elif isinstance(leaf, Tensor):
            leaves.append(leaf)
    return leaves


def fail_with(lines: Sequence[str]) -> None:
    if not lines:
        return
    shown = [f"  {line}" for line in sorted(lines)[:_SHOWN]]
    if len(lines) > _SHOWN:
        shown.append(f"  ... and {len(lines) - _SHOWN} more")
    noun = "entry differs" if len(lines) == 1 else "entries differ"
    raise AssertionError("\n".join([f"{len(lines)} {noun}", *shown]))
