"""Train with ScaleKD in Lightning (pip install lightning): python examples/lightning_loop.py caches/demo [devices]"""

import sys

import lightning
import torch

from scalekd_cache import CachedTargets, ScaleKDLoss, timm_student


class CachedData(lightning.LightningDataModule):
    def __init__(self, cache, **options):
        super().__init__()
        self.cache, self.options = cache, options

    def train_dataloader(self):  # called in every process; each process gets its own batches
        return CachedTargets(self.cache, **self.options)


class Distillation(lightning.LightningModule):
    def __init__(self, targets):
        super().__init__()
        self.student = timm_student("resnet18", targets)
        self.loss = ScaleKDLoss(targets, self.student)

    def training_step(self, batch, number):
        terms = self.loss(*self.student(batch.images), batch.labels, batch.targets)
        self.log("loss", terms.total)
        if self.global_rank == 0:
            print(f"step {number + 1}: loss {terms.total.item():.4f}", flush=True)
        return terms.total

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    lightning.seed_everything(0)
    devices = int(sys.argv[2]) if len(sys.argv) > 2 else "auto"
    data = CachedData(sys.argv[1], batch_size=32, epochs=1)  # one pass covers all epochs, so max_epochs=1
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=1, devices=devices, **quiet)
    trainer.fit(Distillation(data.train_dataloader()), datamodule=data)
