"""From QAT model, state dict and file back to the float state dict: keys, order, dtypes and bits."""

from __future__ import annotations

from typing import Any

import pytest
from flows import FLOWS, cells, prepare_for
from zoo import ARCHS

import qat_compat as qc
from qat_compat.testing import assert_round_trip, assert_same_state

_CELLS = cells(
    # Where no trace can follow there is nothing to name; see `test_names.py`.
    "eager-x86/" + " ".join(name for name in ARCHS if name not in ("bf16", "dynamic", "dynamic_channels")),
    "eager-minmax-per-tensor/bf16",
    "eager-embedding/embedding",
    "eager-histogram/plain",
    "fx-x86/plain unordered crossed residual linear_bn conv1d conv3d tied",
    "fx-x86/constants functional unet fixed partial stubs sequential",
    "fx-skip/plain residual linear_bn",
    "pt2e-x86/crossed residual tied constants functional",
    "pt2e-x86-eval/plain",
    "pt2e-sharing/functional",
    "torchao-int8-int4/tied",
    "torchao-weight-only/tied",
    "torchao-static/tied",
    "torchao-learned/tied bf16",
    "torchao-intx/llama",
)
_EVERY = ("model", "state_dict", "file")


def _expectations(flow: str, name: str) -> dict[str, Any]:
    """What can be known without `like=`; see there."""
    kind = FLOWS[flow].kind
    # FX registers a second name of a module under the first only.
    lost = {"pt2e-x86-eval/plain": ("*.num_batches_tracked",)}
    expectations: dict[str, Any] = {"lost": lost.get(f"{flow}/{name}", ())}
    if kind in ("fx", "pt2e") and name == "constants":
        expectations["unaided"] = None  # a graph module saves every buffer
        expectations["names"] = "silent"
    elif kind in ("pt2e", "torchao"):
        # A PT2E state dict may look like one of FX with a fused pair that was not prepared, and then it may be refused.
        expectations |= {"unaided": _EVERY if kind == "torchao" else ("model",), "ordered": _EVERY}
    if kind == "fx":
        expectations["ordered"] = ()  # it registers modules in the order of their use
    if kind in ("eager", "fx") and name in ("crossed", "unordered"):
        expectations["names"] = "mislead" if name == "crossed" else "silent"
    if (flow, name) == ("eager-x86", "branching"):
        expectations["names"] = "silent"  # not which BN is whose
    return expectations


@pytest.mark.parametrize(("flow", "name"), _CELLS)
def test_round_trip(flow: str, name: str) -> None:
    arch = ARCHS[name]
    expectations = _expectations(flow, name)
    assert_round_trip(arch.make, prepare_for(flow, name), arch.state(), batches=arch.batches(), **expectations)


@pytest.mark.parametrize("witness", ["model", "state_dict"])
def test_second_name_of_a_shared_module(witness: str) -> None:
    """FX registers a module that has two names under the first; the float side knows that the two are one."""
    arch = ARCHS["shared"]
    model = prepare_for("fx-x86", "shared")(arch.make())
    float_model = arch.make()
    back = qc.to_float(model, like=float_model if witness == "model" else float_model.state_dict())
    assert_same_state(back, float_model.state_dict())
