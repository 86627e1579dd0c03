"""Work in jobs: threads or processes of this machine, or Ray (extra `ray`; RAY_ADDRESS names a cluster that sees the same folders).

A job leaves its result in files, all or nothing, so that results depend neither on the engine nor on the order, and a job whose worker
was killed is done again. numpy has one BLAS thread in a job: its sums depend on how many there are.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from typing import Any, Literal

from threadpoolctl import threadpool_limits

Engine = Literal["local", "ray"]
Do = Callable[[Any], None]


def run(do: Do, jobs: Sequence[Any], workers: int, engine: Engine = "local", threads: bool = False) -> Iterator[None]:
    """do(job) for each job, several at once; yields as they are done. `threads`: locally threads, else processes."""
    if engine == "ray":
        return _ray(do, jobs, workers)
    if workers == 1 or len(jobs) < 2:
        return _one_by_one(do, jobs)
    return _at_once(do, jobs, ThreadPoolExecutor(workers) if threads else _processes(workers))


def _processes(workers: int) -> Executor:
    return ProcessPoolExecutor(workers, multiprocessing.get_context("forkserver"))


def _alone(do: Do, job: Any) -> None:
    with threadpool_limits(1):
        do(job)


def _one_by_one(do: Do, jobs: Sequence[Any]) -> Iterator[None]:
    for job in jobs:
        _alone(do, job)
        yield


def _at_once(do: Do, jobs: Sequence[Any], pool: Executor) -> Iterator[None]:
    with threadpool_limits(1):  # here too: threads set it for each other
        try:
            yield from (job.result() for job in as_completed([pool.submit(_alone, do, job) for job in jobs]))
        finally:
            pool.shutdown(cancel_futures=True)


def _ray(do: Do, jobs: Sequence[Any], workers: int) -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise ValueError("--engine ray needs the package ray: pip install 'easyref[ray]'") from error
    address = os.environ.get("RAY_ADDRESS")
    ray.init(address=address, include_dashboard=False if address is None else None, num_cpus=None if address else workers)
    try:
        data = ray.data.from_items([{"job": number} for number in range(len(jobs))], override_num_blocks=max(1, len(jobs)))

        def done(row: dict[str, int]) -> dict[str, int]:
            _alone(do, jobs[row["job"]])
            return row

        for _ in data.map(done).iter_rows():
            yield
    finally:
        ray.shutdown()
