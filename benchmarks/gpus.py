"""Work that is spread over the GPUs of a machine."""

import multiprocessing
import os
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from typing import Any, TypeVar

import torch

Item = TypeVar("Item", bound=Hashable)


def spread(
    run: Callable[[Item], Any],
    first: Iterable[Item],
    after: Callable[[Item], Iterable[Item]],
    name: Callable[[Item], str],
    per_gpu: int = 1,
) -> None:
    """Run every item as soon as what it waits for is done.

    Args:
        run: does one item and returns what is printed of it; picklable.
        first: items that wait for none.
        after: items that may run once that one is done.
        name: what an item is called.
        per_gpu: items at a time on every GPU; small models leave most of one idle.

    Raises:
        SystemExit: at the end, if an item failed; what waits for it did not run, all others did.
    """
    gpus = _visible() or [""]
    workers = len(gpus) * per_gpu
    context = multiprocessing.get_context("spawn")
    free = context.Queue()
    for gpu in gpus * per_gpu:
        free.put(gpu)
    failed: list[str] = []
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ProcessPoolExecutor(workers, context, initializer=_take_gpu, initargs=(free, threads)) as pool:
        pending: dict[Future[Any], Item] = {}

        def submit(items: Iterable[Item]) -> None:
            for item in items:
                pending[pool.submit(run, item)] = item

        submit(first)
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                item = pending.pop(future)
                error = future.exception()
                found = f"failed: {error!r}" if error else future.result()
                print(name(item), found, f"({len(pending)} in line)", flush=True)
                if error:
                    failed.append(name(item))
                else:
                    submit(after(item))
    if failed:
        raise SystemExit(f"These failed, and what waits for them did not run: {', '.join(failed)}.")


def _visible() -> list[str]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",") if chosen else [str(index) for index in range(torch.cuda.device_count())]


def _take_gpu(free: Any, threads: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = free.get()
    torch.set_num_threads(threads)
