"""PyTorch Lightning: beside every checkpoint of a QAT run, the same weights under their float keys."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fsspec.core import url_to_fs
from lightning.pytorch.plugins.io import TorchCheckpointIO

from qat_compat.api import save_checkpoint, to_float
from qat_compat.source import SourceLike

__all__ = ["FloatBeside"]


class FloatBeside(TorchCheckpointIO):  # type: ignore[misc,unused-ignore]  # where Lightning is not installed
    """A `CheckpointIO` that writes `last.float.safetensors` beside `last.ckpt`, and removes both together.

    Lightning's links (`save_last="link"`) and the checkpoints of strategies that write them by themselves, a folder of
    shards, say, get none.

    The checkpoint itself is what Lightning writes without this, and is there before the other one is begun: whatever
    stands in the way of the float file, the run can be resumed.

    Example::

        trainer = Trainer(plugins=[FloatBeside(like=LitModel())])

    Args:
        like: A module, path or state_dict with the wanted keys, as in :func:`qat_compat.to_float`. Without it the names
            are those that the QAT checkpoint itself tells.

    Raises:
        PlanError: From the first save on, if the checkpoint does not tell its float names.
        SaveError: The float file cannot be written.
    """

    def __init__(self, *, like: SourceLike | None = None) -> None:
        super().__init__()
        self.like = like

    def save_checkpoint(
        self, checkpoint: Mapping[str, Any], path: str | PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Write the checkpoint, then the float file."""
        super().save_checkpoint(checkpoint, path, storage_options)
        weights = to_float(checkpoint, like=self.like)
        if not _is_remote(path):
            save_checkpoint(weights, self.float_path(path))
            return
        with TemporaryDirectory() as folder:
            local = save_checkpoint(weights, Path(folder, "model.safetensors"))
            files, there = url_to_fs(_float_name(path))
            files.put_file(str(local), there)

    def remove_checkpoint(self, path: str | PathLike[str]) -> None:
        """Remove both files."""
        super().remove_checkpoint(path)
        if not _is_remote(path):
            self.float_path(path).unlink(missing_ok=True)
            return
        files, there = url_to_fs(_float_name(path))
        if files.exists(there):
            files.rm_file(there)

    @staticmethod
    def float_path(path: str | PathLike[str]) -> Path:
        """Where the float file of a checkpoint on a disk is."""
        return Path(_float_name(path))


def _float_name(path: str | PathLike[str]) -> str:
    return f"{fspath(path).removesuffix('.ckpt')}.float.safetensors"


def _is_remote(path: str | PathLike[str]) -> bool:
    """Whether it is one of the URLs that Lightning takes as well (`s3://`, `gs://`, `memory://`)."""
    return "://" in fspath(path)
