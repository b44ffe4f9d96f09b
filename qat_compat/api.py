"""The public verbs."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Unpack

import torch
from torch import nn

from qat_compat.calibration import calibrate
from qat_compat.convert import convert_checkpoint
from qat_compat.driving import Inputs
from qat_compat.floating import to_float
from qat_compat.loading import load, planned
from qat_compat.names import Rename
from qat_compat.options import CalibrationLike, Globs, LoadOptions, Options
from qat_compat.plan import Plan
from qat_compat.report import Report
from qat_compat.saving import write
from qat_compat.source import SourceLike, open_any
from qat_compat.storage import Checkpoint

__all__ = [
    "calibrate",
    "convert_checkpoint",
    "load_checkpoint",
    "open_checkpoint",
    "plan_load",
    "save_checkpoint",
    "to_float",
]


def open_checkpoint(source: SourceLike, *, select: str | None = None) -> Checkpoint:
    """Open a file, folder or mapping as a lazy mapping of tensors; nothing in it is run.

    Example:
        >>> import torch
        >>> checkpoint = open_checkpoint({"epoch": 3, "state_dict": {"fc.weight": torch.ones(2, 4)}})
        >>> list(checkpoint), checkpoint.spec("fc.weight").shape, checkpoint.metadata["epoch"], checkpoint.framework
        (['fc.weight'], (2, 4), 3, 'plain')

    Args:
        source: Path of a file or folder, a mapping, or a module.
        select: Which of several sets of weights: a dotted path (`"trainer.var_wo_ddp"`), `"ema"` or `"model"`;
            `""` for tensors at the top of the file, beside other sets.

    Raises:
        CheckpointError: The source is corrupt, of an unknown format, or has no such part.
    """
    return open_any(source, select=select).checkpoint


def save_checkpoint(obj: SourceLike, path: str | PathLike[str], *, backup: bool = False) -> Path:
    """Write a module or state_dict so that the old file or the new one is there at any moment, never neither.

    A module's sites and the state that its state_dict does not hold are written beside the weights; the file still
    loads with plain torch (`.pt`) or safetensors (`.safetensors`). Of a converted model, a `.pt` file has the objects
    that torch itself would save, and a `.safetensors` file the tensors in them. Training state is not written: of an
    opened checkpoint the weights are saved, and a mapping that holds an optimizer or the like is refused.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_checkpoint(nn.Linear(2, 3), f"{folder}/model.pt")
        ...     sorted(torch.load(path, weights_only=True))
        ['bias', 'weight']

    Args:
        obj: A module, a state_dict or an opened checkpoint.
        path: Destination; its suffix chooses the container.
        backup: Keep what stood there under a dated name.

    Raises:
        SaveError: The file cannot be written, or not all of it; what stood at the destination is unchanged.
    """
    return write(obj, path, backup=backup)


def plan_load(model: nn.Module, source: SourceLike, **options: Unpack[LoadOptions]) -> Plan:
    """What :func:`load_checkpoint` would do with the same arguments: changes nothing and reads no tensor data.

    Example:
        >>> from torch import nn
        >>> plan = plan_load(nn.Linear(2, 3), nn.Linear(2, 3).state_dict())
        >>> plan.ok, plan.copied
        (True, 2)

    Returns:
        The plan; its `problems` say why it cannot be carried out, if it cannot.
    """
    return planned(model, source, Options(**options))


def load_checkpoint(
    model: nn.Module,
    source: SourceLike,
    *,
    calibration: CalibrationLike = None,
    inputs: Inputs | None = None,
    select: str | None = None,
    float_model: nn.Module | None = None,
    rename: Rename = (),
    keep: Globs = (),
    drop: Globs = (),
    statistic: str = "native",
    inplace: bool = False,
    mmap: bool = False,
    device: torch.device | str | None = None,
    progress: bool | None = None,
) -> Report:
    """Load any checkpoint into a model, QAT-prepared or not, and synthesize what the file cannot hold.

    All or nothing: on any exception the model is as it was, storages included.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import torch.ao.quantization as tq
        >>> trained = nn.Sequential(tq.QuantStub(), nn.Linear(4, 2))
        >>> model = nn.Sequential(tq.QuantStub(), nn.Linear(4, 2))
        >>> model.qconfig = tq.get_default_qat_qconfig("x86")
        >>> model = tq.prepare_qat(model.train())
        >>> report = load_checkpoint(model, trained.state_dict(), calibration=[torch.randn(8, 4)])
        >>> report.copied, report.synthesized
        (2, 12)

    Args:
        model: The target; usually freshly QAT-prepared. May be on the meta device.
        source: Path, state_dict (nested or not), opened checkpoint or module.
        calibration: Batches; a callable that is given the model in eval mode and runs it; a :class:`Calibration` or
            its path; `"defer"` to leave activation ranges to the first training batches; None if nothing needs data.
        inputs: `callable(batch) -> (args, kwargs)`. By default a tensor is the only argument, a mapping becomes
            keywords, a tuple or list is cut to the positional parameters of `forward`. Tensors go to the model's
            device either way; where some must not (lengths of packed sequences), pass a callable as `calibration`.
        select: Which of several sets of weights in the file.
        float_model: The unprepared model: exact evidence for names that fusion took away.
        rename: Ordered (regex, replacement) pairs over source keys.
        keep: Globs over float entries of the model that may stay as they are. A glob that matches none of them is
            matched against the names of quantizers, which then keep the state that they have: those that no calibration
            data reaches, say, would be an error otherwise.
        drop: Globs over source keys to ignore.
        statistic: How activation ranges are chosen: "native", as the model's own quantizers do; "percentile" (99.99 %
            of the values); "mse" or "entropy" (the range that a grid of 256 levels rounds with the least error or
            loss of information, whatever the quantizer's own number of levels).
        inplace: Read straight into the model's own parameters: no second copy, and no way back once reading has begun.
            Otherwise a parameter, though the same object, has new memory afterwards: what shares the old one without
            being the model's (`share_memory()`, a flat buffer of which parameters are views, a captured CUDA graph)
            does not see the load. Buffers (running statistics, observers) have new memory either way.
        mmap: Assign tensors that lie over the file without a copy, where dtype and device agree. The first write to a
            page copies it, and none reaches the file. The file must outlive the model unchanged: what another process
            writes into it may be seen here, and where it cuts the file short, touching the tensor kills this process.
            A file that is replaced by renaming, as :func:`save_checkpoint` does, is safe.
        device: Where tensors of a meta-device model are made; by default, where its other tensors are, or else on
            torch's default device.
        progress: Show progress bars; by default on a terminal only.

    Returns:
        A report with the provenance of every value.

    Raises:
        PlanError: Source and model cannot be joined; `problems` lists every reason.
        CalibrationError: Activation quantizers that nothing fills, or data that cannot be used.
        QParamError: A scale or zero_point that no quantizer can use.
        CheckpointError: The source cannot be read.
    """
    options = Options(
        calibration, inputs, select, float_model, rename, keep, drop, statistic, inplace, mmap, device, progress
    )
    return load(model, source, options)
