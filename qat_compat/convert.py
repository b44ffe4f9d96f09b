"""From any form to any other that can hold the same, tensor by tensor."""

from __future__ import annotations

import os
from pathlib import Path

from qat_compat.errors import CompatError
from qat_compat.floating import Like, to_float
from qat_compat.source import SourceLike, open_any
from qat_compat.writers import TAKE_LIKE, WRITERS, Job

__all__ = ["convert_checkpoint"]


def convert_checkpoint(
    source: SourceLike, to: str, out: str | os.PathLike[str], *, select: str | None = None, like: Like | None = None
) -> Path:
    """Write a checkpoint, or a trained QAT model, in another form, one tensor at a time, all or nothing.

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.TemporaryDirectory()
        >>> int8 = {"fc.weight": torch.tensor([[2, -4]], dtype=torch.int8), "fc.weight_scale": torch.tensor([[0.5]])}
        >>> path = convert_checkpoint(int8, "float", f"{folder.name}/model.safetensors")
        >>> to_float(path)["fc.weight"]
        tensor([[ 1., -2.]])
        >>> folder.cleanup()

    Args:
        source: Path, state_dict, opened checkpoint or module.
        to: "float" (a `.pt` or `.safetensors` file of plain tensors), "torchao" (its own safetensors file, of tensor
            subclasses), or "compressed-tensors" (a folder that Hugging Face and vLLM read): these two take a module
            prepared by torchao's QATConfig or what :func:`save_checkpoint` wrote of it, and what torchao or
            compressed-tensors converted to integers. "modelopt" (a
            folder with the `modelopt_state.pth` from which ModelOpt restores) takes what has a symmetric range for
            each quantizer, on known integers: prepared modules, and files that :func:`save_checkpoint` wrote of them.
        out: The destination; for "compressed-tensors" and "modelopt" a folder that is not there yet.
        select: Which of several sets of weights in the file.
        like: The float layout, for "float" (see :func:`to_float`); the float model itself, for "modelopt".

    Returns:
        The path of `out`.

    Raises:
        PlanError: The target cannot hold the source exactly; `problems` lists every reason.
        CheckpointError: The source cannot be read.
        SaveError: The destination cannot be written; what stood there is unchanged.
    """
    if to not in WRITERS:
        raise CompatError(
            f"a checkpoint cannot be written as {to!r}",
            key="to",
            expected=", ".join(WRITERS),
            found=repr(to),
            remedy="load the checkpoint into the model that you prepared, and save it with its own package",
        )
    if like is not None and to not in TAKE_LIKE:
        expected = " or ".join(f"to={name!r}" for name in TAKE_LIKE)
        raise CompatError("the option is for other forms", key="like", expected=expected, found=f"to={to!r}")
    path = Path(os.fsdecode(out))
    opened = open_any(source, select=select)
    WRITERS[to](Job(opened, to_float(source, select=select, like=like), path, to, like))
    return path
