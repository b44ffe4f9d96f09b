"""A run of Lightning that ends in directories of shards, and in the file that Lightning consolidates each of them to.

Run as `python lightning_sharded.py FOLDER`; leaves `model_parallel/` and `fsdp/`, and beside each its `.ckpt`.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from common import Cnn
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

warnings.simplefilter("ignore")

import lightning  # noqa: E402  (it warns when it is imported)
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy  # noqa: E402
from lightning.pytorch.utilities.consolidate_checkpoint import (  # noqa: E402
    _format_checkpoint,
    _load_distributed_checkpoint,
)


class Lit(lightning.LightningModule):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = Cnn()

    def configure_model(self) -> None:
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss: Tensor = self.model(batch).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.hparams["rate"], momentum=0.9)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, strategy=ModelParallelStrategy(process_group_backend="gloo"), max_epochs=1,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Lit(0.01), DataLoader(torch.randn(8, 3, 16, 16), batch_size=4))
    trainer.save_checkpoint(folder / "model_parallel")
    torch.save(_load_distributed_checkpoint(folder / "model_parallel"), folder / "model_parallel.ckpt")
    # A trainer gives the FSDP strategy to GPUs only; its own method writes what it writes there.
    strategy = FSDPStrategy(state_dict_type="sharded")
    strategy.save_checkpoint(trainer._checkpoint_connector.dump_checkpoint(weights_only=False), folder / "fsdp")
    torch.save(_format_checkpoint(_load_distributed_checkpoint(folder / "fsdp")), folder / "fsdp.ckpt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
