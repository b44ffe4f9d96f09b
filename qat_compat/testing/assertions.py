"""The twin, the round trip and the resume, one call each."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from qat_compat.devices import forked_rng
from qat_compat.testing.calibration import native_calibration
from qat_compat.testing.comparison import assert_same_output, assert_same_state, fail_with
from qat_compat.testing.modes import Inputs, training_modes
from qat_compat.testing.scrambling import scramble

MakeFloat = Callable[[], nn.Module]
Prepare = Callable[[nn.Module], nn.Module]


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

    with forked_rng():
        native = _native(make_float, prepare, state)
        loaded = prepare(make_target() if make_target else scramble(make_float()))
    native_calibration(native, batches, load_options.get("inputs"))
    modes = training_modes(loaded)
    options = {"calibration": batches, **load_options}
    report = qc.load_checkpoint(loaded, state if source is None else source, **options)
    assert_same_state(loaded, native)
    fail_with(
        [f"{name}: training mode was {mode}" for name, mode in modes.items() if training_modes(loaded)[name] != mode]
    )
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

    with forked_rng():
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
            with forked_rng():
                fresh = prepare(scramble(make_float()))
            report = qc.load_checkpoint(fresh, source, calibration=calibration, **load_options)
            assert_same_state(fresh, qat_model)
            counts = {"derived": report.derived, "synthesized": report.synthesized}
            fail_with([f"resume: {count} entries were {word}" for word, count in counts.items() if count])
    return report


def _native(make_float: MakeFloat, prepare: Prepare, state: Mapping[str, Any]) -> nn.Module:
    model = make_float()
    model.load_state_dict(state)
    return prepare(model)


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
