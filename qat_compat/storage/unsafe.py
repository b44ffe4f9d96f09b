"""Which callables a checkpoint has no business naming.

Nothing that a file names is ever called here, so these lists protect no one from this package. They tell the user that
the file would do harm elsewhere, instead of passing over it in silence.
"""

from __future__ import annotations

import re

from qat_compat.errors import UnsafeCheckpointError

__all__ = ["is_dangerous", "makes_memory", "unsafe"]

# Standard packages that run code, reach the system or load further pickles, whatever name of theirs is used.
_DANGEROUS_MODULES = frozenset(
    {
        "_ctypes", "_io", "_pickle", "_posixsubprocess", "asyncio", "bdb", "cPickle", "code", "codeop", "ctypes",
        "ensurepip", "ftplib", "http", "importlib", "io", "linecache", "marshal", "multiprocessing", "nt", "os", "pdb",
        "pickle", "pip", "pkgutil", "popen2", "posix", "pty", "requests", "runpy", "setuptools", "shelve", "shutil",
        "smtplib", "socket", "subprocess", "sys", "telnetlib", "timeit", "urllib", "venv", "webbrowser", "zipimport",
    }
)  # fmt: skip
_DANGEROUS_NAMES = frozenset(
    {
        "builtins.__import__", "builtins.apply", "builtins.breakpoint", "builtins.compile", "builtins.delattr",
        "builtins.eval", "builtins.exec", "builtins.execfile", "builtins.exit", "builtins.file", "builtins.globals",
        "builtins.input", "builtins.locals", "builtins.open", "builtins.quit", "builtins.raw_input", "builtins.reload",
        "builtins.setattr", "builtins.vars", "dill.load", "dill.loads", "joblib.load", "numpy.fromfile", "numpy.load",
        "numpy.memmap", "torch.load", "torch.storage._load_from_bytes",
    }
)  # fmt: skip
_DANGEROUS_PREFIXES = (
    "numpy.distutils.",
    "numpy.f2py.",
    "numpy.testing.",
    "torch.hub.",
    "torch.jit.",
    "torch.package.",
    "torch.serialization.load",
    "torch.utils.cpp_extension.",
    "torch.utils.model_zoo.",
)
_TENSOR_CLASS = re.compile(
    r"torch(\.cuda|\.sparse|\.cuda\.sparse|\.storage|\.nn\.parameter|\._tensor)?\.\w*(Tensor|Storage|Parameter|Buffer)"
)


def is_dangerous(module: str, name: str) -> bool:
    """Whether a global runs code, reaches the system or loads further files when it is called."""
    path = f"{module}.{name}"
    return (
        module.partition(".")[0] in _DANGEROUS_MODULES
        or path in _DANGEROUS_NAMES
        or path.startswith(_DANGEROUS_PREFIXES)
    )


def makes_memory(path: str) -> bool:
    """Whether a call of this class returns memory that nothing has filled."""
    return _TENSOR_CLASS.fullmatch(path) is not None


def unsafe(path: str, why: str) -> UnsafeCheckpointError:
    """The error for a file that names `path`."""
    return UnsafeCheckpointError(
        "the file would run code if it were read the usual way; it is not read",
        expected="tensors and plain data",
        found=f"{path}: {why}",
        remedy="get the weights as safetensors, or ask whoever made the file for a plain state_dict",
    )
