"""Data: pictures decoded once into a memory-mapped array, a batch order that resumes anywhere, and text."""

from fastgan.data.batches import BatchOrder, ImageBatches
from fastgan.data.images import ImageArray, load_images

__all__ = ["ImageArray", "load_images"]
