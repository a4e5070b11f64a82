"""Images: read from files, downloaded or drawn, and held in memory. Knows no processes."""

from mnist_dist.data.idx import STEMS
from mnist_dist.data.images import NUM_CLASSES, Images, ImageSets, scale
from mnist_dist.data.sources import check_name, load, obtain

__all__ = ["NUM_CLASSES", "STEMS", "ImageSets", "Images", "check_name", "load", "obtain", "scale"]
