"""What a run leaves behind, and how it is read back. Reading needs neither torch nor accelerate.

Only `checkpoint` and `run_pictures` hold tensors and import torch.
"""

from mnist_dist.record.metrics import EpochRecord, RunSummary
from mnist_dist.record.rank_summary import Meter
from mnist_dist.record.result import RunResult, read_result

__all__ = ["EpochRecord", "Meter", "RunResult", "RunSummary", "read_result"]
