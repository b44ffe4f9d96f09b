"""Where the weights are inside a training checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from qat_compat.errors import CheckpointError
from qat_compat.storage.candidates import has_tensors, is_weights, top_of
from qat_compat.storage.standins import Opaque
from qat_compat.text import shorten

__all__ = ["Found", "SeveralSetsError", "locate", "state_beside"]


class SeveralSetsError(CheckpointError):
    """The file is sound, and does not tell which of its weights are meant."""


class Trainer(NamedTuple):
    """What one system writes. `weights` lists its paths, the one that the system itself loads first."""

    name: str
    marks: tuple[str, ...]  # paths that tell this system from others; all must be there
    weights: tuple[str, ...]
    ema: str = ""  # which of them is the moving average, and which the live model, where both can be there
    live: str = ""
    beside: tuple[str, ...] = ()  # mappings of tensors under the same names, that belong to the weights


# One row per trainer; the first row that fits is taken. A system that prefers its average has it first in `weights`.
TRAINERS = (
    Trainer("Lightning with weight averaging", ("pytorch-lightning_version", "current_model_state"),
            ("state_dict", "current_model_state"), ema="state_dict", live="current_model_state"),
    Trainer("Lightning", ("pytorch-lightning_version",), ("state_dict", "model"), live="state_dict"),
    Trainer("Super-Gradients", ("ema_net",), ("ema_net", "net"), ema="ema_net", live="net"),
    Trainer("Super-Gradients", ("net",), ("net",), live="net"),
    Trainer("SparseML", ("source", "model", "recipe"), ("ema", "model"), ema="ema", live="model"),
    Trainer("Ultralytics", ("train_args", "model"),
            ("ema", "model"), ema="ema", live="model", beside=("modelopt.ranges",)),
    Trainer("Ultralytics", ("ema", "updates"),
            ("ema", "model"), ema="ema", live="model", beside=("modelopt.ranges",)),
    Trainer("VAR", ("trainer.var_wo_ddp",), ("trainer.var_wo_ddp", "trainer.vae_local"), live="trainer.var_wo_ddp"),
    Trainer("ModelOpt", ("modelopt_state", "model_state_dict"), ("model_state_dict",), live="model_state_dict"),
    Trainer("timm", ("state_dict_ema",), ("state_dict_ema", "state_dict"), ema="state_dict_ema", live="state_dict"),
    Trainer("timm", ("model_ema",), ("model_ema", "state_dict", "model"), ema="model_ema", live="model"),
    Trainer("BasicSR", ("params_ema",), ("params", "params_ema"), ema="params_ema", live="params"),
    Trainer("Detectron2", ("model", "iteration"), ("model",), live="model"),
    Trainer("DeepSpeed", ("module", "ds_version"), ("module",), live="module"),
    Trainer("minimind", ("model", "world_size"), ("model",), live="model"),
)  # fmt: skip

# Names that mean "the model" wherever they stand, for a system without a row.
LIVE = (
    "model_state_dict", "state_dict", "model_state", "model", "net", "network", "module", "weights", "params", "blobs",
    "net_state_dict", "model_weights", "backbone",
)  # fmt: skip
EMA = ("ema_state_dict", "model_ema", "state_dict_ema", "ema_model", "ema", "ema_net", "params_ema", "averaged_model")

# First words of what is never a model, though it holds tensors.
_STATE = (
    "optim",
    "opt_",
    "var_opt",
    "scaler",
    "sched",
    "lr_sched",
    "rng",
    "loops",
    "callbacks",
    "hyper_param",
    "hyperparam",
    "grad",
    "metrics",
    "averaging",
)
_MAX_DEPTH = 4
_MAX_LISTED = 12


class Found(NamedTuple):
    """The weights that were chosen.

    Args:
        path: Where they are, dotted; "" for the root.
        node: The mapping or module.
        beside: Mappings of tensors that belong to them.
        others: Paths of the other sets of weights.
        note: What was decided, and on what grounds; "" if there was nothing to decide.
        taken: Paths of everything that is weights; what is elsewhere is training state.
    """

    path: str
    node: object
    beside: tuple[object, ...]
    others: tuple[str, ...]
    note: str
    taken: tuple[str, ...] = ()


def locate(tree: object, select: str | None) -> Found:
    """Choose one set of weights out of what a file holds.

    Example:
        >>> import torch
        >>> w = {"fc.weight": torch.zeros(2, 3)}
        >>> found = locate({"net": w, "ema_net": w, "epoch": 3}, None)
        >>> found.path, found.note
        ('ema_net', 'weights are `ema_net`, which Super-Gradients itself loads first; also there: net')

    Args:
        tree: Nested mappings with tensors (or pickled modules) in them.
        select: "ema", "model", a dotted path ("" for the root), or None for the trainer's own preference.

    Raises:
        CheckpointError: There are no weights, the path is wrong, or nothing tells which of several to take.
    """
    if is_weights(tree):
        if select not in (None, "", "model"):
            raise _wrong_path(select, ["the file is a bare state_dict: leave `select` out"])
        return Found("", tree, (), (), "")
    sets = dict(_search(tree, "", 0))
    if sets and (top := top_of(tree, _is_state)) is not None:
        sets[""] = top
    if not sets and select and is_weights(named := _get(tree, select)):
        sets[select] = named  # under a name that training state has, and asked for all the same
    if not sets and has_tensors(tree):  # tensors and settings side by side, in one mapping
        return Found("", tree, (), (), "")
    if not sets:
        raise CheckpointError(
            "no weights were found",
            expected="a state_dict, or a mapping with one in it",
            found=_summary(tree),
            remedy="pass the file that holds the model, or select= the dotted path of its weights",
        )
    trainer = next((row for row in TRAINERS if all(_has(tree, mark) for mark in row.marks) and _paths(row, sets)), None)
    path, reason = _choose(tree, sets, trainer, select)
    beside = [extra for extra in (trainer.beside if trainer else ()) if isinstance(_get(tree, extra), Mapping)]
    others = tuple(other for other in sets if other != path and other not in beside)
    also = ", ".join(shorten(list(map(_shown, others)), _MAX_LISTED))
    where = f"`{path}`" if path else _shown(path)
    note = f"weights are {where}{reason}; also there: {also}" if others and select is None else ""
    nodes = tuple(_get(tree, extra) for extra in beside)
    return Found(path, sets[path], nodes, others, note, (path, *others, *beside))


def state_beside(tree: object, found: Found) -> dict[str, Any]:
    """What a file holds apart from its weights.

    Example:
        >>> import torch
        >>> tree = {"trainer": {"vae": {"w": torch.zeros(2)}, "config": {"depth": 2}}, "args": None}
        >>> state_beside(tree, locate(tree, None))
        {'trainer': {'config': {'depth': 2}}, 'args': None}
    """
    if not isinstance(tree, Mapping) or found.node is tree:
        return {}
    top = top_of(tree, _is_state) if "" in found.taken else None
    rest = {key: value for key, value in tree.items() if top is None or key not in top}
    copies: dict[int, dict[Any, Any]] = {}
    for path in filter(None, found.taken):
        _remove(rest, _keys_to(tree, path), copies)
    return {str(key): value for key, value in rest.items()}


def _remove(tree: dict[Any, Any], keys: tuple[str, ...], copies: dict[int, dict[Any, Any]]) -> None:
    """Take an entry out of nested mappings, and with it the mappings that then hold nothing; the originals stay.

    Each of them is copied once; `copies` has those by their identity.
    """
    first, *others = keys
    below = tree.get(first)
    if others and isinstance(below, Mapping):
        if id(below) not in copies:
            tree[first] = below = dict(below)
            copies[id(below)] = below
        _remove(copies[id(below)], tuple(others), copies)
        if below:
            return
    tree.pop(first, None)


def _choose(tree: object, sets: dict[str, object], trainer: Trainer | None, select: str | None) -> tuple[str, str]:
    if select is not None:
        return _selected(tree, sets, trainer, select), ""
    if trainer is not None:
        return _paths(trainer, sets)[0], f", which {trainer.name} itself loads first"
    for name in LIVE:
        if path := _below(name, sets):
            return path, ", the live weights"
    if "" in sets:
        return "", ", the live weights"
    if len(sets) == 1:
        return next(iter(sets)), ""
    for name in EMA:
        if path := _below(name, sets):
            return path, ", the averaged weights"
    raise SeveralSetsError(
        "several sets of weights, and nothing tells which is the model",
        expected="one set of weights",
        found=", ".join(list(sets)[:_MAX_LISTED]),
        remedy=f"pass select={next(iter(sets))!r}, or another of them",
    )


def _selected(tree: object, sets: dict[str, object], trainer: Trainer | None, select: str) -> str:
    if select in sets:
        return select
    names: tuple[str, ...] = ()
    if select == "ema":
        names = (trainer.ema,) if trainer and trainer.ema else EMA
    elif select == "model":
        names = (trainer.live,) if trainer and trainer.live else LIVE
    for name in names:
        if path := _below(name, sets):
            return path
    if select == "model" and "" in sets:
        return ""
    if _has(tree, select) and is_weights(node := _get(tree, select)):
        sets[select] = node
        return select
    if path := _below(select, sets):
        return path
    raise _wrong_path(select, list(sets))


def _wrong_path(select: str | None, right: list[str]) -> CheckpointError:
    return CheckpointError(
        "the file has no weights there",
        key=f"select={select!r}",
        expected=", ".join(map(_shown, right[:_MAX_LISTED])),
        found=repr(select),
        remedy=f"pass select={right[0]!r}"
        if len(right) == 1 and " " not in right[0]
        else "select one of those, or leave it out",
    )


def _paths(trainer: Trainer, sets: dict[str, object]) -> list[str]:
    found = (_below(path, sets) for path in trainer.weights)
    return [path for path in found if path]


def _below(path: str, sets: dict[str, object]) -> str:
    """`path`, or the only set of weights under it (`ema.module`); "" if there is none."""
    if path in sets:
        return path
    under = [other for other in sets if other.startswith(path + ".")]
    return under[0] if len(under) == 1 else ""


def _search(node: object, path: str, depth: int) -> Iterator[tuple[str, object]]:
    if depth > _MAX_DEPTH or not isinstance(node, Mapping):
        return
    for key, value in node.items():
        if not isinstance(key, str) or _is_state(key) or key.endswith("_extra_state"):
            continue
        below = f"{path}.{key}" if path else key
        if is_weights(value):
            yield below, value
        else:
            yield from _search(value, below, depth + 1)


def _is_state(key: str) -> bool:
    return key == "opt" or key.lower().startswith(_STATE)


def _shown(path: str) -> str:
    return path or "the tensors at the top (select='')"


def _keys_to(tree: object, path: str) -> tuple[str, ...]:
    """The keys that a dotted path stands for, which may themselves hold dots; none if it leads nowhere."""
    if not isinstance(tree, Mapping):
        return ()
    if path in tree:
        return (path,)
    for index, letter in enumerate(path):
        if letter == "." and path[:index] in tree and (below := _keys_to(tree[path[:index]], path[index + 1 :])):
            return (path[:index], *below)
    return ()


def _get(tree: Any, path: str) -> Any:
    """What is at a dotted path; None if it leads nowhere."""
    keys = _keys_to(tree, path)
    for key in keys:
        tree = tree[key]
    return tree if keys or not path else None


def _has(tree: object, path: str) -> bool:
    return bool(_keys_to(tree, path))


def _summary(tree: object) -> str:
    if isinstance(tree, Mapping):
        keys = [str(key) for key in list(tree)[:_MAX_LISTED]]
        return f"a mapping with {len(tree)} keys: {', '.join(keys)}" if keys else "an empty mapping"
    return f"a {tree.cls}" if isinstance(tree, Opaque) else f"a {type(tree).__name__}"
