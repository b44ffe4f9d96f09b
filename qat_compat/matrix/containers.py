"""The containers of the matrix: in each of them the same state_dict is handed over, as its own system writes it."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["CONTAINERS", "Container"]

State = Mapping[str, Any]
Source = State | Path


@dataclass(frozen=True)
class Container:
    """One way to hand over a state_dict.

    Args:
        name: Its name in test ids and reports.
        write: State_dict and an empty folder -> what is passed to the library.
        plain: Whether it holds nothing but plain tensors: no quantized ones, no tuples of them.
        needs: A package without which it cannot be written.
    """

    name: str
    write: Callable[[State, Path], Source]
    plain: bool = False
    needs: str = ""

    @property
    def installed(self) -> bool:
        return not self.needs or find_spec(self.needs) is not None


def _memory(state: State, folder: Path) -> Source:
    return state


def _zip(state: State, folder: Path) -> Source:
    torch.save(state, folder / "state.pt")
    return folder / "state.pt"


def _legacy(state: State, folder: Path) -> Source:
    torch.save(state, folder / "state.pth", _use_new_zipfile_serialization=False)
    return folder / "state.pth"


def _separate(state: State) -> dict[str, Tensor]:
    """Safetensors takes no two tensors that share memory."""
    return {key: value.detach().cpu().clone().contiguous() for key, value in state.items()}


def _safetensors(state: State, folder: Path) -> Source:
    save_file(_separate(state), folder / "state.safetensors")
    return folder / "state.safetensors"


def _sharded(state: State, folder: Path) -> Source:
    """Two files and their index, in the layout of Hugging Face."""
    tensors = _separate(state)
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    weight_map = {key: names[index % 2] for index, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key] for key, where in weight_map.items() if where == name}, folder / name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _distributed(state: State, folder: Path) -> Source:
    from torch.distributed.checkpoint.state_dict_saver import save

    save(dict(state), checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


def _lightning(state: State, folder: Path) -> Source:
    """What Lightning's own trainer writes for a module that holds the network as `model`."""
    import lightning

    class Holder(lightning.LightningModule):  # type: ignore[misc]
        def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
            return _prefixed(state, "model.")

    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(Holder())
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def _prefixed(state: State, prefix: str) -> dict[str, Any]:
    """The state_dict of a wrapper, with the version record that torch keeps beside it."""
    wrapped: OrderedDict[str, Any] = OrderedDict((prefix + key, value) for key, value in state.items())
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        moved = {f"{prefix}{name}".removesuffix("."): version for name, version in versions.items()}
        wrapped._metadata = {"": {"version": 1}, **moved}  # type: ignore[attr-defined]
    return wrapped


def _data_parallel(state: State, folder: Path) -> Source:
    return _zip(_prefixed(state, "module."), folder)


def _compiled(state: State, folder: Path) -> Source:
    return _zip(_prefixed(state, "_orig_mod."), folder)


CONTAINERS: dict[str, Container] = {
    container.name: container
    for container in (
        Container("memory", _memory),
        Container("pt", _zip),
        Container("legacy", _legacy),
        Container("safetensors", _safetensors, plain=True),
        Container("sharded", _sharded, plain=True),
        Container("dcp", _distributed, plain=True),
        Container("lightning", _lightning, needs="lightning"),
        Container("module-prefixed", _data_parallel),
        Container("compiled", _compiled),
    )
}
