"""Where work goes on that can go on side by side: in processes here, or on the nodes of a cluster.

An :class:`Executor` starts workers; what they do is the business of whoever asks for them. None
means that everything is done one after the other, in the process at hand.
"""

from secateur.executors.base import Asked, Executor, open_executor, torch_threads
from secateur.executors.pool import Pool

__all__ = ["Asked", "Executor", "Pool", "open_executor", "torch_threads"]
