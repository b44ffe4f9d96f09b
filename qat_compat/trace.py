"""Which module a model calls right after which other one: evidence for names that fusion took away.

Three ways, strongest first: a symbolic trace of the whole model, the same of the parent module alone (where the whole
model has control flow that cannot be traced), and the order that an `nn.Sequential` defines. A fourth one watches a
real forward.
"""

from __future__ import annotations

import copy
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from qat_compat.isolation import preserved_random_state
from qat_compat.state import join_path, modules_like, modules_of, split_path

__all__ = ["Passes", "followers", "watch_followers"]

_MOST_CONDITIONS = 256  # a loop on a traced value would otherwise never end
_MOST_VALUES = 20_000  # nor a loop in a loop, each over a number of the data
# What a number that depends on the data is taken to be, by what a condition is: a small and a large size of anything.
_NUMBERS = {True: 1024, False: 1}

_TRACING = threading.Lock()

Passes = Callable[[nn.Module], bool]


class _LeafTracer(torch.fx.Tracer):
    """Records calls of modules that hold no other module of the model's own; never enters the given leaves.

    Args:
        leaves: `id` of the modules not to enter.
        branch: What a condition on a traced value is taken to be, and by it what a number is; None refuses to trace
            either. A call that is seen under either answer is a call that the model makes.
    """

    def __init__(self, leaves: frozenset[int], branch: bool | None) -> None:
        super().__init__()
        self._leaves = leaves
        self._branch = branch
        self._conditions = self._values = 0
        self._thread = threading.get_ident()

    # torch.fx puts its own `__call__` and `__getattr__` into `nn.Module` while it traces, for every thread

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, torch.fx.Proxy]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self._leaves or super().is_leaf_module(m, module_qualified_name)

    def to_bool(self, obj: torch.fx.Proxy) -> bool:
        self._conditions += 1
        if self._branch is None or self._conditions > _MOST_CONDITIONS:
            return super().to_bool(obj)
        return self._branch

    def proxy(self, node: torch.fx.Node) -> torch.fx.Proxy:
        self._values += 1
        if self._branch is None:
            return super().proxy(node)
        if self._values > _MOST_VALUES:
            raise torch.fx.proxy.TraceError(f"more than {_MOST_VALUES} values")
        return _NumberProxy(node, self, _NUMBERS[self._branch])


class _NumberProxy(torch.fx.Proxy):
    """A traced value that is a number where one is asked for: `int(x.shape[-1])`, `math.sqrt(x.size(1))`."""

    def __init__(self, node: torch.fx.Node, tracer: torch.fx.Tracer, number: int) -> None:
        super().__init__(node, tracer)
        self._number = number

    def __int__(self) -> int:
        return self._number

    def __index__(self) -> int:
        return self._number

    def __float__(self) -> float:
        return float(self._number)


def _trace(root: nn.Module, leaves: frozenset[int]) -> list[torch.fx.Graph]:
    """The graphs of module calls of `root`, one per way through it; the module's attributes are as they were."""
    found: list[torch.fx.Graph] = []
    for branch in (None, True, False):
        attributes = [(module, dict(module.__dict__)) for module in root.modules()]
        try:
            # two traces at once would each give `nn.Module` back what the other had put there
            with _TRACING, preserved_random_state(), _own_methods():
                found.append(_LeafTracer(leaves, branch).trace(root))
        except Exception:  # tracing runs the user's forward with proxies: any error at all means "cannot be traced"
            continue
        finally:
            for module, saved in attributes:
                module.__dict__.clear()
                module.__dict__.update(saved)
        if branch is None:
            break
    return found


@contextmanager
def _own_methods() -> Iterator[None]:
    """What torch.fx replaces, methods of `nn.Module` and functions, is as before, whatever an interrupt cut short."""
    module: Any = nn.Module
    fx: Any = torch.fx._symbolic_trace
    call, get, patcher = module.__call__, module.__getattr__, getattr(fx, "CURRENT_PATCHER", None)
    try:
        yield
    finally:
        left: Any = getattr(fx, "CURRENT_PATCHER", None)
        if left is not None and left is not patcher:
            left.revert_all_patches()
            fx.CURRENT_PATCHER = patcher
        module.__call__, module.__getattr__ = call, get


def _without_data(model: nn.Module, leaves: Iterable[nn.Module]) -> nn.Module:
    """A copy of the modules with tensors that hold nothing, so that a trace runs none of the user's code on his model.

    A trace does not enter a leaf, so of that the outside is enough. A model that cannot be copied is traced itself.
    """
    inside = {id(leaf): leaf for leaf in leaves}
    entered = _entered(model, set(inside))
    memo: dict[int, Any] = {}
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            empty = torch.empty_like(tensor, device="meta", requires_grad=False)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    try:
        shells = [(leaf, _shell(leaf, memo)) for leaf in inside.values()]
        memo.update({id(leaf): shell for leaf, shell in shells})
        memo.update(_empty_copies(module for module in model.modules() if id(module) in entered))
        copied: nn.Module = copy.deepcopy(model, memo)
    except Exception:  # modules may hold what cannot be copied: locks, files, generators
        return model
    nothing = nn.Module()
    for leaf, shell in shells:
        children = leaf._modules.items()
        shell.__dict__["_modules"] = {
            name: child and (memo[id(child)] if id(child) in entered else nothing) for name, child in children
        }
    return copied


def _empty_copies(modules: Iterable[nn.Module]) -> dict[int, Any]:
    """Most of what a module holds are mappings for hooks with nothing in them, which `deepcopy` takes long for."""
    held = (value for module in modules for value in module.__dict__.values())
    return {id(value): type(value)() for value in held if type(value) in (dict, OrderedDict, set) and not value}


def _shell(leaf: nn.Module, memo: Mapping[int, Any]) -> nn.Module:
    """The same module less its children, with the tensors that `memo` has for its own."""
    shell: nn.Module = leaf.__new__(type(leaf))
    tensors = {
        kind: {name: memo.get(id(tensor)) for name, tensor in leaf.__dict__[kind].items()}
        for kind in ("_parameters", "_buffers")
    }
    shell.__dict__.update(leaf.__dict__, **tensors)
    return shell


def _entered(model: nn.Module, leaves: set[int]) -> set[int]:
    """`id` of the modules that are reached without going through a leaf, the leaves included."""
    found: set[int] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found.add(id(module))
            waiting += [] if id(module) in leaves else module.children()
    return found


def _merged(chains: Iterable[dict[str, tuple[str, ...]]]) -> dict[str, tuple[str, ...]]:
    """What several graphs say: what all that speak of a host agree on, or all of it where they do not agree."""
    found: dict[str, tuple[str, ...]] = {}
    for one in chains:
        for host, chain in one.items():
            known = found.get(host)
            both = tuple(path for path in known if path in chain) if known else chain
            found[host] = both or tuple(dict.fromkeys((*(known or ()), *chain)))
    return found


def _chains(graph: torch.fx.Graph, hosts: set[str], passing: set[str]) -> dict[str, tuple[str, ...]]:
    """Host -> the passing modules reached from its output through passing modules alone, nearest first."""
    found: dict[str, tuple[str, ...]] = {}
    for node in graph.nodes:
        if node.op != "call_module" or str(node.target) not in hosts:
            continue
        chain: list[str] = []
        frontier = [node]
        while frontier:
            users = [
                user
                for current in frontier
                for user in current.users
                if user.op == "call_module" and str(user.target) in passing and user.args[:1] == (current,)
            ]
            chain += [str(user.target) for user in users]
            frontier = users
        known = found.get(str(node.target))
        merged = tuple(dict.fromkeys(chain))
        # a module that is called several times is followed by the same module each time
        found[str(node.target)] = merged if known is None else tuple(path for path in known if path in merged)
    return found


def followers(
    model: nn.Module, hosts: Iterable[str], leaves: Iterable[nn.Module], passes: Passes
) -> dict[str, tuple[str, ...]]:
    """For each host, the modules for which `passes` holds that the model calls on its output, nearest first.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.bn, self.conv = nn.BatchNorm1d(2), nn.Conv1d(1, 2, 1)
        ...
        ...     def forward(self, x):
        ...         return self.bn(self.conv(x))
        >>> followers(Net(), ["conv"], [], lambda module: isinstance(module, nn.BatchNorm1d))
        {'conv': ('bn',)}

    Args:
        model: The model; it is traced, not run.
        hosts: Module paths to follow.
        leaves: Modules that the trace must not enter, beside those of `torch.nn`.
        passes: Which modules count as followers.

    Returns:
        Host path -> follower paths; a host for which nothing could be learnt is absent.
    """
    hosts, leaves = list(hosts), list(leaves)
    if not hosts:
        return {}
    names = _Names(model)
    found = _first_followers(model, {names.first(host) for host in hosts}, leaves, passes)
    return {host: names.near(host, found[first]) for host in hosts if (first := names.first(host)) in found}


def _first_followers(
    model: nn.Module, wanted: set[str], leaves: Iterable[nn.Module], passes: Passes
) -> dict[str, tuple[str, ...]]:
    """The same for hosts by their first names, with the first names of what follows."""
    paths = {id(module): path for path, module in model.named_modules()}
    model = _without_data(model, leaves)
    modules = dict(model.named_modules())
    passing = {path for path, module in modules.items() if passes(module)}
    inside = {paths[id(leaf)] for leaf in leaves if id(leaf) in paths} | passing
    leaf_ids = frozenset(id(modules[path]) for path in inside if path in modules)
    graphs = _trace(model, leaf_ids)
    found = _merged(_chains(graph, wanted, passing) for graph in graphs)
    by_parent: dict[str, set[str]] = {}
    for host in wanted - {host for host, chain in found.items() if chain}:
        by_parent.setdefault(split_path(host)[0], set()).add(host)
    for parent, inside in by_parent.items():
        module = modules.get(parent)
        if module is None:
            continue
        if type(module) is nn.Sequential:
            found.update(_sequential_chains(parent, module, inside, passing))
        elif parent and not graphs:
            names = {split_path(host)[1] for host in inside}
            below = {path[len(parent) + 1 :] for path in passing if path.startswith(f"{parent}.")}
            local = _merged(_chains(graph, names, below) for graph in _trace(module, leaf_ids))
            for host, chain in local.items():
                found[join_path(parent, host)] = tuple(join_path(parent, path) for path in chain)
    return {host: chain for host, chain in found.items() if chain}


def _sequential_chains(
    parent: str, module: nn.Sequential, hosts: set[str], passing: set[str]
) -> dict[str, tuple[str, ...]]:
    """In an `nn.Sequential` each child is called on the output of the one before, by definition."""
    paths = [join_path(parent, name) for name in module._modules]
    position = {path: index for index, path in enumerate(paths)}
    found: dict[str, tuple[str, ...]] = {}
    for host in hosts:
        chain: list[str] = []
        for path in paths[position[host] + 1 :]:
            if path not in passing:
                break
            chain.append(path)
        found[host] = tuple(chain)
    return found


def watch_followers(
    run: Callable[[], Any], model: nn.Module, hosts: Iterable[str], passes: Passes
) -> dict[str, tuple[str, ...]]:
    """The same as :func:`followers`, seen in one real forward: a follower's input *is* the output of its host.

    Args:
        run: Runs the model once.
        model: The model whose modules are watched.
        hosts: Module paths to follow.
        passes: Which modules count as followers; only modules that hand their input on as it is can be seen through.
    """
    names = _Names(model)
    origin: dict[int, tuple[nn.Module, Tensor]] = {}
    found: dict[int, list[str]] = {}
    handles = []

    def leaving(module: nn.Module, _args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            origin[id(output)] = (module, output)  # held, so that its id is not given to another tensor

    def entering(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any) -> None:
            if args and isinstance(args[0], Tensor) and id(args[0]) in origin:
                chain = found.setdefault(id(origin[id(args[0])][0]), [])
                if path not in chain:
                    chain.append(path)

        return hook

    hosts = list(hosts)
    try:
        for host in {id(names.modules[path]): names.modules[path] for path in hosts}.values():
            handles.append(host.register_forward_hook(leaving))
        for paths, module in modules_like(model, passes):
            handles.append(module.register_forward_pre_hook(entering(paths[0])))
        run()
    finally:
        for handle in handles:
            handle.remove()
    chains = {host: found.get(id(names.modules[host]), []) for host in hosts}
    return {host: names.near(host, chain) for host, chain in chains.items() if chain}


class _Names:
    """Every name of every module: a module may stand under several."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(modules_of(model))
        self._all: dict[int, list[str]] = {}
        for path, module in self.modules.items():
            self._all.setdefault(id(module), []).append(path)

    def first(self, path: str) -> str:
        """The name that a trace has for the module at `path`."""
        return self._all[id(self.modules[path])][0] if path in self.modules else path

    def near(self, host: str, paths: Iterable[str]) -> tuple[str, ...]:
        """The same modules, each under its name that has most in common with the name of their host."""

        def common(path: str) -> int:
            pairs = zip(host.split("."), path.split("."), strict=False)
            return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))

        return tuple(max(self._all[id(self.modules[path])], key=common) for path in paths)
