"""Where work goes on that can go on side by side: in processes here, or on the nodes of a cluster.

An :class:`Executor` starts workers; what they do is the business of whoever asks for them. Where
there is none, everything is done one after the other.
"""

from secateur.executors.base import Asked, Executor, opened_executor, spreads
from secateur.executors.pool import Pool

__all__ = ["Asked", "Executor", "Pool", "opened_executor", "spreads"]
