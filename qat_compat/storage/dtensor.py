"""DTensors of torch.distributed in a state_dict or a pickle: FSDP2's and tensor parallelism's parameters."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from qat_compat.errors import CheckpointError
from qat_compat.storage.lazy import LazyTensor
from qat_compat.storage.standins import Opaque, Unreadable

__all__ = ["undistributed"]


def undistributed(key: str, value: Any) -> Any:
    """A DTensor of which this process holds every element, as the plain tensor that it is; anything else as it is.

    Raises:
        CheckpointError: It is one rank's part of a DTensor. To ask the other ranks for theirs could wait for ever.
    """
    if isinstance(value, Unreadable) and value.cls.endswith(".DTensor"):
        shape, local, layout = value.spec.shape, value.parts.get("_local_tensor"), value.parts.get("_spec")
        placements = layout.attributes().get("placements", ()) if isinstance(layout, Opaque) else ()
        partial = any(isinstance(one, Opaque) and one.cls.endswith("Partial") for one in placements)
        held = local.spec.shape if isinstance(local, LazyTensor) else None
    elif isinstance(value, Tensor) and hasattr(value, "to_local") and hasattr(value, "placements"):
        shape, local = tuple(value.shape), value.to_local()
        partial = any(one.is_partial() for one in value.placements)
        held = tuple(local.shape)
    else:
        return value
    if held == shape and not partial:
        return local
    raise CheckpointError(
        "a tensor is one rank's part of a distributed one (DTensor)",
        key=key,
        expected=f"all of {list(shape)}",
        found="a partial sum" if partial else f"a part: {list(held) if held is not None else 'nothing'}",
        remedy="save with torch.distributed.checkpoint, or pass get_model_state_dict(model,"
        " options=StateDictOptions(full_state_dict=True))",
    )
