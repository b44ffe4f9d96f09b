"""Drive data through a model's own quantizers.

Native calibration is: eval mode, no gradient, observers on, fake-quantization off, the batches in order; then
`calculate_qparams()` of every quantizer written into its buffers. Modes, flags, BN statistics and random state are as
before afterwards. The caller (:mod:`qat_compat.apply`) has put scratch tensors in place of the model's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from glob import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qat_compat.errors import CalibrationError, QParamError
from qat_compat.frameworks import Description, Needs, Quantizer, compute_all_qparams
from qat_compat.isolation import quiet
from qat_compat.memory import read_numbers
from qat_compat.qparams import RangeHistogram, choose_range
from qat_compat.text import collapse, counted, shorten

__all__ = ["Data", "Inputs", "batches_of", "check_data", "drive", "observe_weights", "run_once"]

Inputs = Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]
Data = Iterable[Any] | Callable[[nn.Module], Any]


def check_data(value: object, key: str, expected: str) -> None:
    """Refuse what cannot be iterated over, and a single batch, of which each row or name would be taken for one."""
    single = isinstance(value, (Tensor, np.ndarray, str, bytes)) or (isinstance(value, Mapping) and not callable(value))
    if single or not (callable(value) or isinstance(value, Iterable)):
        raise CalibrationError(
            "this is no calibration data",
            key=key,
            expected=expected,
            found=type(value).__name__,
            remedy=f"put a single batch into a list: {key}=[batch]",
        )


def arguments_for(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a batch is handed to `forward`, when the caller does not say.

    A tensor is the only argument; a mapping becomes keywords; a tuple or list is cut to the number of positional
    parameters of `forward`, so that an `(input, label)` pair of a DataLoader works. Numpy arrays become tensors.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> args, kwargs = arguments_for(nn.Linear(2, 2), (torch.ones(1, 2), torch.tensor([3])))
        >>> len(args), kwargs
        (1, {})
    """
    if isinstance(batch, Mapping):
        return (), {str(key): _tensors(value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(_tensors(value) for value in batch[: _positional_count(model, len(batch))]), {}
    return (_tensors(batch),), {}


def _positional_count(model: nn.Module, available: int) -> int:
    graph = getattr(model, "graph", None)
    if isinstance(graph, torch.fx.Graph):
        return sum(node.op == "placeholder" for node in graph.nodes)
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:  # a wrapper, or a model that takes all
        inner = getattr(model, "module", getattr(model, "_orig_mod", None))
        return _positional_count(inner, available) if isinstance(inner, nn.Module) else available
    return sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)


def _tensors(value: Any) -> Any:
    """The value with a tensor for every array of numbers in it."""
    return _with_each(value, lambda item: _as_tensor(item) if isinstance(item, np.ndarray) else item)


def _as_tensor(value: Any) -> Any:
    try:
        return torch.from_numpy(value)
    except TypeError:  # words, objects
        return value


def _moved(value: Any, device: torch.device) -> Any:
    """The value with every tensor in it on `device`."""
    return _with_each(value, lambda item: item.to(device) if isinstance(item, Tensor) else item)


def _with_each(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same mappings, tuples and lists of what is made of each thing in them."""
    if isinstance(value, Mapping):
        return {key: _with_each(item, change) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_with_each(item, change) for item in value))
    if type(value) in (tuple, list):
        return type(value)(_with_each(item, change) for item in value)
    return change(value)


def _device_of(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")


def run_once(call: Callable[..., Any], model: nn.Module, batch: Any, inputs: Inputs | None, number: int) -> None:
    """Hand one batch to the model; whatever the forward raises becomes a :class:`CalibrationError`."""
    args, kwargs = _told(inputs, batch, number) if inputs is not None else arguments_for(model, batch)
    try:
        device = _device_of(model)
        call(*_moved(args, device), **_moved(kwargs, device))
    except CalibrationError:
        raise
    except Exception as error:
        raise CalibrationError(
            f"the forward raised {type(error).__name__} on calibration batch {number}: {error}",
            found=_describe(batch),
            remedy="pass inputs=, a callable(batch) -> (args, kwargs), if the batch is not what forward takes"
            if inputs is None
            else "see whether what inputs= makes of the batch is what forward takes",
        ) from error


def _told(inputs: Inputs, batch: Any, number: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        args, kwargs = inputs(batch)
        return tuple(args), dict(kwargs)
    except Exception as error:
        raise CalibrationError(
            f"inputs= raised {type(error).__name__} on calibration batch {number}: {error}",
            expected="a callable(batch) -> (args, kwargs)",
            found=_describe(batch),
        ) from error


def _describe(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"{str(batch.dtype).removeprefix('torch.')}{list(batch.shape)} on {batch.device}"
    if isinstance(batch, Mapping):
        return "{" + ", ".join(f"{key}: {_describe(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, (tuple, list)):
        return "(" + ", ".join(map(_describe, batch)) + ")"
    return type(batch).__name__


@contextmanager
def _watched(
    quantizers: Sequence[Quantizer],
    seen: set[str],
    histograms: Mapping[str, RangeHistogram],
    number: list[int | None],
) -> Iterator[None]:
    """Note which quantizers have seen a tensor with something in it; collect histograms where they are asked for."""
    handles = []
    inside: dict[str, Tensor] = {}  # what a quantizer that has not come to its end was handed

    def enter(quantizer: Quantizer, _module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor) and args[0].numel():
            inside[quantizer.name] = args[0]
            if quantizer.hides_infinity() and not _is_finite(args[0]):
                raise _not_finite([quantizer.name], number[0])
            if quantizer.name in histograms:
                histograms[quantizer.name].add(args[0].detach())

    def leave(quantizer: Quantizer, _module: nn.Module, _args: Any, _result: Any) -> None:
        if inside.pop(quantizer.name, None) is not None:
            seen.add(quantizer.name)

    try:
        for quantizer in quantizers:
            handles.append(quantizer.module.register_forward_pre_hook(partial(enter, quantizer)))
            handles.append(quantizer.module.register_forward_hook(partial(leave, quantizer)))
        yield
    except CalibrationError:
        odd = [name for name, value in inside.items() if not _is_finite(value)]
        if odd:
            raise _not_finite(odd, number[0]) from None
        raise
    finally:
        for handle in handles:
            handle.remove()


def drive(
    description: Description,
    chosen: Sequence[Quantizer],
    data: Data,
    *,
    inputs: Inputs | None = None,
    statistic: str = "native",
    advance: Callable[[], None] = lambda: None,
    known: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> int:
    """Calibrate the chosen quantizers in place; every other one neither observes nor quantizes.

    Args:
        description: The model and its quantizers.
        chosen: Quantizers whose ranges are to be found.
        data: Batches, or a callable that is given the model in eval mode and runs it itself.
        inputs: `callable(batch) -> (args, kwargs)`.
        statistic: "native", or a statistic for activation ranges: "percentile", "mse", "entropy".
        advance: Called after each batch.
        known: See :func:`observe_weights`.

    Returns:
        The number of batches that were run (0 where `data` is a callable).

    Raises:
        CalibrationError: No batch, a forward that raises, NaN or inf in an activation, a quantizer that never ran.
    """
    rigid = [q.name for q in chosen if statistic != "native" and q.needs is Needs.DATA and not q.takes_range()]
    if rigid:
        raise CalibrationError(
            f"no statistic can be chosen for {counted(len(rigid), 'quantizer')}",
            key=", ".join(shorten(collapse(rigid), 4)),
            expected="statistic='native'",
            found=f"statistic={statistic!r}",
        )
    seen: set[str] = set()
    histograms = {q.name: RangeHistogram() for q in chosen if statistic != "native" and q.needs is Needs.DATA}
    running = [q for q in chosen if not q.needs_no_forward()]
    with _held(description.quantizers):
        for quantizer in running:
            quantizer.start_observing()
        count = _run(description, running, data, seen, histograms, inputs, advance)
        still = [q for q in chosen if q.needs is Needs.WEIGHTS and q.name not in seen]
        observe_weights(still, known)
        compute_all_qparams(quantizer for quantizer in running if quantizer.name in seen)
        for quantizer in running:
            if quantizer.name in histograms:
                quantizer.set_range(*choose_range(histograms[quantizer.name], statistic))
    return count


@contextmanager
def _held(quantizers: Sequence[Quantizer]) -> Iterator[None]:
    """Quantizers that neither observe nor quantize until they are told to, and have their switches again afterwards."""
    try:
        for quantizer in quantizers:
            quantizer.disable()
        yield
    finally:
        for quantizer in quantizers:
            quantizer.restore_switches()


def _run(
    description: Description,
    chosen: Sequence[Quantizer],
    data: Data,
    seen: set[str],
    histograms: Mapping[str, RangeHistogram],
    inputs: Inputs | None,
    advance: Callable[[], None],
) -> int:
    """Show the data to the quantizers that listen; the number of batches."""
    model = description.view.model
    assert description.framework is not None
    count = 0
    number: list[int | None] = [None]  # of the batch that is running
    with (
        torch.no_grad(),
        quiet(),
        description.framework.evaluation(model) as call,
        _watched(chosen, seen, histograms, number),
    ):
        if callable(data):
            _call_user(data, call)
            _check_finite(chosen, seen, None)
        else:
            for batch in batches_of(data):
                number[0] = count
                try:
                    run_once(call, model, batch, inputs, count)
                except CalibrationError:
                    _check_finite(chosen, seen, count)  # NaN makes many forwards fail; it is the better word then
                    raise
                _check_finite(chosen, seen, count)
                count += 1
                advance()
    if not seen:
        ran = count or callable(data)
        raise CalibrationError(
            "no quantizer ran on the calibration data" if ran else "the calibration data held no batch",
            expected="at least one batch with at least one element",
            found=f"{count} batches",
            remedy="pass a non-empty iterable; a generator can be consumed only once",
        )
    _require_seen(chosen, seen)
    return count


def batches_of(data: Iterable[Any]) -> Iterator[Any]:
    """The batches; what a data loader raises is an error of the data, not of the model."""
    iterator: Iterator[Any] | None = None
    while True:
        try:
            iterator = iter(data) if iterator is None else iterator
            batch = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise CalibrationError(
                f"the calibration data raised {type(error).__name__} while it was read: {error}",
                remedy="iterate over it once without the model to see why",
            ) from error
        yield batch


def _call_user(data: Callable[[nn.Module], Any], call: Callable[..., Any]) -> None:
    try:
        data(call)  # type: ignore[arg-type]
    except Exception as error:
        raise CalibrationError(
            f"calibration callable raised {type(error).__name__}: {error}",
            remedy="it is called with the model in eval mode and should run it on calibration data",
        ) from error


def _check_finite(chosen: Sequence[Quantizer], seen: set[str], number: int | None) -> None:
    """One look at all ranges together, so that a device is synchronised once per batch."""
    found = [(q, value) for q in chosen if q.name in seen for value in q.ranges()]
    flags = read_numbers([torch.isfinite(value).all() for _, value in found])
    if not all(flags):
        raise _not_finite([q.name for (q, _), fine in zip(found, flags, strict=True) if not fine], number)


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def _not_finite(names: Sequence[str], number: int | None) -> CalibrationError:
    where = "" if number is None else f" in calibration batch {number}"
    return CalibrationError(
        f"NaN or inf reached {counted(len(set(names)), 'quantizer')}{where}",
        key=names[0],
        expected="finite values",
        found="NaN or inf in the observed range",
        remedy="look at the batch and at the weights; masks filled with -inf must not pass a quantizer",
    )


def _require_seen(chosen: Sequence[Quantizer], seen: set[str]) -> None:
    idle = [q.name for q in chosen if q.needs is Needs.DATA and q.name not in seen]
    if idle:
        raise CalibrationError(
            f"{counted(len(idle), 'quantizer')} never ran on the calibration data",
            key=", ".join(shorten(collapse(idle), 8)),
            expected="every quantizer sees at least one tensor",
            remedy="add batches that reach them; load_checkpoint also takes calibration='defer', which leaves all"
            f" quantizers to training, and keep= their names, such as {escape(idle[0]) + '*'!r},"
            " which leaves these as they are",
        )


def observe_weights(quantizers: Sequence[Quantizer], known: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> None:
    """Show each quantizer the tensor of the model's own that it quantizes; needs no data.

    Args:
        quantizers: Those that quantize weights.
        known: Name -> the range of that tensor, where it has been worked out and is all that the quantizer looks at.

    Raises:
        QParamError: NaN or inf in a weight.
    """
    with torch.no_grad(), quiet(), _held(quantizers):
        for quantizer in quantizers:
            assert quantizer.source is not None
            quantizer.start_observing()
            if known and quantizer.name in known:
                quantizer.observe_range(*known[quantizer.name])
            else:
                quantizer.observe(quantizer.source())
        _check_weights(quantizers)
        compute_all_qparams(quantizers)


def _check_weights(quantizers: Sequence[Quantizer]) -> None:
    """Some observers stop at NaN with an error that names nothing."""
    found = [(quantizer, value) for quantizer in quantizers for value in quantizer.ranges()]
    fine = read_numbers([torch.isfinite(value).all() for _, value in found])
    if not all(fine):
        odd = {q.name: q.site for (q, _), flag in zip(found, fine, strict=True) if not flag}
        raise QParamError(
            f"the weights of {counted(len(odd), 'quantizer')} hold NaN or inf",
            key=", ".join(shorten(collapse(list(odd)), 8)),
            expected="finite weights",
            found=f"NaN or inf in {', '.join(shorten(collapse(list(odd.values())), 8))}",
            remedy="take a checkpoint from before the weights were lost; no scale can be made of these",
        )
