"""Slots: every tensor once, under all of its names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from zoo import ARCHS

from qat_compat.state import collect_slots, has_extra_state, join_path, memory_of, split_path


@pytest.mark.parametrize("name", ARCHS)
def test_the_keys_are_those_of_the_state_dict_in_its_order(name: str) -> None:
    model = ARCHS[name].make()
    slots = collect_slots(model)
    assert [key for key, slot in slots.items() if slot.persistent] == list(model.state_dict())
    for key, slot in slots.items():
        assert key in slot.keys
        module, attribute = slot.owners[slot.keys.index(key)]
        assert getattr(module, attribute) in [tensor for tensor in slot.tensors if tensor is getattr(module, attribute)]


def test_a_shared_module_and_a_tied_parameter_are_one_slot_each() -> None:
    shared, tied = ARCHS["shared"].make(), ARCHS["tied"].make()
    assert collect_slots(shared)["fc2.weight"].keys == ("fc1.weight", "fc2.weight")
    slot = collect_slots(tied)["lm_head.weight"]
    assert slot.keys == ("embed.weight", "lm_head.weight")
    assert slot.key == "embed.weight"
    assert slot.tensor is tied.embed.weight


def test_two_parameters_on_one_memory_are_one_slot_of_two_objects() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data)
    slot = collect_slots(model)["1.weight"]
    assert slot.keys == ("0.weight", "1.weight")
    assert len(slot.tensors) == 2


def test_a_part_of_another_tensor_is_no_tie() -> None:
    model = nn.Module()
    model.whole = nn.Parameter(torch.zeros(4, 2))
    model.register_buffer("part", model.whole.data[:2])
    slots = collect_slots(model)
    assert slots["whole"].keys == ("whole",)
    assert slots["part"].keys == ("part",)


def test_empty_and_meta_tensors_are_never_tied_by_address() -> None:
    model = nn.Module()
    model.register_buffer("a", torch.zeros(0))
    model.register_buffer("b", torch.zeros(0))
    model.register_buffer("c", torch.zeros(2, device="meta"))
    model.register_buffer("d", torch.zeros(2, device="meta"))
    assert all(slot.keys == (key,) for key, slot in collect_slots(model).items())


def test_what_is_not_saved_is_known() -> None:
    slots = collect_slots(ARCHS["constants"].make())
    assert not slots["mask"].persistent
    assert slots["gain"].persistent
    assert not slots["gain"].is_parameter


def test_memory_tells_views_apart() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    assert memory_of(weight) == memory_of(weight.view(2, 3))
    for other in (weight.clone(), weight[:1], weight.t(), weight.view(torch.int32)):
        assert memory_of(weight) != memory_of(other)


def test_extra_state_is_found_where_a_module_has_its_own() -> None:
    class Noted(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"note": 1}

    model = nn.Sequential(Noted(1, 1), nn.Linear(1, 1))
    assert [has_extra_state(module) for module in model] == [True, False]


@pytest.mark.parametrize("name", ["weight", "a.weight", "a.b.weight", ".weight"])
def test_split_and_join_are_inverse(name: str) -> None:
    assert join_path(*split_path(name)) == name.lstrip(".")
