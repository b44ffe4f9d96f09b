"""What the globals of a pickle become: data for the known ones, inert stand-ins for all others.

Nothing here imports or calls what a file names. `find_global` and `construct` look names up in the tables of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qat_compat.errors import LimitError
from qat_compat.schema import Spec
from qat_compat.storage.lazy import HeldTensor, LazyTensor, StoredTensor
from qat_compat.storage.qtensor import Quantizer
from qat_compat.storage.rebuild_numpy import make_array, numpy_dtype, numpy_from_buffer, numpy_scalar
from qat_compat.storage.standins import (
    Global,
    NumpyArray,
    NumpyDtype,
    Opaque,
    StateDict,
    StorageType,
    TypedStorage,
    Unreadable,
)
from qat_compat.storage.text import short
from qat_compat.storage.unsafe import is_dangerous, makes_memory, unsafe

__all__ = ["build", "check_key", "construct", "find_global"]

_MAX_KEY = 64
_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "UserDict": "collections"}  # Python 2's names


def _storage_types() -> dict[str, StorageType]:
    names = {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
        "QInt8": torch.qint8, "QUInt8": torch.quint8, "QInt32": torch.qint32,
        "QUInt4x2": torch.quint4x2, "QUInt2x4": torch.quint2x4, "Untyped": torch.uint8,
    }  # fmt: skip
    modules = ("torch", "torch.cuda", "torch.storage")
    return {
        f"{module}.{name}Storage": StorageType(f"{module}.{name}Storage", dtype)
        for module in modules
        for name, dtype in names.items()
    }


def _constants() -> dict[str, object]:
    kinds = (torch.dtype, torch.layout, torch.qscheme, torch.memory_format)
    named = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, kinds)}
    return {**named, **_storage_types()}


_CONSTANTS = _constants()


def find_global(module: str, name: str) -> object:
    """What a global of the file stands for; never an import.

    Raises:
        UnsafeCheckpointError: It is a callable that runs code or reaches the system.
    """
    module = _MODULES.get(module, module)
    path = f"{module}.{name}"
    if path in _CONSTANTS:
        return _CONSTANTS[path]
    if path in _BUILDERS:
        return Global(module, name)
    if is_dangerous(module, name):
        raise unsafe(path, "a callable that runs code or reaches the system")
    return Global(module, name)


def construct(function: object, args: tuple[Any, ...]) -> object:
    """What calling `function` would have made, without calling it.

    Raises:
        UnsafeCheckpointError: The call would hand out memory that the file does not fill, or runs code.
        CheckpointError: The arguments of a known rebuild function are malformed.
    """
    if isinstance(function, StorageType):
        raise unsafe(function.name, "a call that returns uninitialised memory")
    if isinstance(function, Opaque):
        return Opaque(f"{function.cls}()", args)
    if not isinstance(function, Global):
        raise TypeError(f"{type(function).__name__} is called")
    builder = _BUILDERS.get(function.path)
    if builder is not None:
        return builder(*args)
    if makes_memory(function.path):
        raise unsafe(function.path, "a call that returns uninitialised memory")
    if function.module == "torch" and function.name[:1].islower():
        raise unsafe(function.path, "a function call")
    return Opaque(function.path, args)


def build(target: object, state: Any) -> object:
    """Give `target` the state that the file has for it."""
    if isinstance(target, Opaque):
        both_dicts = isinstance(state, dict) and isinstance(target.state, dict)
        target.state = {**target.state, **state} if both_dicts else state
    elif isinstance(target, StateDict):
        if isinstance(state, dict):
            target._metadata = state.get("_metadata")
    elif isinstance(target, NumpyDtype):
        if state[1] in ("<", ">", "=", "|"):
            target.order = state[1]
    elif isinstance(target, NumpyArray):
        _, shape, dtype, fortran, data = state
        target.array = make_array(data, dtype, shape, "F" if fortran else "C")
    elif not isinstance(target, LazyTensor):  # attributes of a tensor are of no use to us
        raise TypeError(f"{type(target).__name__} is given a state")
    return target


# Builders: one function per known callable


def check_key(key: Any, budget: int = _MAX_KEY) -> Any:
    """Allow only keys whose hash is cheap: the hash of nested tuples that share their parts takes exponential time."""
    if isinstance(key, (tuple, frozenset)):
        deep = any(isinstance(part, tuple) and any(isinstance(inner, tuple) for inner in part) for part in key)
        if deep or sum(len(part) if isinstance(part, tuple) else 1 for part in key) > budget:
            raise LimitError(
                "a dictionary key is too complex",
                expected=f"a flat key of at most {budget} parts",
                found=f"{len(key)} parts" + (", deeply nested" if deep else ""),
                remedy="this is no trainer's file; do not use it",
            )
    return key


def _pairs(items: Any = ()) -> dict[Any, Any]:
    pairs = items.items() if isinstance(items, dict) else items
    return {check_key(key): value for key, value in pairs}


def _ordered(items: Any = ()) -> StateDict:
    return StateDict(_pairs(items))


def _tensor(storage: TypedStorage, offset: int, size: Any, stride: Any, *_: Any) -> StoredTensor:
    return StoredTensor(storage.storage, storage.dtype, tuple(size), stride=tuple(stride), offset=offset)


def _tensor_v2(
    storage: TypedStorage, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, metadata: Any = None
) -> StoredTensor:
    return _tensor_v3(storage, offset, size, stride, grad, hooks, storage.dtype, metadata)


def _tensor_v3(
    storage: TypedStorage, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, metadata: Any = None
) -> StoredTensor:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"a dtype of type {type(dtype).__name__}")
    flags = metadata if isinstance(metadata, dict) else {}
    return StoredTensor(
        storage.storage, dtype, tuple(size), stride=tuple(stride), offset=offset,
        conj=bool(flags.get("conj")), neg=bool(flags.get("neg")),
    )  # fmt: skip


def _quantized(storage: TypedStorage, offset: int, size: Any, stride: Any, parameters: Any, *_: Any) -> StoredTensor:
    scheme, scale, zero_point, *axis = parameters
    if not isinstance(scheme, torch.qscheme) or (axis and type(axis[0]) is not int):
        raise TypeError("malformed quantizer parameters")
    for value in (scale, zero_point):
        if not isinstance(value, (float, int, list, LazyTensor)):
            raise TypeError(f"quantizer parameters in a {type(value).__name__}")
    quantizer = Quantizer(scheme, scale, zero_point, axis[0] if axis else None)
    return StoredTensor(
        storage.storage, storage.dtype, tuple(size), stride=tuple(stride), offset=offset, quantizer=quantizer
    )


def _first(value: Any, *_: Any) -> Any:
    """The tensor itself: whether it wants gradients and what attributes it had do not matter here."""
    return value


def _from_type(function: Any, cls: Any, args: Any, state: Any) -> Any:
    made = construct(function, tuple(args))
    if isinstance(made, Unreadable):
        halves = state if isinstance(state, tuple) else (state,)  # (__dict__, slots) of a class with slots
        made.parts = {name: value for half in halves if isinstance(half, dict) for name, value in half.items()}
    return made


def _wrapper_subclass(cls: Any, dtype: Any, size: Any, *_: Any) -> Unreadable:
    name = cls.path if isinstance(cls, Global) else "an unknown class"
    return Unreadable(
        f"a tensor subclass ({name})",
        "save it in the framework's own flat form (safetensors), or dequantize it first",
        _spec(dtype, size),
        cls=name,
    )


def _spec(dtype: Any, size: Any) -> Spec:
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"a dtype of type {type(dtype).__name__}")
    return Spec(tuple(int(n) for n in size), dtype)


def _sparse(layout: Any, data: Any) -> Unreadable:
    values = next((part for part in data if isinstance(part, LazyTensor) and part.spec.dtype.is_floating_point), None)
    shape = next((part for part in reversed(data) if isinstance(part, tuple)), ())
    return Unreadable(
        f"sparse ({short(layout)})",
        "save `tensor.to_dense()` instead",
        Spec(tuple(shape), torch.float32 if values is None else values.spec.dtype),
    )


def _nested(buffer: LazyTensor, *_: Any) -> Unreadable:
    return Unreadable("a nested tensor", "save its parts under names of their own", buffer.spec)


def _meta(dtype: Any, size: Any, *_: Any) -> Unreadable:
    return Unreadable(
        "on the meta device: the file holds no data for it", "save the model after materialising it", _spec(dtype, size)
    )


def _device_tensor(data: Any, *_: Any) -> Any:
    if isinstance(data, NumpyArray) and data.array is not None:
        return HeldTensor(torch.from_numpy(data.array.copy()))
    return data


def _size(items: Any = ()) -> tuple[int, ...]:
    return tuple(items)


def _device(kind: Any, index: Any = None) -> str:
    if not isinstance(kind, str) or type(index) not in (int, type(None)):
        raise TypeError("a device without a name")
    return kind if index is None else f"{kind}:{index}"


def _layout(name: Any) -> object:
    if not isinstance(name, str):
        raise TypeError("a layout without a name")
    return _CONSTANTS.get(name, name)


def _encode(text: str, encoding: str = "latin1", *_: Any) -> bytes:
    if encoding.lower().replace("-", "").replace("_", "") not in ("latin1", "utf8", "ascii"):
        raise ValueError(f"codec {encoding!r}")
    return text.encode(encoding)


def _bytearray(data: Any = b"", encoding: str = "latin1") -> bytes:
    if isinstance(data, int):
        raise LimitError(
            "the pickle asks for memory that it does not fill",
            expected="the bytes themselves",
            found=f"bytearray({data})",
            remedy="this is no trainer's file; do not use it",
        )
    return _encode(data, encoding) if isinstance(data, str) else bytes(data)


def _collection(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    def builder(items: Any = (), *_: Any) -> Any:
        if not isinstance(items, (list, tuple, set, frozenset, dict)):
            raise TypeError(f"a {kind.__name__} of a {type(items).__name__}")
        return kind(check_key(item) for item in items) if kind in (set, frozenset) else kind(items)

    return builder


def _default_dict(factory: Any = None, items: Any = ()) -> dict[Any, Any]:
    return _pairs(items)


def _path(*parts: Any) -> str:
    if not all(isinstance(part, str) for part in parts):
        raise TypeError("a path of other things than names")
    return "/".join(parts).replace("//", "/")


def _reconstructor(cls: Any, base: Any = None, state: Any = None) -> object:
    made = construct(cls, ())
    if isinstance(made, Opaque) and state is not None:
        made.args = (state,)
    return made


def _new_object(cls: Any, *args: Any) -> object:
    return construct(cls, args)


_BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_wrapper_subclass": _wrapper_subclass,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_sparse_csr_tensor": _sparse,
    "torch._utils._rebuild_nested_tensor": _nested,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._utils._rebuild_device_tensor_from_numpy": _device_tensor,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _device_tensor,
    "torch._utils._rebuild_xla_tensor": _device_tensor,
    "torch._tensor._rebuild_from_type": _from_type,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _size,
    "torch.device": _device,
    "torch.serialization._get_layout": _layout,
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": _default_dict,
    "collections.Counter": _pairs,
    "collections.deque": _collection(list),
    "builtins.set": _collection(set),
    "builtins.frozenset": _collection(frozenset),
    "builtins.list": _collection(list),
    "builtins.dict": _pairs,
    "builtins.tuple": _collection(tuple),
    "builtins.bytearray": _bytearray,
    "builtins.complex": complex,
    "_codecs.encode": _encode,
    "copyreg._reconstructor": _reconstructor,
    "copyreg.__newobj__": _new_object,
    "pathlib.PosixPath": _path,
    "pathlib.PurePosixPath": _path,
    "pathlib.WindowsPath": _path,
    "pathlib.PureWindowsPath": _path,
    "pathlib._local.PosixPath": _path,
    "pathlib._local.WindowsPath": _path,
    "numpy.dtype": numpy_dtype,
    **{
        f"numpy.{core}.{function}": builder
        for core in ("core", "_core")
        for function, builder in (
            ("multiarray.scalar", numpy_scalar),
            ("multiarray._reconstruct", lambda *_: NumpyArray()),
            ("numeric._frombuffer", numpy_from_buffer),
        )
    },
}
