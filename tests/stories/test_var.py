"""VAR: the weights are two levels down, a second model stands beside them, and a buffer holds -inf by design."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from common import FOLDER, eager, read, real, same, stateful
from torch import Tensor, nn

import qat_compat as qc
from qat_compat.testing import assert_twin

BARE = "var/var_d2.pth"
_LENGTHS = (1, 4, 9)  # tokens of each scale
_TOTAL = sum(_LENGTHS)


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale_mul_1H11 = nn.Parameter(torch.ones(1, 2, 1, 1))
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(128)), nn.Parameter(torch.zeros(128))
        self.register_buffer("zero_k_bias", torch.zeros(128))
        self.mat_qkv = nn.Linear(128, 384, bias=False)
        self.proj = nn.Linear(128, 128)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        bias = torch.cat([self.q_bias, self.zero_k_bias, self.v_bias])
        q, k, v = (self.mat_qkv(x) + bias).view(batch, length, 3, 2, 64).permute(2, 0, 3, 1, 4)
        q = nn.functional.normalize(q, dim=-1) * self.scale_mul_1H11.clamp_max(4).exp()
        mixed = nn.functional.scaled_dot_product_attention(q, nn.functional.normalize(k, dim=-1), v, mask)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, 128))


class _Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(128, 512), nn.Linear(512, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.ffn = _Attention(), _Ffn()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(128, 768))

    def forward(self, x: Tensor, cond: Tensor, mask: Tensor) -> Tensor:
        gain1, gain2, scale1, scale2, shift1, shift2 = self.ada_lin(cond).view(-1, 1, 6, 128).unbind(2)
        x = x + gain1 * self.attn(x * (scale1 + 1) + shift1, mask)
        return x + gain2 * self.ffn(x * (scale2 + 1) + shift2)


class _Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(128, 256))

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.ada_lin(cond).view(-1, 1, 2, 128).unbind(2)
        return x * (scale + 1) + shift


class Var(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pos_start = nn.Parameter(torch.zeros(1, 1, 128))
        self.pos_1LC = nn.Parameter(torch.zeros(1, _TOTAL, 128))
        levels = torch.cat([torch.full((n,), i) for i, n in enumerate(_LENGTHS)])
        self.register_buffer("lvl_1L", levels.view(1, _TOTAL))
        mask = torch.where(levels.view(-1, 1) >= levels.view(1, -1), 0.0, -torch.inf)
        self.register_buffer("attn_bias_for_masking", mask.view(1, 1, _TOTAL, _TOTAL).contiguous())
        self.word_embed, self.class_emb = nn.Linear(8, 128), nn.Embedding(11, 128)
        self.lvl_embed = nn.Embedding(3, 128)
        self.blocks = nn.ModuleList([_Block(), _Block()])
        self.head_nm, self.head = _Head(), nn.Linear(128, 128)

    def forward(self, label: Tensor, words: Tensor) -> Tensor:
        cond = self.class_emb(label)
        start = cond.unsqueeze(1) + self.pos_start
        x = torch.cat([start, self.word_embed(words)], 1) + self.lvl_embed(self.lvl_1L) + self.pos_1LC
        for block in self.blocks:
            x = block(x, cond, self.attn_bias_for_masking)
        return self.head(self.head_nm(x, cond))


PREPARE = eager(only=nn.Linear)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randint(0, 11, (2,), generator=generator), torch.randn(2, _TOTAL - 1, 8, generator=generator))
        for _ in range(2)
    ]


def own() -> dict[str, Tensor]:
    """Values of a run; the two buffers are what the network's definition makes them."""
    model = Var()
    state = {key: value * 0.05 if value.is_floating_point() else value for key, value in stateful(model).items()}
    return state | {key: value.clone() for key, value in model.named_buffers()}


def nested(state: dict[str, Tensor], path: Path) -> Path:
    """What VAR's trainer saves: the transformer and the VAE, each under its own name, beside the optimizer."""
    vae = {"quantize.embedding.weight": torch.ones(16, 8), "encoder.conv_in.weight": torch.ones(4, 3, 3, 3)}
    trainer = {"config": {"depth": 2}, "var_wo_ddp": state, "vae_local": vae, "var_opt": {"state": {0: torch.ones(2)}}}
    torch.save({"epoch": 3, "iter": 0, "trainer": trainer, "args": {"depth": 2}}, path)
    return path


def check(state: dict[str, Tensor], path: Path) -> None:
    """The nested file into a prepared model: the right one of two, and exact, -inf included."""
    twin = assert_twin(Var, PREPARE, state, batches(), source=path)
    assert any("`trainer.var_wo_ddp`" in text and "trainer.vae_local" in text for text in twin.report.warnings)
    assert (
        torch.isneginf(twin.loaded.attn_bias_for_masking).sum() == torch.isneginf(state["attn_bias_for_masking"]).sum()
    )
    same(qc.to_float(twin.loaded), state)
    assert_twin(Var, PREPARE, state, batches(), source=path, select="trainer.var_wo_ddp")
    vae = qc.open_checkpoint(path, select="trainer.vae_local")
    assert list(vae) == ["quantize.embedding.weight", "encoder.conv_in.weight"]
    assert vae.metadata["epoch"] == 3
    with pytest.raises(qc.CheckpointError) as error:
        qc.load_checkpoint(PREPARE(Var()), path, select="trainer.var", calibration=batches())
    assert "trainer.var_wo_ddp" in str(error.value) and "trainer.vae_local" in str(error.value)
    with pytest.raises(qc.PlanError, match="the source fills 0 of 38 float entries"):
        qc.load_checkpoint(PREPARE(Var()), path, select="trainer.vae_local", calibration=batches())


@real
def test_bare() -> None:
    state = read(BARE)
    assert torch.isneginf(state["attn_bias_for_masking"]).any()
    twin = assert_twin(Var, PREPARE, state, batches(), source=FOLDER / BARE)
    same(qc.to_float(twin.loaded), state)


@real
def test_nested_from_the_real_weights(tmp_path: Path) -> None:
    state = read(BARE)
    check(state, nested(state, tmp_path / "ar-ckpt-last.pth"))


def test_nested(tmp_path: Path) -> None:
    state = own()
    check(state, nested(state, tmp_path / "ar-ckpt-last.pth"))


def test_a_wrong_minus_infinity_in_a_weight_is_still_refused(tmp_path: Path) -> None:
    """By design is the buffer; a weight with -inf has no range, and says so."""
    state = own()
    state["blocks.0.attn.proj.weight"] = state["blocks.0.attn.proj.weight"].clone()
    state["blocks.0.attn.proj.weight"][0, 0] = -torch.inf
    with pytest.raises(qc.CompatError, match=r"blocks\.0\.attn\.proj"):
        qc.load_checkpoint(PREPARE(Var()), nested(state, tmp_path / "last.pth"), calibration=batches())
