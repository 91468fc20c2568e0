"""Several processes on gloo and the CPU. Ranks start once for each group of checks, since a process takes seconds to
import torch; they write their results to files, and the tests read them.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _rank(rank, work, world, folder, arguments):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=120))
    torch.save(work(rank, world, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_ranks(work, world, folder, *arguments):
    """What `work(rank, world, *arguments)` returns on each rank; an exception of any is raised here."""
    mp.start_processes(_rank, (work, world, folder, arguments), nprocs=world, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
