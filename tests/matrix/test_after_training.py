"""After training, `to_float` fits the float class and computes what the QAT model computes with fake-quant off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from flows import FLOWS, cells, prepare_for
from test_resume import trained
from torch import nn
from zoo import ARCHS

import qat_compat as qc
from qat_compat.testing import assert_twin

_CELLS = cells(
    # Nothing but data tells the names of "dynamic".
    "eager-x86/" + " ".join(name for name in ARCHS if name not in ("bf16", "dynamic")),
    "eager-qnnpack/residual",
    "eager-embedding/embedding",
    "fx-x86/plain unordered crossed residual linear_bn unet fixed functional",
    "pt2e-x86/crossed residual",
    "torchao-int8-int4/transformer",
    "torchao-static/transformer",
    "torchao-learned/transformer",
    "torchao-weight-only/tied",
)


@contextmanager
def unquantized(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval form with every quantizer passing its input on."""
    from qat_compat.testing.modes import eval_form  # the exported programs' eval form is no business of users

    for module in model.modules():
        if hasattr(module, "fake_quant_enabled"):
            module.fake_quant_enabled.fill_(0)
            module.observer_enabled.fill_(0)
        elif hasattr(module, "_scale_eps"):
            module.enabled = False
    with eval_form(model) as form, torch.no_grad():
        yield form


@pytest.mark.parametrize(("flow", "name"), _CELLS)
def test_float_again_after_training(flow: str, name: str) -> None:
    arch = ARCHS[name]
    model = trained(flow, name, steps=3)
    float_model = arch.make(9)
    float_model.load_state_dict(qc.to_float(model, like=arch.make(8)), strict=True)
    batch = arch.batches(seed=11)[0]
    if name == "hf_mobilenet":
        # 52 BNs, some with tiny variances: float32 would show nothing but rounding.
        model, float_model, batch = model.double(), float_model.double(), {k: v.double() for k, v in batch.items()}
    with unquantized(model) as form, torch.no_grad():
        outputs = [m(**batch) if isinstance(batch, dict) else m(batch) for m in (float_model.eval(), form)]
    expected, found = (output if isinstance(output, torch.Tensor) else output[0] for output in outputs)
    # Fused modules scale the weight and unscale the output, so that they round differently.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("flow", "name"), cells("eager-x86/plain", "eager-x86/transformer", "fx-x86/plain"))
def test_quantized_weights_are_what_the_quantizer_gives(flow: str, name: str) -> None:
    model = trained(flow, name)
    for module in model.modules():
        if hasattr(module, "fake_quant_enabled"):
            module.fake_quant_enabled.fill_(1)
            module.observer_enabled.fill_(0)
    back = qc.to_float(model, weights="quantized", like=ARCHS[name].make())
    linear = {key: module for key, module in model.named_modules() if type(module).__name__ == "Linear"}
    assert linear
    for key, module in linear.items():
        expected = module.weight_fake_quant(module.weight).detach()
        assert torch.equal(back[f"{key}.weight"], expected), key
        assert not torch.equal(back[f"{key}.weight"], module.weight), key


@pytest.mark.parametrize(("flow", "name"), cells("eager-x86/residual", "fx-x86/unet", "torchao-int8-int4/bert"))
def test_there_and_back_and_there(flow: str, name: str) -> None:
    """What came back loads again: the whole circle is the identity."""
    arch = ARCHS[name]
    state = dict(qc.to_float(trained(flow, name), like=arch.make()).items())
    assert_twin(arch.make, prepare_for(flow, name), state, arch.batches())


def test_every_kind_of_flow_is_here() -> None:
    assert {FLOWS[flow].kind for flow, _ in _CELLS} == {"eager", "fx", "pt2e", "torchao"}
