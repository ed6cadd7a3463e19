"""How many kernels a graph launches: the nodes of what is laid out and not yet computed.

A node counts once, a fused chain of ``mx.compile`` too. What only looks at an array in another way
counts nothing: a reshape does copy where the order of elements changes, which with one token it
never does. Attention over a long context takes two launches on Metal and counts once here.
"""

import io
import re
from collections import Counter

import mlx.core as mx

VIEWS = {"AsStrided", "Broadcast", "Contiguous", "Copy", "Depends", "ExpandDims", "Flatten",
         "Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View"}


def launches(*outputs: mx.array) -> Counter[str]:
    """The kernels that computing ``outputs`` takes, by the names of MLX's operations."""
    graph = io.StringIO()
    mx.export_to_dot(graph, *outputs)
    names = re.findall(r'label ="(\w+)", shape=rectangle', graph.getvalue())
    return Counter(name for name in names if name not in VIEWS)
