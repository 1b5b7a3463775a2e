"""Data: pictures decoded once into a memory-mapped array, a batch order that resumes anywhere, and text.

``fastgan.data.text`` is loaded when it is first named: it needs ``tokenizers``.
"""

from fastgan.data.batches import BatchOrder, ImageBatches
from fastgan.data.images import ImageArray, load_images

__all__ = ["BatchOrder", "ImageArray", "ImageBatches", "load_images"]
