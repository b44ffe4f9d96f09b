"""Random small architectures under random names: what holds for the zoo holds for what nobody thought of."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from flows import eager
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from zoo import Arch

from qat_compat.matrix.flows.torch_ao import fx_mapping
from qat_compat.testing import assert_round_trip, assert_twin

# One seed for all machines: a failure here is a failure everywhere.
_SETTINGS = settings(max_examples=20, deadline=None, derandomize=True, database=None)
_STYLES = (("conv{}", "bn{}"), ("conv_{}", "norm_{}"), ("features_{}_convolution", "features_{}_normalization"))
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "model.")
_CHANNELS = 4


class Drawn(nn.Module):
    """A chain of layers, declared in any order under any names, some of them in a child module."""

    def __init__(self, layers: list[dict[str, Any]], order: list[int], style: tuple[str, str]) -> None:
        super().__init__()
        self.inner = nn.Module()
        made: list[tuple[nn.Module, str, nn.Module]] = []
        self.calls: list[str] = []
        for index, layer in enumerate(layers):
            parent, prefix = (self.inner, "inner.") if layer["nested"] else (self, "")
            conv = nn.Conv2d(_CHANNELS, _CHANNELS, layer["kernel"], padding=layer["kernel"] // 2, bias=layer["bias"])
            made.append((parent, style[0].format(index), conv))
            self.calls.append(prefix + style[0].format(index))
            if layer["norm"]:
                made.append((parent, style[1].format(index), nn.BatchNorm2d(_CHANNELS)))
                self.calls.append(prefix + style[1].format(index))
        for index in sorted(range(len(made)), key=lambda i: (order[i % len(order)], i)):
            parent, name, module = made[index]
            parent.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.calls:
            x = self.get_submodule(name)(x)
        return torch.relu(x)


_LAYERS = st.lists(
    st.fixed_dictionaries(
        {"kernel": st.sampled_from([1, 3]), "bias": st.booleans(), "norm": st.booleans(), "nested": st.booleans()}
    ),
    min_size=1,
    max_size=4,
)


@st.composite
def architectures(draw: st.DrawFn) -> Arch:
    layers = draw(_LAYERS)
    order = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8))
    style = draw(st.sampled_from(_STYLES))

    def build() -> nn.Module:
        return Drawn(layers, order, style)

    calls = Drawn(layers, order, style).calls
    fuse = tuple((conv, norm) for conv, norm in pairwise(calls) if _is_norm(norm))
    return Arch("drawn", build, lambda: torch.randn(3, _CHANNELS, 6, 6), fuse=fuse)


def _is_norm(name: str) -> bool:
    return name.rpartition(".")[2].startswith(("bn", "norm")) or name.endswith("normalization")


@st.composite
def wrapped(draw: st.DrawFn, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state under a nest of wrappers, in front and inside, as DDP, FSDP and compile leave them."""
    front = "".join(draw(st.lists(st.sampled_from(_WRAPPERS), max_size=3)))
    inside = draw(st.sampled_from(["", *_WRAPPERS[1:4]]))
    return {front + key.replace("inner.", f"inner.{inside}"): value for key, value in state.items()}


def _eager(arch: Arch) -> Any:
    return lambda model: eager(model, arch, qconfig=get_default_qat_qconfig("x86"))


@_SETTINGS
@given(data=st.data(), arch=architectures())
def test_twin_under_wrappers(data: st.DataObject, arch: Arch) -> None:
    source = data.draw(wrapped(arch.state()))
    assert_twin(arch.make, _eager(arch), arch.state(), arch.batches(), source=source, outputs=False)


@_SETTINGS
@given(arch=architectures(), letters=st.lists(st.sampled_from("xyz"), min_size=1, max_size=3))
def test_twin_under_a_renaming(arch: Arch, letters: list[str]) -> None:
    prefix = "".join(f"{letter}." for letter in letters)
    source = {f"{prefix}{key.replace('inner', 'INNER')}": value for key, value in arch.state().items()}
    pairs = ((f"^{prefix}".replace(".", r"\."), ""), ("INNER", "inner"))
    assert_twin(arch.make, _eager(arch), arch.state(), arch.batches(), source=source, rename=pairs, outputs=False)


@_SETTINGS
@given(arch=architectures())
def test_round_trip(arch: Arch) -> None:
    assert_round_trip(arch.make, _eager(arch), arch.state(), batches=arch.batches())


@_SETTINGS
@given(arch=architectures())
def test_fx_twin(arch: Arch) -> None:
    def prepare(model: nn.Module) -> nn.Module:
        return prepare_qat_fx(model.train(), fx_mapping("x86"), (arch.batches(1)[0],))

    assert_twin(arch.make, prepare, arch.state(), arch.batches(), outputs=False)
