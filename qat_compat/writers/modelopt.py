"""A folder that NVIDIA ModelOpt restores: `modelopt_state.pth` and `model.safetensors`, as its plugin for Hugging Face
names them, so that with that plugin (and a `config.json`) `from_pretrained` takes it, too.

`mto.restore_from_modelopt_state(model, modelopt_state_path=...)` puts the quantizers into a float model, and
`load_state_dict` then fills it. The state lists every quantizer that ModelOpt gives the model, also those of modules
without tensors, and is refused if one is missing or too many (`restore_quantizer_state`, nvidia-modelopt 0.47). So
ModelOpt itself makes it, from the float model (`like=`) without its data.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat_compat.conventions import Form, Grid
from qat_compat.encodings import form_to_record
from qat_compat.errors import CompatError, PlanError, Problem, ProblemKind
from qat_compat.frameworks import Needs, Quantizer
from qat_compat.names import canonical_path, canonical_site
from qat_compat.schema import Role, Spec
from qat_compat.state import join_path
from qat_compat.storage import Checkpoint, new_folder, save
from qat_compat.terms import Levels, parse_grid, written
from qat_compat.writers.job import Job

__all__ = ["write"]

_KINDS = ("weight", "input", "output")
_LEAF = "_amax"


@dataclass(frozen=True)
class _Range:
    """The range of one of ModelOpt's quantizers.

    Args:
        name: The quantizer's name.
        form: How it is written down.
        shape: That of `_amax`.
        attributes: The rest of its configuration.
        read: Gives `_amax`, in any shape.
    """

    name: str
    form: Form
    shape: tuple[int, ...]
    attributes: Mapping[str, Any]
    read: Callable[[], Tensor]

    @property
    def key(self) -> str:
        return f"{self.name}.{_LEAF}"

    @property
    def configuration(self) -> dict[str, Any]:
        grid = self.form.grid
        integers = {"num_bits": grid.bits, "unsigned": not grid.signed, "narrow_range": grid.narrow}
        return {**integers, **self.attributes, "enable": True}


def write(job: Job) -> None:
    """The folder.

    Raises:
        CompatError: The float model is not given, or ModelOpt is not there.
        PlanError: ModelOpt has no quantizer that would do what one of the source does.
    """
    if not isinstance(job.like, nn.Module):
        raise CompatError(
            "ModelOpt's record lists the quantizers of every module, also of those that have no tensors",
            key="like",
            expected="the float model",
            found=type(job.like).__name__,
            remedy="pass the model that the folder will be restored into as like=",
        )
    _require_package()
    ranges = {one.key: one for one in _ranges(job, job.like)}
    outline = _outline(job, job.like, list(ranges.values()))
    specs = {key: Spec(tuple(value.shape), value.dtype) for key, value in outline.state_dict().items()}
    record = {"encodings": {one.name: form_to_record(one.form) for one in ranges.values()}}

    def read(key: str) -> Tensor:
        if key not in ranges:
            return job.floats[key]
        return ranges[key].read().detach().to(torch.float32).reshape(ranges[key].shape)

    from modelopt.torch import opt

    with new_folder(job.out) as folder:
        save(Checkpoint(specs, read, name=job.source.checkpoint.name), folder / "model.safetensors", record=record)
        state = io.BytesIO()
        torch.save(opt.modelopt_state(outline), state)  # into memory: to a full disk, torch raises errors of its own
        (folder / "modelopt_state.pth").write_bytes(state.getvalue())
        config: Any = getattr(job.like, "config", None)
        if hasattr(config, "to_dict"):
            (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def _require_package() -> None:
    try:
        importlib.import_module("modelopt.torch.quantization")
    except ImportError as error:
        raise CompatError(
            "ModelOpt's record of a model is written by ModelOpt itself",
            key="to",
            expected="the package nvidia-modelopt",
            found=f"{type(error).__name__}: {error}",
            remedy="pip install nvidia-modelopt requests",
        ) from error


def _outline(job: Job, model: nn.Module, ranges: Iterable[_Range]) -> Any:
    """The float model without data, with ModelOpt's quantizers."""
    from modelopt.torch import quantization

    memo: dict[int, Any] = {id(value): torch.empty_like(value, device="meta") for value in model.buffers()}
    for value in model.parameters():
        memo[id(value)] = nn.Parameter(torch.empty_like(value, device="meta"), value.requires_grad)
    chosen = {"*": {"enable": False}, **{one.name: one.configuration for one in ranges}}
    with contextlib.redirect_stdout(io.StringIO()):  # it counts what it inserts
        outline = quantization.quantize(copy.deepcopy(model, memo), {"quant_cfg": chosen, "algorithm": None})
    modules = dict(outline.named_modules())
    absent = [one.name for one in ranges if one.name not in modules]
    if absent:
        detail = "ModelOpt has no quantizer there"
        _refuse(job, [Problem(ProblemKind.LOSSY, name, detail) for name in absent])
    for one in ranges:
        modules[one.name].register_buffer(_LEAF, torch.empty(one.shape, device="meta"))
    return outline


def _refuse(job: Job, problems: list[Problem]) -> None:
    summary = "ModelOpt cannot hold this source exactly"
    raise PlanError(problems, file=job.source.checkpoint.name, summary=summary)


# --- what the source holds --------------------------------------------------------------------------------------------


def _ranges(job: Job, model: nn.Module) -> list[_Range]:
    paths = {canonical_path(path): path for path, _ in model.named_modules()}
    held = job.source.schema.by_quantizer()
    made = {name: _of_state(job, name, keys, paths) for name, keys in held.items()}
    if job.source.description is not None:
        alone = [q for q in job.source.description.quantizers if q.needs is Needs.NOTHING and q.name not in held]
        made |= {quantizer.name: _of_weight(job, quantizer, paths) for quantizer in alone}
    problems = [
        Problem(ProblemKind.LOSSY, name, one, "write it as float") for name, one in made.items() if isinstance(one, str)
    ]
    found = [one for one in made.values() if isinstance(one, _Range)]
    twice = sorted(name for name, count in Counter(one.name for one in found).items() if count > 1)
    problems += [Problem(ProblemKind.AMBIGUOUS, name, "two quantizers of the source are there") for name in twice]
    if not found and not problems:
        detail = "nothing says to which integers its values are rounded"
        remedy = "pass the prepared module with its quantizers, or a file that save_checkpoint wrote of it"
        problems.append(Problem(ProblemKind.MISSING, job.source.checkpoint.name, detail, remedy))
    if problems:
        _refuse(job, problems)
    return found


def _of_state(job: Job, quantizer: str, keys: list[str], paths: Mapping[str, str]) -> _Range | str | None:
    """The range that a quantizer holds; why ModelOpt cannot hold it; None where there are settings only."""
    schema = job.source.schema
    scale, zero_point = _key(job, keys, Role.SCALE), _key(job, keys, Role.ZERO_POINT)
    amax = next((key for key in keys if schema[key].leaf == _LEAF), None)
    first = amax or scale
    words = schema.grids.get(quantizer, "")
    levels = parse_grid(words)
    if not any(schema[key].role.is_observed for key in keys):
        return None
    if first is None or levels is None:
        return "the source's grid is not known"
    grid = None if levels.along or levels.centred != "symmetric" else _grid(levels)
    if grid is None:
        return f"its grid is {words}, and ModelOpt's are symmetric, of whole bits, along the first axis"
    form = Form("modelopt.int", grid, {_LEAF: _LEAF})

    def read() -> Tensor:
        if amax is not None:
            return job.source.read(amax)
        tensors = {key: job.source.read(key) for key in (scale, zero_point) if key is not None}
        if zero_point is None:
            tensors[""] = torch.zeros((), device="cpu")  # of a grid that has no other
        return written(schema, form, tensors)[_LEAF]

    return _range(job, schema[keys[0]].site, paths, form, torch.Size(schema[first].shape).numel(), read)


def _of_weight(job: Job, quantizer: Quantizer, paths: Mapping[str, str]) -> _Range | str:
    """The range that a quantizer works out of its weight, which is that of the weight as it now is."""
    roundings = quantizer.roundings()
    if len(roundings) != 1:
        return "its range is worked out anew for every tensor"
    ((key, one),) = roundings.items()
    if not one.symmetric:
        return "its zero point is another than 0, and ModelOpt's are 0"
    form = Form("modelopt.int", Grid(one.bits), {_LEAF: _LEAF})
    count = torch.Size(job.source.schema[key].shape).numel() // one.group

    def read() -> Tensor:
        scale = job.source.computed(key, one.sources, one.compute).scale
        return form.written(scale.to(torch.float32), torch.zeros((), device="cpu"))[_LEAF]

    return _range(job, quantizer.site, paths, form, count, read)


def _range(
    job: Job, site: str, paths: Mapping[str, str], form: Form, count: int, read: Callable[[], Tensor]
) -> _Range | str:
    """The range of ModelOpt's quantizer at a site, of which there are so many; why there is none."""
    kind, _, host = canonical_site(site).partition(":")
    if "+" in host:
        return "it quantizes a weight that a normalization is folded into, and ModelOpt the weight itself"
    if kind not in _KINDS or host not in paths:
        return f"ModelOpt has no quantizer for {site}"
    path = paths[host]
    layout = _layout(job, join_path(path, "weight") if kind == "weight" else "", count)
    if layout is None:
        return "its ranges are of another granularity than ModelOpt has"
    return _Range(join_path(path, f"{kind}_quantizer"), form, *layout, read)


def _key(job: Job, keys: list[str], role: Role) -> str | None:
    """The quantizer's tensor of a role; what is computed goes before what it is computed from."""
    schema = job.source.schema
    found = [key for key in keys if schema[key].role is role]
    computed = [key for key in found if key in schema.recipes]
    return next(iter(computed or found), None)


def _grid(levels: Levels) -> Grid | None:
    """The grid of so many levels, where it is one of whole bits."""
    signed = levels.low < 0
    bits = (levels.high + 1).bit_length() - 1 + int(signed)
    grid = Grid(bits, signed, signed and levels.low == -levels.high)
    return grid if (grid.low, grid.high) == (levels.low, levels.high) else None


def _layout(job: Job, weight: str, count: int) -> tuple[tuple[int, ...], dict[str, Any]] | None:
    """Shape of `_amax` and the configuration that gives it: so many ranges of a weight, or of an activation ("")."""
    if count == 1:
        return (), {"axis": None}
    if not weight or weight not in job.floats:
        return None
    rows, *rest = job.floats.spec(weight).shape
    columns = torch.Size(rest).numel()
    if count == rows:
        return (rows, *(1 for _ in rest)), {"axis": 0}
    if len(rest) == 1 and count % rows == 0 and columns % (count // rows) == 0:
        return (count, 1), {"axis": None, "block_sizes": {-1: columns * rows // count, "type": "static"}}
    return None
