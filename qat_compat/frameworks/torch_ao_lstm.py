"""What torch.ao's eager mode makes of an LSTM.

What is known here, and what it rests on (torch 2.13): `prepare_qat` puts `nn.quantizable.LSTM` in the place of an
`nn.LSTM`, and `convert` an `nn.quantized.LSTM` of the same layout in the place of that. Each layer and direction is a
cell with two linear layers, whose weights and biases are those of the `nn.LSTM` as they are: four gates stacked in one
tensor. (`split_gates=True`, which no default uses, has a layer per gate, and is not read.)
"""

from __future__ import annotations

import re

from torch import nn

from qat_compat.frameworks.fake_quant_names import has_base

__all__ = ["is_lstm", "lstm_name"]

# within a layer of `nn.quantizable.LSTM` -> in `nn.LSTM`, with the layer's number
_LEAVES = {
    "layer_fw.cell.igates.weight": "weight_ih_l{}",
    "layer_fw.cell.hgates.weight": "weight_hh_l{}",
    "layer_fw.cell.igates.bias":   "bias_ih_l{}",
    "layer_fw.cell.hgates.bias":   "bias_hh_l{}",
    "layer_bw.cell.igates.weight": "weight_ih_l{}_reverse",
    "layer_bw.cell.hgates.weight": "weight_hh_l{}_reverse",
    "layer_bw.cell.igates.bias":   "bias_ih_l{}_reverse",
    "layer_bw.cell.hgates.bias":   "bias_hh_l{}_reverse",
}  # fmt: skip
_KEY = re.compile(r"(?P<host>(?:.+\.)?)layers\.(?P<layer>\d+)\.(?P<leaf>layer_[fb]w\.cell\.[ih]gates\.\w+)$")


def lstm_name(key: str) -> str | None:
    """What `nn.LSTM` calls a tensor of the module that stands in its place; None for any other key.

    Example:
        >>> lstm_name("rnn.layers.1.layer_bw.cell.hgates.weight"), lstm_name("rnn.layers.1.weight")
        ('rnn.weight_hh_l1_reverse', None)
    """
    found = _KEY.match(key) if "gates." in key else None
    leaf = _LEAVES.get(found["leaf"]) if found is not None else None
    return None if found is None or leaf is None else found["host"] + leaf.format(found["layer"])


def is_lstm(module: nn.Module) -> bool:
    """Whether it is what eager mode put in the place of an `nn.LSTM`."""
    return has_base(module, "LSTM") and type(module).__module__.startswith("torch.ao.nn.quantizable.")
