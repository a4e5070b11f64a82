"""A training that is not ours, studied: `mnist-dist study --script examples/your_training.py --batch-sizes 100,400`.

Plain Accelerate, another model, made-up data. What a study needs of it are the two options, and the lines with `meter`.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mnist_dist.record import Meter

parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, default=100, help="of all processes together")
parser.add_argument("--output-dir", required=True)
parser.add_argument("--epochs", type=int, default=2)
options = parser.parse_args()

# a batch of the loader is shared by the processes
accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
torch.manual_seed(0)
inputs = torch.randn(20_000, 32)
targets = torch.sin(inputs).sum(dim=1, keepdim=True)
loader = DataLoader(TensorDataset(inputs, targets), batch_size=options.batch_size, shuffle=True, drop_last=True)
model = nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)


def synchronize():
    """Wait for the GPU, if there is one, and for the other processes."""
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    accelerator.wait_for_everyone()


meter = Meter(synchronize=synchronize)
for epoch in range(options.epochs):
    with meter:
        for x, y in loader:
            loss = nn.functional.mse_loss(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            meter.step(options.batch_size)
    accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")
if accelerator.is_main_process:
    meter.write(options.output_dir, global_batch_size=options.batch_size, num_processes=accelerator.num_processes,
                torch=torch.__version__)
accelerator.end_training()
