"""Assertions that decide whether a load, a way back or a resume is right; they share no code with the engine.

The oracle is the *twin*: the state that a user reaches without this package, by loading the float weights into the
float model, preparing it and calibrating it with the quantizers' own code (:func:`native_calibration`). What the
package gives on a freshly prepared model must equal it bit for bit. Use these in your own test-suite, with your own
model and `prepare`.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.ao.quantization import FakeQuantizeBase as TorchFakeQuantize
from torch.utils import _pytree as pytree

__all__ = [
    "Twin",
    "assert_resume",
    "assert_round_trip",
    "assert_same_output",
    "assert_same_state",
    "assert_twin",
    "native_calibration",
    "scramble",
]

Inputs = Callable[[Any], tuple[tuple[Any, ...], dict[str, Any]]]
MakeFloat = Callable[[], nn.Module]
Prepare = Callable[[nn.Module], nn.Module]

_SHOWN = 40


class Twin(NamedTuple):
    """The two models that :func:`assert_twin` found equal, and the report of the load.

    Args:
        native: Loaded as float, prepared, calibrated by the framework itself.
        loaded: Prepared with other weights, then loaded by `qat_compat`.
        report: What `load_checkpoint` returned.
    """

    native: nn.Module
    loaded: nn.Module
    report: Any


def native_calibration(model: nn.Module, batches: Iterable[Any], inputs: Inputs | None = None) -> None:
    """Calibrate a prepared model with nothing but its own quantizers.

    This is the definition that the package is held to: eval mode, `torch.no_grad()`, observers on, fake-quant off, the
    batches in order; then `scale, zero_point = quantizer.calculate_qparams()` is written into the quantizer's buffers.
    Every flag, the training mode, the RNG and every buffer that is no quantizer's (BN statistics,
    `num_batches_tracked`) are then as before.

    Exported programs (PT2E) run in their eval form, made by `move_exported_model_to_eval` on a copy of the graph that
    shares the modules. torchao's `IntxFakeQuantizer` has no observer: static and range-learning ones take their values
    in a forward of the first batch with fake-quant on (`initialize_fake_quantizers`), dynamic ones need nothing.

    Example:
        >>> import torch
        >>> from torch.ao.quantization import FakeQuantize, MinMaxObserver
        >>> model = torch.nn.Sequential(FakeQuantize(observer=MinMaxObserver), torch.nn.Dropout())
        >>> native_calibration(model, [torch.tensor([0.0, 2.55])])
        >>> round(model[0].scale.item(), 6), model.training, model[0].fake_quant_enabled.item()
        (0.01, True, 1)

    Args:
        model: Prepared for QAT by torch.ao (eager, FX), torchao PT2E or torchao `QATConfig`.
        batches: What the model is driven with. torchao's lazy quantizers take the first one only.
        inputs: `batch -> (args, kwargs)`. Default: a tensor is the only argument, a mapping holds keyword arguments, a
            tuple or list holds positional arguments and is cut to as many as `forward` takes.
    """
    observing = list(_fake_quantizers(model))
    lazy = [quantizer for quantizer in _intx_quantizers(model) if not quantizer.config.is_dynamic]
    if not observing and not lazy and not _observers(model):
        return
    switches = [(q, q.observer_enabled.clone(), q.fake_quant_enabled.clone()) for q in observing]
    intx = [(q, q.enabled) for q in _intx_quantizers(model)]
    others = [(buffer, buffer.clone()) for buffer in _plain_buffers(model)]
    devices = range(torch.cuda.device_count())
    with _eval_form(model) as runner, torch.random.fork_rng(devices), torch.no_grad():
        try:
            for quantizer, *_ in switches:
                quantizer.observer_enabled.fill_(1)
                quantizer.fake_quant_enabled.fill_(0)
            for quantizer, _ in intx:
                quantizer.enabled = True
            for index, batch in enumerate(batches):
                if not observing and not _observers(model) and index:
                    break
                args, kwargs = (inputs or _Inputs(model))(batch)
                for quantizer in lazy:
                    # What `initialize_fake_quantizers` does, which cannot pass keyword arguments.
                    quantizer._initialized = True
                runner(*args, **kwargs)
            for quantizer in observing:
                scale, zero_point = quantizer.calculate_qparams()
                _write(quantizer.scale, scale)
                _write(quantizer.zero_point, zero_point)
        finally:
            for quantizer, observe, fake in switches:
                quantizer.observer_enabled.copy_(observe)
                quantizer.fake_quant_enabled.copy_(fake)
            for quantizer, enabled in intx:
                quantizer.enabled = enabled
            for buffer, value in others:
                buffer.copy_(value)


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
    found, wanted = _full_state(actual), _full_state(expected)
    lines = [f"{key}: missing" for key in wanted if key not in found]
    lines += [f"{key}: not expected" for key in found if key not in wanted]
    for key, value in wanted.items():
        if key in found and (difference := _difference(found[key], value)):
            lines.append(f"{key}: {difference}")
    if isinstance(actual, nn.Module) and isinstance(expected, nn.Module):
        lines += [f"{group}: share memory, but should not" for group in sorted(_ties(actual) - _ties(expected))]
        lines += [f"{group}: should share memory" for group in sorted(_ties(expected) - _ties(actual))]
    _fail(lines)


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
            forms = {name: stack.enter_context(_mode(model, mode)) for name, model in pair.items()}
            for batch in batches:
                results = {}
                for name, form in forms.items():
                    args, kwargs = (inputs or _Inputs(pair[name]))(batch)
                    with torch.random.fork_rng(), torch.no_grad():
                        torch.manual_seed(0)
                        results[name] = {f"{mode} output {i}": v for i, v in enumerate(_leaves(form(*args, **kwargs)))}
                assert_same_state(results["actual"], results["expected"])
        assert_same_state(pair["actual"], pair["expected"])


def assert_twin(
    make_float: MakeFloat,
    prepare: Prepare,
    state: Mapping[str, Any],
    batches: Sequence[Any],
    *,
    source: Any = None,
    make_target: MakeFloat | None = None,
    outputs: bool = True,
    **load_options: Any,
) -> Twin:
    """Assert that `load_checkpoint` gives exactly what float load, prepare and native calibration give.

    Example:
        >>> import torch
        >>> from torch.ao.quantization import get_default_qat_qconfig, prepare_qat
        >>> def make_float():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        >>> def prepare(model):
        ...     model.qconfig = get_default_qat_qconfig("x86")
        ...     return prepare_qat(model.train())
        >>> twin = assert_twin(make_float, prepare, make_float().state_dict(), [torch.randn(2, 4)])
        >>> "0.weight_fake_quant.scale" in twin.loaded.state_dict()
        True

    Args:
        make_float: Makes the float model; called twice.
        prepare: Float model -> the model prepared for QAT.
        state: Float state dict, complete for `make_float()`.
        batches: Calibration data; iterated several times.
        source: What `load_checkpoint` reads instead of `state` (a path, say); it must hold the same values.
        make_target: Makes the float model that is prepared and loaded by `qat_compat` (on another device, say).
            Default: `make_float()` with every value changed, so that nothing can be right by chance.
        outputs: Whether to compare forward outputs, too.
        load_options: Passed on to `load_checkpoint`.

    Raises:
        AssertionError: With every key that differs.
    """
    import qat_compat as qc

    with torch.random.fork_rng():
        native = _native(make_float, prepare, state)
        loaded = prepare(make_target() if make_target else scramble(make_float()))
    native_calibration(native, batches, load_options.get("inputs"))
    modes = _modes(loaded)
    options = {"calibration": batches, **load_options}
    report = qc.load_checkpoint(loaded, state if source is None else source, **options)
    assert_same_state(loaded, native)
    _fail([f"{name}: training mode was {mode}" for name, mode in modes.items() if _modes(loaded)[name] != mode])
    if outputs:
        assert_same_output(loaded, native, batches, inputs=load_options.get("inputs"))
    return Twin(native, loaded, report)


def assert_round_trip(
    make_float: MakeFloat,
    prepare: Prepare,
    state: Mapping[str, Any],
    *,
    batches: Sequence[Any] = (),
    inputs: Inputs | None = None,
    unaided: Collection[str] | None = ("model",),
    ordered: Collection[str] = ("model",),
    lost: Collection[str] = (),
    names: Literal["tell", "silent", "mislead"] = "tell",
) -> None:
    """Assert that `to_float` of the prepared model, of its state dict and of its file gives the float state dict again.

    Keys, their order, dtypes and bits are compared. Each source is tried with `like=` as a model, a state dict and a
    list of keys; and without it, where it must either succeed or refuse with an error that names `like`.

    Example:
        >>> import torch
        >>> from torch.ao.quantization import get_default_qat_qconfig, prepare_qat
        >>> def make_float():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        >>> def prepare(model):
        ...     model.qconfig = get_default_qat_qconfig("x86")
        ...     return prepare_qat(model.train())
        >>> assert_round_trip(make_float, prepare, make_float().state_dict())

    Args:
        make_float: Makes the float model.
        prepare: Float model -> the model prepared for QAT.
        state: Float state dict, complete for `make_float()`.
        batches: If given, the model is calibrated with them before, so that quantizer state is not in its initial form.
        inputs: As in :func:`native_calibration`.
        unaided: The sources (of "model", "state_dict", "file") that must be converted without `like=`; None if that is
            not tried, because nothing in the prepared model tells a saved buffer from one that is not saved.
        ordered: The sources that, without `like=`, must give the keys in the float model's order.
        names: Whether the names of the float keys, which may be all that a state dict or a list of keys as `like=` has
            to offer, tell where the keys of a QAT state dict or file belong. If they are "silent", such a `like=`
            may be refused; if they "mislead" (a BN that is named after another convolution, so that the naming
            convention is wrong), neither it nor the state dict or file alone is tried.
        lost: Globs of float keys that the prepared model does not hold; with `like=` they must be there, with any
            value.

    Raises:
        AssertionError: With every key that differs, for the source concerned.
    """
    import qat_compat as qc

    with torch.random.fork_rng():
        float_model = make_float()
        float_model.load_state_dict(state)
        expected = {key: copy.deepcopy(value) for key, value in float_model.state_dict().items()}
        model = prepare(float_model)
        like = scramble(make_float())
    if batches:
        native_calibration(model, batches, inputs)
    before = {key: copy.deepcopy(value) for key, value in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "qat.pt"
        torch.save(model.state_dict(), path)
        sources: dict[str, Any] = {"model": model, "state_dict": model.state_dict(), "file": path}
        for name, source in sources.items():
            for witness in (like, like.state_dict(), list(expected)):
                weak = name != "model" and not isinstance(witness, nn.Module)
                if weak and names == "mislead":
                    continue
                try:
                    back = qc.to_float(source, like=witness)
                except qc.PlanError:
                    if not weak or names != "silent":
                        raise
                else:
                    _assert_float(back, expected, f"{name}, like={type(witness).__name__}", lost=lost)
            if unaided is None or (name != "model" and names == "mislead"):
                continue
            try:
                back = qc.to_float(source)
            except qc.CompatError as error:
                if name in unaided or "like" not in str(error):
                    raise
            else:
                held = {key: v for key, v in expected.items() if key in back or not _matches(key, lost)}
                _assert_float(back, held, name, ordered=name in ordered, lost=lost)
    assert_same_state(model.state_dict(), before)


def assert_resume(
    make_float: MakeFloat,
    prepare: Prepare,
    qat_model: nn.Module,
    batches: Sequence[Any],
    **load_options: Any,
) -> Any:
    """Assert that the state of a QAT model goes into an equal QAT model as it is, and is never calibrated again.

    Tried with the state dict, without its `_metadata`, from a file, and with calibration data passed along.

    Example:
        >>> import torch
        >>> from torch.ao.quantization import get_default_qat_qconfig, prepare_qat
        >>> def make_float():
        ...     return torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        >>> def prepare(model):
        ...     model.qconfig = get_default_qat_qconfig("x86")
        ...     return prepare_qat(model.train())
        >>> trained = prepare(make_float())
        >>> _ = trained(torch.randn(2, 4))
        >>> report = assert_resume(make_float, prepare, trained, [torch.randn(2, 4)])

    Args:
        make_float: Makes the float model.
        prepare: Float model -> the model prepared for QAT.
        qat_model: A model of that kind, calibrated or trained.
        batches: Calibration data which must have no effect.
        load_options: Passed on to `load_checkpoint`.

    Returns:
        The report of the last load.

    Raises:
        AssertionError: With every key that differs, or if anything was synthesized.
    """
    import qat_compat as qc

    saved = qat_model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "qat.pt"
        torch.save(saved, path)
        report = None
        for source, calibration in ((saved, None), (dict(saved), None), (path, None), (saved, batches)):
            with torch.random.fork_rng():
                fresh = prepare(scramble(make_float()))
            report = qc.load_checkpoint(fresh, source, calibration=calibration, **load_options)
            assert_same_state(fresh, qat_model)
            counts = {"derived": report.derived, "synthesized": report.synthesized}
            _fail([f"resume: {count} entries were {word}" for word, count in counts.items() if count])
    return report


def scramble(model: nn.Module, seed: int = 1234) -> nn.Module:
    """Change every parameter and every persistent floating-point buffer of a model, in place.

    A test that loads into a model which holds the right values already proves nothing.

    Example:
        >>> import torch
        >>> model = torch.nn.BatchNorm1d(2)
        >>> bool((scramble(model).running_var > 0).all()), model.num_batches_tracked.item() != 0
        (True, True)

    Args:
        model: The model. Tensors on the meta device are left alone.
        seed: Two seeds give two different models.

    Returns:
        The same model.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = {id(parameter) for parameter in model.parameters()}
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not isinstance(tensor, Tensor) or tensor.is_meta:
                continue
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                # Buffers may be variances: positive, away from zero.
                tensor.copy_(noise - 0.5 if id(tensor) in parameters else noise + 0.5)
            elif name.endswith("num_batches_tracked"):
                tensor.fill_(7 + seed % 7)
    return model


# --- what a model holds ---------------------------------------------------------------------------


def _classes(*names: tuple[str, str]) -> tuple[type, ...]:
    """Classes of modules that are imported already; a model cannot hold an instance of any other."""
    return tuple(getattr(sys.modules[module], name) for module, name in names if module in sys.modules)


def _of_class(model: nn.Module, classes: tuple[type, ...]) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, classes)] if classes else []


def _fake_quantizers(model: nn.Module) -> list[Any]:
    torchao = _classes(("torchao.quantization.pt2e.fake_quantize", "FakeQuantizeBase"))
    return _of_class(model, (TorchFakeQuantize, *torchao))


def _intx_quantizers(model: nn.Module) -> list[Any]:
    return _of_class(model, _classes(("torchao.quantization.qat.fake_quantizer", "IntxFakeQuantizer")))


def _observers(model: nn.Module) -> list[Any]:
    names = ("torch.ao.quantization.observer", "torchao.quantization.pt2e.observer")
    return _of_class(model, _classes(*((name, "ObserverBase") for name in names)))


def _plain_buffers(model: nn.Module) -> Iterator[Tensor]:
    """Buffers that belong to no quantizer or observer."""
    owned = {
        id(buffer)
        for quantizer in [*_fake_quantizers(model), *_observers(model), *_intx_quantizers(model)]
        for buffer in quantizer.buffers()
    }
    return (buffer for buffer in model.buffers() if id(buffer) not in owned)


def _write(buffer: Tensor, value: Tensor) -> None:
    if buffer.shape != value.shape:
        buffer.resize_(value.shape)
    buffer.copy_(value)


# --- modes ----------------------------------------------------------------------------------------


def _is_exported(model: nn.Module) -> bool:
    return isinstance(model, torch.fx.GraphModule) and any("val" in node.meta for node in model.graph.nodes)


def _modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@contextmanager
def _mode(model: nn.Module, mode: str) -> Iterator[nn.Module]:
    """What to call for a forward in that mode."""
    if mode == "eval":
        with _eval_form(model) as runner:
            yield runner
    elif _is_exported(model):
        yield model
    else:
        yield model.train()


@contextmanager
def _eval_form(model: nn.Module) -> Iterator[nn.Module]:
    """What to call for a forward in eval mode; every module's mode is afterwards as it was."""
    if _is_exported(model):
        assert isinstance(model, torch.fx.GraphModule)
        pt2e = importlib.import_module("torchao.quantization.pt2e")
        form = torch.fx.GraphModule(model, copy.deepcopy(model.graph))
        if hasattr(model, "_exported_training"):
            form._exported_training = model._exported_training
        with torch.random.fork_rng():  # it traces its patterns with random inputs
            form = pt2e.move_exported_model_to_eval(form)
        yield form
        return
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, training in modes:
            module.training = training


class _Inputs:
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


# --- comparison -----------------------------------------------------------------------------------


def _native(make_float: MakeFloat, prepare: Prepare, state: Mapping[str, Any]) -> nn.Module:
    model = make_float()
    model.load_state_dict(state)
    return prepare(model)


def _full_state(source: nn.Module | Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(source, nn.Module):
        return dict(source)
    state = dict(source.state_dict())
    intx = {id(quantizer) for quantizer in _intx_quantizers(source)}
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
    """Its bytes: NaN equals NaN, and -0.0 is not 0.0."""
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


def _leaves(output: Any) -> list[Tensor]:
    """The tensors of any output; a mapping that pytree does not know is taken by its values."""
    leaves: list[Tensor] = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Mapping):
            leaves += _leaves(list(leaf.values()))
        elif isinstance(leaf, Tensor):
            leaves.append(leaf)
    return leaves


def _matches(key: str, globs: Collection[str]) -> bool:
    return any(fnmatchcase(key, glob) for glob in globs)


def _assert_float(
    back: Mapping[str, Any], expected: Mapping[str, Any], source: str, *, ordered: bool = True, lost: Collection[str]
) -> None:
    found = dict(back.items())
    wanted = {key: found.get(key, value) if _matches(key, lost) else value for key, value in expected.items()}
    try:
        assert_same_state(found, wanted)
    except AssertionError as error:
        raise AssertionError(f"to_float of {source}: {error}") from None
    for key, right in zip(found, wanted, strict=True):
        if ordered and key != right:
            raise AssertionError(f"to_float of {source}: order of keys: {key!r} is where {right!r} should be")


def _fail(lines: Sequence[str]) -> None:
    if not lines:
        return
    shown = [f"  {line}" for line in sorted(lines)[:_SHOWN]]
    if len(lines) > _SHOWN:
        shown.append(f"  ... and {len(lines) - _SHOWN} more")
    noun = "entry differs" if len(lines) == 1 else "entries differ"
    raise AssertionError("\n".join([f"{len(lines)} {noun}", *shown]))
