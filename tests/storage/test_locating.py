"""Where the weights are: every trainer's layout, and the user's own choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qat_compat.errors import CheckpointError
from qat_compat.storage import Checkpoint, open_source


def weights(value: float) -> dict[str, Tensor]:
    return {"fc.weight": torch.full((1,), value), "fc.bias": torch.zeros(1)}


LIVE, EMA, OTHER = 1.0, 2.0, 3.0
LAYOUTS: dict[str, tuple[dict[str, Any], float]] = {
    "bare": (weights(LIVE), LIVE),
    "Super-Gradients": ({"net": weights(LIVE), "ema_net": weights(EMA), "epoch": 1}, EMA),
    "Super-Gradients without average": ({"net": weights(LIVE), "acc": 0.5, "optimizer_state_dict": {}}, LIVE),
    "minimind": ({"model": weights(LIVE), "optimizer": {"state": {0: {"m": torch.ones(1)}}}, "world_size": 1}, LIVE),
    "VAR": ({"epoch": 1, "trainer": {"var_wo_ddp": weights(LIVE), "vae_local": weights(OTHER), "var_opt": {}}}, LIVE),
    "Lightning": (
        {"state_dict": weights(LIVE), "pytorch-lightning_version": "2", "callbacks": {"x": weights(9)}},
        LIVE,
    ),
    "Lightning with averaging": (
        {"state_dict": weights(EMA), "current_model_state": weights(LIVE), "pytorch-lightning_version": "2"},
        EMA,
    ),
    "Ultralytics": ({"model": weights(LIVE), "ema": weights(EMA), "updates": 1, "train_args": {}}, EMA),
    "Ultralytics, stripped": ({"model": weights(LIVE), "ema": None, "updates": None, "train_args": {}}, LIVE),
    "SparseML under QAT": ({"model": weights(LIVE), "ema": None, "source": "sparseml", "recipe": ""}, LIVE),
    "SparseML": ({"state_dict": weights(LIVE), "optimizer": {}, "recipe": None, "epoch": 1}, LIVE),
    "timm": ({"state_dict": weights(LIVE), "state_dict_ema": weights(EMA), "arch": "x"}, EMA),
    "timm model_ema": ({"model": weights(LIVE), "model_ema": weights(EMA)}, EMA),
    "detectron2": ({"model": weights(LIVE), "iteration": 3, "optimizer": {}}, LIVE),
    "ModelOpt": ({"modelopt_state": {"modelopt_version": "0.47"}, "model_state_dict": weights(LIVE)}, LIVE),
    "unknown trainer": ({"my_stuff": {"inner": weights(LIVE)}, "epoch": 2}, LIVE),
    "unknown trainer with an average": ({"model_state_dict": weights(LIVE), "ema_state_dict": weights(EMA)}, LIVE),
    "only an average": ({"ema": {"decay": 0.9, "module": weights(EMA)}, "optimizer": weights(9)}, EMA),
    "tensors and settings": ({**weights(LIVE), "config": {"width": 3}, "epoch": 2}, LIVE),
    "an empty module": ({"model": None, "ema": nn.Sequential(), "net_state_dict": weights(LIVE)}, LIVE),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_trainers_own_preference(name: str) -> None:
    tree, expected = LAYOUTS[name]
    checkpoint = open_source(tree)
    assert list(checkpoint) == ["fc.weight", "fc.bias"]
    assert checkpoint["fc.weight"].item() == expected


WITH_BOTH = [
    "Super-Gradients", "Lightning with averaging", "Ultralytics", "timm", "timm model_ema",
    "unknown trainer with an average",
]  # fmt: skip
WITHOUT_AVERAGE = [
    "Super-Gradients without average", "Ultralytics, stripped", "SparseML under QAT", "minimind", "Lightning",
    "an empty module",
]  # fmt: skip


@pytest.mark.parametrize("name", WITH_BOTH)
def test_select_by_role(name: str) -> None:
    tree, _ = LAYOUTS[name]
    assert open_source(tree, select="model")["fc.weight"].item() == LIVE
    assert open_source(tree, select="ema")["fc.weight"].item() == EMA


@pytest.mark.parametrize("name", WITHOUT_AVERAGE)
def test_there_is_no_average(name: str) -> None:
    tree, _ = LAYOUTS[name]
    assert open_source(tree, select="model")["fc.weight"].item() == LIVE
    with pytest.raises(CheckpointError, match="no weights there"):
        open_source(tree, select="ema")


@pytest.mark.parametrize("beside", [{"ema": weights(EMA)}, {"norm_stats": {"mean": torch.ones(2)}}, {"a": {"b": {}}}])
@pytest.mark.parametrize("names", [["fc.weight", "fc.bias"], ["weight", "bias"]])
def test_weights_at_the_top_beside_other_mappings(beside: dict[str, Any], names: list[str]) -> None:
    state = dict(zip(names, weights(LIVE).values(), strict=True))
    tree = {**state, **beside, "epoch": 3, "q._extra_state": {"min": torch.ones(1)}}
    for select in (None, "", "model"):
        checkpoint = open_source(tree, select=select)
        assert list(checkpoint) == names and checkpoint[names[0]].item() == LIVE
        assert list(checkpoint.metadata["extra_state"]["q._extra_state"]) == ["min"]
        assert len(checkpoint.notes) == (select is None and "a" not in beside)


def test_what_is_beside_weights_at_the_top_can_be_reached() -> None:
    tree = {**weights(LIVE), "ema": weights(EMA), "epoch": 3}
    assert open_source(tree).notes == (
        "weights are the tensors at the top (select=''), the live weights; also there: ema",
    )
    assert open_source(tree).metadata == open_source(tree, select="ema").metadata == {"epoch": 3}
    assert open_source(tree, select="ema")["fc.weight"].item() == EMA
    with pytest.raises(CheckpointError, match=r"expected: ema, the tensors at the top \(select=''\)"):
        open_source(tree, select="teacher")


@pytest.mark.parametrize(
    "beside",
    [{"lr": torch.ones(1)}, {"mean": torch.ones(3), "std": torch.ones(3)}, {"best.loss": torch.tensor(1.0)},
     {"optim.state": torch.ones(3)}],
)  # fmt: skip
def test_tensors_of_training_state_at_the_top_are_no_weights(beside: dict[str, Any]) -> None:
    checkpoint = open_source({**beside, "generator": weights(LIVE)})
    assert checkpoint["fc.weight"].item() == LIVE and checkpoint.notes == ()
    named = open_source({**beside, **{"x.weight": torch.ones(1)}, "model": weights(LIVE)}, select="model")
    assert named["fc.weight"].item() == LIVE


def test_select_by_path() -> None:
    tree, _ = LAYOUTS["VAR"]
    assert open_source(tree, select="trainer.vae_local")["fc.weight"].item() == OTHER
    dotted = {"a.b": {"c": weights(LIVE)}, "a": {"d": weights(OTHER)}}
    assert open_source(dotted, select="a.b.c")["fc.weight"].item() == LIVE
    assert open_source(dotted, select="a.d")["fc.weight"].item() == OTHER
    assert open_source({"optimizer": {"master": weights(OTHER)}, "model": weights(LIVE)}, select="optimizer.master")[
        "fc.weight"
    ].item() == OTHER  # fmt: skip


@pytest.mark.parametrize(
    "select", ["trainer.var", "vae_local", "trainer", "ema", "epoch", "fc.weight", ".", "trainer."]
)
def test_a_wrong_path_lists_the_right_ones(select: str) -> None:
    tree, _ = LAYOUTS["VAR"]
    with pytest.raises(CheckpointError, match="no weights there") as error:
        open_source(tree, select=select)
    assert error.value.expected == "trainer.var_wo_ddp, trainer.vae_local"
    assert error.value.found == repr(select)


def test_the_choice_is_noted() -> None:
    (note,) = open_source(LAYOUTS["Super-Gradients"][0]).notes
    assert note == "weights are `ema_net`, which Super-Gradients itself loads first; also there: net"
    assert open_source(LAYOUTS["minimind"][0]).notes == ()
    assert open_source(LAYOUTS["Super-Gradients"][0], select="net").notes == ()


def test_two_sets_and_nothing_to_tell_them_apart() -> None:
    with pytest.raises(CheckpointError, match="several sets of weights") as error:
        open_source({"generator": weights(LIVE), "discriminator": weights(OTHER)})
    assert error.value.found == "generator, discriminator"
    assert error.value.remedy == "pass select='generator', or another of them"


@pytest.mark.parametrize(
    "tree", [{}, {"epoch": 3}, {"optimizer": {"state": {0: {"m": torch.ones(1)}}}}, {"model": None}]
)
def test_no_weights_at_all(tree: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="no weights"):
        open_source(tree)


def test_what_is_beside_the_weights() -> None:
    tree = {"net": weights(LIVE), "ema_net": weights(EMA), "epoch": 1, "optimizer": {"m": torch.ones(3)}}
    metadata = open_source(tree).metadata
    assert list(metadata) == ["epoch", "optimizer"]
    assert metadata["optimizer"]["m"].read().tolist() == [1.0] * 3


def test_extra_state_is_no_set_of_weights() -> None:
    tree = {**weights(LIVE), "q._extra_state": {"min": torch.ones(1), "symmetric": True}}
    checkpoint = open_source(tree)
    assert list(checkpoint) == ["fc.weight", "fc.bias"]
    assert checkpoint.metadata["extra_state"]["q._extra_state"]["symmetric"] is True


def test_an_open_checkpoint_is_passed_through() -> None:
    checkpoint = Checkpoint.of(weights(LIVE))
    assert open_source(checkpoint) is checkpoint
    with pytest.raises(CheckpointError, match="one set of weights"):
        open_source(checkpoint, select="ema")


def test_names_that_begin_like_training_state() -> None:
    """A super-resolution pair is two networks; what a person asks for by name is read whatever it is called."""
    one, two = {"w": torch.ones(2)}, {"w": torch.ones(3)}
    with pytest.raises(CheckpointError, match="several sets of weights"):
        open_source({"lr_net": one, "hr_net": two})
    assert open_source({"hypernetwork": one})["w"].shape == (2,)
    assert open_source({"optim_net": one}, select="optim_net")["w"].shape == (2,)
    assert list(open_source({"model": one, "lr_schedulers": two, "hyper_parameters": two}).metadata) == [
        "lr_schedulers",
        "hyper_parameters",
    ]


def test_a_note_of_very_many_sets_is_short() -> None:
    sets = {f"adam.state.{i}": {"w": torch.ones(1)} for i in range(500)}
    (note,) = open_source({"model": {"w": torch.ones(1)}, **sets}).notes
    assert len(note) < 500 and note.endswith("and 489 more")


@pytest.mark.parametrize("under", [None, "model"])
def test_a_pickled_compiled_module(tmp_path: Any, under: str | None) -> None:
    """torch pickles it as a call with the module that was compiled."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    compiled = torch.compile(model, backend="eager")
    torch.save({under: compiled, "epoch": 3} if under else compiled, tmp_path / "c.pt")
    checkpoint = open_source(tmp_path / "c.pt")
    assert list(checkpoint) == list(model.state_dict())
    assert all(torch.equal(checkpoint[key], value) for key, value in model.state_dict().items())
