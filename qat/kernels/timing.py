"""Time of a kernel on a GPU, with memory as cold as it is in a model."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

# Over four times the cache of the largest GPU: what is read again was evicted in between.
_RING_BYTES = 2**28
_REPLAYS = 20


def ring(make: Callable[[], Sequence[Any]], bytes_each: int) -> list[Sequence[Any]]:
    """As many sets of arguments as fill the ring."""
    return [make() for _ in range(max(2, -(-_RING_BYTES // bytes_each)))]


def microseconds(function: Callable[..., Any], sets: Sequence[Sequence[Any]]) -> float:
    """Of one call: the median of graph replays, each of which goes once around the ring."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function(*sets[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for arguments in sets:
            function(*arguments)
    graph.replay()
    times = []
    for _ in range(_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(sets))
    return statistics.median(times)
