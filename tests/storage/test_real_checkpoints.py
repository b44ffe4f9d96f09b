"""Files that the real systems wrote, from the folder in QAT_COMPAT_REAL_CHECKPOINTS; the oracle is torch.load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_torch_zip import same

from qat_compat.storage import open_source, save

FOLDER = Path(os.environ.get("QAT_COMPAT_REAL_CHECKPOINTS", ""))
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        "QAT_COMPAT_REAL_CHECKPOINTS" not in os.environ, reason="QAT_COMPAT_REAL_CHECKPOINTS is not set"
    ),
]

# file -> where its weights are, what is beside them
FILES: dict[str, tuple[str, set[str]]] = {
    "lightning/original-epoch=1.ckpt": ("state_dict", {"epoch", "hyper_parameters", "optimizer_states"}),
    "lightning/compiled-epoch=1.ckpt": ("state_dict", {"epoch"}),
    "lightning/ema-epoch=1.ckpt": ("state_dict", {"epoch"}),
    "lightning/bf16true-epoch=1.ckpt": ("state_dict", {"epoch"}),
    "lightning/qat-epoch=1.ckpt": ("state_dict", {"epoch"}),
    "lightning/weights_only.ckpt": ("state_dict", {"epoch"}),
    "minimind/pretrain_32.pth": ("", set()),
    "minimind/pretrain_32_resume.pth": ("model", {"optimizer", "epoch", "step"}),
    "minimind/lora_identity_32.pth": ("", set()),
    "minimind/lora_only_32.pth": ("", set()),
    "super_gradients/repvgg_float_ckpt_best.pth": ("net", {"acc", "epoch"}),
    "super_gradients/shufflenet_float_ckpt_best.pth": ("ema_net", {"acc", "epoch"}),
    "super_gradients/shufflenet_float_average_model.pth": ("net", {"acc"}),
    "super_gradients/shufflenet_qat_ckpt_best.pth": ("net", {"acc"}),
    "sparseml/float.pth": ("state_dict", {"epoch"}),
    "sparseml/qat_default.pth": ("state_dict", {"epoch", "recipe"}),
    "sparseml/qat_default_plain_state_dict.pth": ("", set()),
    "var/var_d2.pth": ("trainer.var_wo_ddp", set()),
    "real/facenet_mtcnn_pnet.pt": ("", set()),
    "real/facenet_mtcnn_rnet.pt": ("", set()),
    "real/facenet_mtcnn_onet.pt": ("", set()),
    "real/lpips_v0.1_alex.pth": ("", set()),
    "real/lpips_v0.1_vgg.pth": ("", set()),
}


def oracle(name: str) -> dict[str, Any]:
    found = torch.load(FOLDER / name, map_location="cpu", weights_only=True)
    path = FILES[name][0]
    for part in path.split(".") if path and path.split(".")[0] in found else []:
        found = found[part]
    return found


@pytest.mark.parametrize("name", FILES)
def test_keys_and_tensors(name: str) -> None:
    checkpoint, expected = open_source(FOLDER / name), oracle(name)
    assert list(checkpoint) == list(expected)
    for key, value in expected.items():
        assert checkpoint.spec(key) == (tuple(value.shape), value.dtype), key
        assert same(checkpoint[key], value), key
    assert FILES[name][1] <= set(checkpoint.metadata)
    versions = getattr(expected, "_metadata", None)
    assert checkpoint.versions == (versions or {})


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", FILES)
def test_there_and_back(tmp_path: Path, name: str, suffix: str) -> None:
    checkpoint = open_source(FOLDER / name)
    path = save(checkpoint, tmp_path / f"copy{suffix}")
    copy = open_source(path, verify=True)
    assert list(copy) == list(checkpoint)
    assert all(
        torch.equal(
            copy[k].contiguous().view(-1).view(torch.uint8), checkpoint[k].contiguous().view(-1).view(torch.uint8)
        )
        for k in copy
    )
    assert copy.versions == checkpoint.versions


def test_lightnings_average_and_live_weights() -> None:
    path = FOLDER / "lightning/ema-epoch=1.ckpt"
    average, live = open_source(path), open_source(path, select="model")
    assert list(average) == list(live)
    assert not torch.equal(average["model.conv1.weight"], live["model.conv1.weight"])
    assert "Lightning" in average.notes[0]


def test_super_gradients_choice() -> None:
    path = FOLDER / "super_gradients/shufflenet_float_ckpt_best.pth"
    assert "`ema_net`, which Super-Gradients itself loads first" in open_source(path).notes[0]
    raw = torch.load(path, weights_only=True)
    key = next(key for key, value in raw["net"].items() if not torch.equal(value, raw["ema_net"][key]))
    assert torch.equal(open_source(path)[key], raw["ema_net"][key])
    assert torch.equal(open_source(path, select="model")[key], raw["net"][key])


def test_vars_mask_holds_minus_infinity() -> None:
    checkpoint = open_source(FOLDER / "var/var_d2.pth")
    mask = next(key for key in checkpoint if "attn_bias_for_masking" in key)
    assert torch.isneginf(checkpoint[mask]).any()
