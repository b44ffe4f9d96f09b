"""torch.ao FX graph mode: `prepare_qat_fx`. Extends eager mode: the fused modules and the quantizers are the same
classes.

What is known here, and what it rests on (torch 2.13):

* Activation quantizers are `activation_post_process_N` at the root, numbered by position; what they quantize is in
  the graph.
* The batch-normalization modules are gone. `GraphModule.meta["_observed_graph_module_attrs"].node_name_to_scope`
  still lists every node of the original trace, in order, with its module path and class.
* Tensors that the trace met and that are not parameters become *persistent* buffers, whatever they were before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch.fx
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qat_compat.frameworks.base import CAPTURED, KeyView, ModelView, is_captured
from qat_compat.frameworks.fake_quant import FakeQuant
from qat_compat.frameworks.fake_quant_names import is_fake_quant, is_observer
from qat_compat.frameworks.torch_ao import TorchAO, fused_after
from qat_compat.schema import Role, Schema
from qat_compat.state import join_path, split_path

_NUMBERED = re.compile(r"(?:^|\.)activation_post_process_\d+\.")

__all__ = ["BATCH_NORMS", "FX", "graphs_of", "is_exported"]

BATCH_NORMS = ("batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm", "native_batch_norm")


def is_exported(module: nn.Module) -> bool:
    """Whether a module is a graph that `torch.export` made."""
    return isinstance(module, torch.fx.GraphModule) and any("val" in node.meta for node in module.graph.nodes)


def graphs_of(view: ModelView) -> dict[str, torch.fx.GraphModule]:
    """Path -> graph module, for those that call quantizers."""
    found = view.cache.get("graphs")
    if found is None:
        found = view.cache["graphs"] = {
            path: module
            for path, module in view.modules.items()
            if isinstance(module, torch.fx.GraphModule)
            and any(is_fake_quant(child) or is_observer(child) for child in module.children())
        }
    graphs: dict[str, torch.fx.GraphModule] = found
    return graphs


class _Graph:
    """What one pass over the nodes of a graph tells.

    Args:
        root: The graph module.
    """

    def __init__(self, root: torch.fx.GraphModule) -> None:
        self.root = root
        self.position: dict[torch.fx.Node, int] = {}
        self.calls: dict[str, list[torch.fx.Node]] = {}  # target of a call_module -> its nodes
        self.fed: set[torch.fx.Node] = set()  # nodes that depend on what the caller passes in
        for index, node in enumerate(root.graph.nodes):
            self.position[node] = index
            if node.op == "call_module":
                self.calls.setdefault(str(node.target), []).append(node)
            if node.op == "placeholder" or any(above in self.fed for above in node.all_input_nodes):
                self.fed.add(node)

    def ancestors(self, node: torch.fx.Node) -> list[torch.fx.Node]:
        """Every node that the value of `node` is computed from, in the graph's order."""
        seen: set[torch.fx.Node] = set()
        stack = list(node.all_input_nodes)
        while stack:
            current = stack.pop()
            if current not in seen:
                seen.add(current)
                stack.extend(current.all_input_nodes)
        return sorted(seen, key=self.position.__getitem__)


def _graph(view: ModelView, path: str) -> _Graph:
    key = f"graph:{path}"
    if key not in view.cache:
        view.cache[key] = _Graph(graphs_of(view)[path])
    graph: _Graph = view.cache[key]
    return graph


def _fetch(root: nn.Module, target: str) -> Any:
    value: Any = root
    for part in target.split("."):
        value = getattr(value, part)
    return value


def evaluate(root: torch.fx.GraphModule, node: torch.fx.Node, above: list[torch.fx.Node]) -> Tensor:
    """The input of a quantizer node that depends on nothing but the model's own tensors."""
    return evaluate_node(root, node.args[0], above)  # type: ignore[arg-type]


def evaluate_node(root: torch.fx.GraphModule, node: torch.fx.Node, above: list[torch.fx.Node]) -> Tensor:
    """The value of a node; `above` holds it and all that it depends on, in the graph's order."""
    values: dict[torch.fx.Node, Any] = {}

    def resolve(argument: Any) -> Any:
        return torch.fx.node.map_arg(argument, lambda n: values[n])

    for current in above:
        arguments, keywords = resolve(current.args), resolve(current.kwargs)
        if current.op == "get_attr":
            values[current] = _fetch(root, str(current.target))
        elif current.op == "call_function":
            values[current] = current.target(*arguments, **keywords)  # type: ignore[operator]
        elif current.op == "call_method":
            values[current] = getattr(arguments[0], str(current.target))(*arguments[1:], **keywords)
        else:
            values[current] = _fetch(root, str(current.target))(*arguments, **keywords)
    result: Tensor = values[node]
    return result


class FX(TorchAO):
    """torch.ao FX graph mode."""

    name = "fx"

    def owns_model(self, view: ModelView) -> bool:
        graphs = graphs_of(view)
        return bool(graphs) and not any(is_exported(module) for module in graphs.values())

    def owns_keys(self, view: KeyView) -> bool:
        return any(_NUMBERED.search(key) for key, _ in view.kinds)

    def describe_keys(self, view: KeyView) -> Schema:
        schema = super().describe_keys(view)
        entries = {
            key: entry._replace(role=Role.CONSTANT, optional=CAPTURED) if is_captured(key) else entry
            for key, entry in schema.items()
        }
        return replace(schema, entries=entries)

    def _quantizer(self, view: ModelView, names: tuple[str, ...], module: nn.Module) -> FakeQuant:
        parent, leaf = split_path(names[0])
        root = view.modules[parent]
        if not isinstance(root, torch.fx.GraphModule) or leaf == "weight_fake_quant":
            return super()._quantizer(view, names, module)
        graph = _graph(view, parent)
        inside = [name[len(parent) + 1 :] if parent else name for name in names]
        nodes = sorted((n for name in inside for n in graph.calls.get(name, ())), key=graph.position.__getitem__)
        if not nodes:
            return FakeQuant(names, module, f"unused:{names[0]}")
        first = nodes[0]
        if any(node in graph.fed for node in nodes):
            return FakeQuant(names, module, self._activation_site(parent, first))
        above = graph.ancestors(first)
        axis = getattr(module, "ch_axis", -1)
        shape = self._shape(root, first, above)
        channels = shape[axis] if shape is not None and axis >= 0 else None
        parameter, factor = self._parameter(graph, parent, first)
        site = self._weight_site(root, parent, first, above) + ("+bn" if factor is not None else "")
        return FakeQuant(names, module, site, lambda: evaluate(root, first, above), channels, parameter, factor)

    @staticmethod
    def _parameter(graph: _Graph, parent: str, node: torch.fx.Node) -> tuple[str, Callable[[], Tensor] | None]:
        """The parameter that a data-free quantizer sees, and what it is multiplied by on the way."""
        producer = node.args[0]
        if not isinstance(producer, torch.fx.Node):
            return "", None
        if producer.op == "get_attr":
            return join_path(parent, str(producer.target)), None
        arguments = producer.args
        if (
            str(producer.target) == "aten.mul.Tensor"
            and isinstance(arguments[0], torch.fx.Node)
            and isinstance(arguments[1], torch.fx.Node)
            and arguments[0].op == "get_attr"
        ):
            by = arguments[1]
            upstream = [*graph.ancestors(by), by]
            return join_path(parent, str(arguments[0].target)), lambda: evaluate_node(graph.root, by, upstream)
        return "", None

    @staticmethod
    def _shape(root: torch.fx.GraphModule, node: torch.fx.Node, above: list[torch.fx.Node]) -> tuple[int, ...] | None:
        value = node.args[0].meta.get("val") if isinstance(node.args[0], torch.fx.Node) else None
        if isinstance(value, Tensor):
            return tuple(value.shape)
        if len(above) == 1 and above[0].op == "get_attr":
            return tuple(_fetch(root, str(above[0].target)).shape)
        return None

    def _weight_site(
        self, root: torch.fx.GraphModule, parent: str, node: torch.fx.Node, above: list[torch.fx.Node]
    ) -> str:
        shape = self._shape(root, node, above)
        for candidate in above:
            if candidate.op == "get_attr":
                target = str(candidate.target)
                value = _fetch(root, target)
                if isinstance(value, nn.Parameter) and (shape is None or tuple(value.shape) == shape):
                    return f"weight:{join_path(parent, split_path(target)[0])}"
        return f"constant:{join_path(parent, str(getattr(node.args[0], 'target', node.target)))}"

    @staticmethod
    def _activation_site(parent: str, node: torch.fx.Node) -> str:
        producer = node.args[0]
        if not isinstance(producer, torch.fx.Node):
            return f"graph:{node.target}"
        if producer.op == "placeholder":
            return f"input:{join_path(parent, str(producer.target))}"
        if producer.op == "call_module":
            root = producer.graph.owning_module
            host = root.get_submodule(str(producer.target)) if root is not None else nn.Module()
            return f"output:{join_path(parent, str(producer.target))}{fused_after(host)}"
        if (fused := _fused_chain(producer)) is not None:
            return f"output:{join_path(parent, fused)}"
        # an exported graph says which module a call comes from; only a module that makes one call is named by it
        stack = list((producer.meta.get("nn_module_stack") or {}).values())
        module, kind = stack[-1] if stack else ("", "")
        if module and str(kind).startswith("torch.nn.modules."):
            return f"output:{join_path(parent, module)}"
        return f"node:{join_path(parent, producer.name)}"  # a tracer's own number: it names nothing in another graph

    def chains(self, view: ModelView, hosts: list[str]) -> Mapping[str, tuple[str, ...]]:
        found = dict(super().chains(view, [h for h in hosts if self._graph_above(view, h) is None]))
        for path, graph in graphs_of(view).items():
            inside = [host for host in hosts if self._graph_above(view, host) == path]
            found.update(_scan_scopes(graph, path, inside))
        return found

    @staticmethod
    def _graph_above(view: ModelView, host: str) -> str | None:
        """The path of the nearest graph module above `host`; None where there is none."""
        parent = host
        while parent:
            parent = split_path(parent)[0]
            if isinstance(view.modules.get(parent), torch.fx.GraphModule):
                return parent
        return None

    def constants(self, view: ModelView) -> Mapping[str, str]:
        found: dict[str, str] = {}
        for path, root in graphs_of(view).items():
            for node in root.graph.nodes:
                if node.op == "get_attr":
                    key = join_path(path, str(node.target))
                    slot = view.slots.get(key)
                    if slot is not None and not slot.is_parameter and not _is_statistic(key):
                        found[key] = CAPTURED
        return found


_AFTER = {"relu": "+relu", "relu_": "+relu", **dict.fromkeys(BATCH_NORMS, "+bn")}


def _fused_chain(node: torch.fx.Node) -> str | None:
    """The convolution or linear layer of an exported graph that ends in `node`, as the fused module would be named."""
    after = ""
    current: object = node
    while isinstance(current, torch.fx.Node) and current.op == "call_function":
        name = str(current.target).split(".")[1:2]
        kind = name[0] if name else ""
        if kind in _AFTER:
            after = _AFTER[kind] + after
        elif kind.startswith(("conv", "linear")) and after:
            stack = list((current.meta.get("nn_module_stack") or {}).values())
            module, owner = stack[-1] if stack else ("", "")
            return f"{module}{after}" if module and str(owner).startswith("torch.nn.modules.") else None
        elif kind not in ("div", "add") or "+bn" not in after:
            return None  # those two are how the export flow undoes what it multiplied weights by
        current = current.args[0] if current.args else None
    return None


def _is_statistic(key: str) -> bool:
    return split_path(key)[1] in ("running_mean", "running_var", "num_batches_tracked")


def _scan_scopes(root: torch.fx.GraphModule, path: str, hosts: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Which removed norms each fused host may have been followed by, from the order of the original trace.

    A norm runs after its host. Hosts and removed norms are read in trace order into a cluster that closes when it
    holds as many norms as hosts: the norms of a closed cluster belong to its hosts. A cluster of one pair is certain;
    in a larger one every host keeps every norm as a candidate.
    """
    attrs = root.meta.get("_observed_graph_module_attrs")
    scopes = getattr(attrs, "node_name_to_scope", {})
    wanted = set(hosts)
    existing = {name for name, module in root.named_modules() if isinstance(module, _BatchNorm)}
    found: dict[str, tuple[str, ...]] = {}
    open_hosts: list[str] = []
    open_norms: list[str] = []
    for scope, kind in scopes.values():
        full = join_path(path, scope)
        if full in wanted and full not in found and full not in open_hosts:
            open_hosts.append(full)
        elif (
            isinstance(kind, type)
            and issubclass(kind, _BatchNorm)
            and scope not in existing
            and full not in open_norms
            and open_hosts
        ):
            open_norms.append(full)
            if len(open_norms) == len(open_hosts):
                found.update({host: tuple(open_norms) for host in open_hosts})
                open_hosts, open_norms = [], []
    return found
