"""Running a function on several gloo ranks of this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(function: Callable[..., Any], ranks: int, *args: Any) -> list[Any]:
    """Call ``function(rank, ranks, *args)`` in fresh processes; return what each rank returned.

    The function must be importable by its file's path: test modules have no package, so each process loads the file.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    file, name = function.__code__.co_filename, function.__name__
    processes = [
        context.Process(target=_rank, args=(file, name, rank, ranks, port, results, args)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    got: dict[int, Any] = {}
    while len(got) < ranks and (any(p.is_alive() for p in processes) or not results.empty()):
        if results.empty():
            processes[0].join(0.05)
            continue
        rank, value = results.get()
        got[rank] = value
    for process in processes:
        process.join(60)
    errors = [v for v in got.values() if isinstance(v, _Failure)]
    assert not errors, f"a rank failed: {errors[0].text}"
    assert len(got) == ranks, f"only ranks {sorted(got)} of {ranks} answered"
    return [got[rank] for rank in range(ranks)]


class _Failure:
    def __init__(self, text: str) -> None:
        self.text = text


def _rank(file: str, name: str, rank: int, ranks: int, port: int, results: Any, args: tuple[Any, ...]) -> None:
    import importlib.util
    import traceback

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        dist.init_process_group("gloo", rank=rank, world_size=ranks)
        spec = importlib.util.spec_from_file_location("rank_functions", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        results.put((rank, getattr(module, name)(rank, ranks, *args)))
        dist.barrier()
    except Exception:
        results.put((rank, _Failure(traceback.format_exc())))
    finally:
        dist.destroy_process_group()
