"""minimind: half-precision files by configuration, resume files, tied copies, LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from common import FOLDER, eager, read, real, same, stateful
from torch import Tensor, nn

import qat_compat as qc
from qat_compat.testing import assert_same_output, assert_twin

PRETRAIN = "minimind/pretrain_32.pth"
RESUME = "minimind/pretrain_32_resume.pth"
LORA = "minimind/lora_only_32.pth"
LORA_AND_BASE = "minimind/lora_identity_32.pth"


class _Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.k_proj, self.v_proj = nn.Linear(32, 16, bias=False), nn.Linear(32, 16, bias=False)
        self.q_norm, self.k_norm = _Norm(8), _Norm(8)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(batch, length, 4, 8)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, length, 2, 8)).transpose(1, 2).repeat_interleave(2, 1)
        v = self.v_proj(x).view(batch, length, 2, 8).transpose(1, 2).repeat_interleave(2, 1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, 32))


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 64, bias=False), nn.Linear(32, 64, bias=False)
        self.down_proj = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.mlp = _Attention(), _Mlp()
        self.input_layernorm, self.post_attention_layernorm = _Norm(32), _Norm(32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(128, 32)
        self.layers = nn.ModuleList([_Layer(), _Layer()])
        self.norm = _Norm(32)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class MiniMind(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = _Model()
        self.lm_head = nn.Linear(32, 128, bias=False)
        self.model.embed_tokens.weight = self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.model(tokens))


def layers_only(model: nn.Module) -> nn.Module:
    """Linear layers of the blocks; the tied head stays in floating point."""
    for layer in model.model.layers:
        eager(only=nn.Linear)(layer)
    return model.train()


def tokens(count: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 128, (2, 9), generator=generator) for _ in range(count)]


def halves(seed: int = 3) -> dict[str, Tensor]:
    """As minimind saves: every tensor in half precision, the tied one as two copies."""
    state = {key: value.half() for key, value in stateful(MiniMind(), seed).items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    return state


def lora(seed: int = 5) -> dict[str, Tensor]:
    names = [f"model.layers.{i}.self_attn.{name}.lora" for i in range(2) for name in ("q_proj", "o_proj")]
    shapes = {"A.weight": (4, 32), "B.weight": (32, 4)}
    return {f"{name}.{leaf}": torch.ones(shape).half() * seed for name in names for leaf, shape in shapes.items()}


def in_full(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.float() for key, value in state.items()}


@real
@pytest.mark.parametrize("name", [PRETRAIN, RESUME])
def test_half_precision_into_full(name: str) -> None:
    raw = read(name, *(["model"] if name == RESUME else []))
    assert {value.dtype for value in raw.values()} == {torch.float16}
    twin = assert_twin(MiniMind, layers_only, in_full(raw), tokens(), source=FOLDER / name)
    assert twin.loaded.lm_head.weight is twin.loaded.model.embed_tokens.weight
    same(qc.to_float(twin.loaded), in_full(raw))
    if name == RESUME:  # minimind's own loader is strict=False, and takes nothing from this file
        checkpoint = qc.open_checkpoint(FOLDER / name)
        assert (checkpoint.metadata["epoch"], checkpoint.metadata["step"], checkpoint.metadata["world_size"]) == (
            0,
            3,
            1,
        )


@real
def test_lora_alone_is_refused_with_its_coverage() -> None:
    model = layers_only(MiniMind())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(qc.PlanError, match="the source fills 0 of 25 float entries of the target"):
        qc.load_checkpoint(model, FOLDER / LORA, calibration=tokens())
    same(model.state_dict(), before)


@real
def test_lora_beside_the_base() -> None:
    raw = read(LORA_AND_BASE)
    base = {key: value for key, value in raw.items() if ".lora." not in key}
    with pytest.raises(qc.PlanError) as error:
        qc.load_checkpoint(layers_only(MiniMind()), FOLDER / LORA_AND_BASE, calibration=tokens())
    assert {problem.key for problem in error.value.problems} == set(raw) - set(base)
    twin = assert_twin(MiniMind, layers_only, in_full(base), tokens(), source=FOLDER / LORA_AND_BASE, drop="*.lora.*")
    assert twin.report.dropped == len(raw) - len(base)


@real
def test_find_checkpoint_before_training(tmp_path: Path) -> None:
    for name in (PRETRAIN, RESUME):
        (tmp_path / Path(name).name).write_bytes((FOLDER / name).read_bytes())
    found = qc.find_checkpoint(tmp_path, "pretrain_{hidden_size}.pth", config={"hidden_size": 32})
    assert found == tmp_path / "pretrain_32.pth"
    model = layers_only(MiniMind())
    qc.load_checkpoint(model, found, calibration=tokens())
    same(qc.to_float(model), in_full(read(PRETRAIN)))
    assert qc.find_checkpoint(tmp_path, "pretrain_{hidden_size}.pth", config={"hidden_size": 512}) is None


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_names_of_compiled_and_distributed_runs(tmp_path: Path, prefix: str) -> None:
    """`compile(DDP(m))` saves `module.`; others save both, in either order."""
    state = halves()
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "full_sft_32.pth")
    assert_twin(MiniMind, layers_only, in_full(state), tokens(), source=tmp_path / "full_sft_32.pth")


def test_a_resume_file(tmp_path: Path) -> None:
    state = halves()
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]}
    content = {"model": state, "optimizer": optimizer, "epoch": 1, "step": 70, "world_size": 2, "wandb_id": None}
    torch.save(content, tmp_path / "pretrain_32_resume.pth")
    assert_twin(MiniMind, layers_only, in_full(state), tokens(), source=tmp_path / "pretrain_32_resume.pth")
    assert qc.open_checkpoint(tmp_path / "pretrain_32_resume.pth").metadata["step"] == 70


def test_tied_copies_that_differ_are_refused() -> None:
    state = halves()
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    model = layers_only(MiniMind())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(qc.CompatError, match=r"embed_tokens|lm_head"):
        qc.load_checkpoint(model, state, calibration=tokens())
    same(model.state_dict(), before)


def test_one_copy_is_enough() -> None:
    state = halves()
    del state["lm_head.weight"]
    model = layers_only(MiniMind())
    qc.load_checkpoint(model, state, calibration=tokens())
    assert torch.equal(model.lm_head.weight, state["model.embed_tokens.weight"].float())


def test_lora(tmp_path: Path) -> None:
    torch.save(lora(), tmp_path / "lora_only_32.pth")
    with pytest.raises(qc.PlanError, match="the source fills 0 of 25 float entries of the target"):
        qc.load_checkpoint(layers_only(MiniMind()), tmp_path / "lora_only_32.pth", calibration=tokens())
    state = halves()
    torch.save(state | lora(), tmp_path / "lora_32.pth")
    assert_twin(MiniMind, layers_only, in_full(state), tokens(), source=tmp_path / "lora_32.pth", drop="*.lora.*")


def test_the_newest_complete_file(tmp_path: Path) -> None:
    """A run that was killed while saving left half a file; the one before it is taken."""
    state = halves()
    torch.save(state, tmp_path / "pretrain_32.pth")
    whole = (tmp_path / "pretrain_32.pth").read_bytes()
    (tmp_path / "pretrain_32_moe.pth").write_bytes(whole[: len(whole) // 2])
    found = qc.find_checkpoint(tmp_path, "pretrain_{hidden_size}*.pth", config={"hidden_size": 32})
    assert found == tmp_path / "pretrain_32.pth"
    model = MiniMind()
    qc.load_checkpoint(model, found)
    other = MiniMind()
    other.load_state_dict(in_full(state))
    assert_same_output(model, other, tokens())
