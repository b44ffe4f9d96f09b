"""Small architectures, one for each way in which names or state of a QAT model are hard, and some real ones.

An :class:`Arch` makes the same float model again for the same seed. BN statistics come from forwards on random data, so
that they are those of the convolution in front of them; gammas are random, some of them negative.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from zoo import convolutions, hard_names, hugging_face, mtcnn, networks, sequences
from zoo.arch import Arch
from zoo.hugging_face import minilm, minilm_file

__all__ = ["ARCHS", "MTCNN", "NETWORKS", "Arch", "minilm", "minilm_file"]

# Every test of flows goes through these; the compatibility matrix through the networks, too.
ARCHS: Mapping[str, Arch] = {
    arch.name: arch for arch in (*convolutions.ARCHS, *sequences.ARCHS, *hard_names.ARCHS, *hugging_face.ARCHS)
}
NETWORKS: Mapping[str, Arch] = {arch.name: arch for arch in (*networks.ARCHS, *hugging_face.NETWORKS)}
MTCNN = mtcnn.ARCHS
