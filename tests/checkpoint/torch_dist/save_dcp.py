"""Saves a state dict with torch.distributed.checkpoint from 1, 2 and 4 ranks, each tensor sharded as a DTensor.

python save_dcp.py STATE.pt OUT        writes OUT/1, OUT/2 and OUT/4
"""

import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor


def save(rank: int, ranks: int, state: dict, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, init_method=f"file://{out}/rendezvous{ranks}")
    mesh = init_device_mesh("cpu", (ranks,))

    def placed(number: int, value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        # By rows, by columns and not at all, in turn.
        way = Replicate() if number % 3 == 2 else Shard(number % 3 % value.ndim)
        return distribute_tensor(value, mesh, [way])

    dcp.save({name: placed(i, value) for i, (name, value) in enumerate(state.items())}, checkpoint_id=out / str(ranks))
    dist.barrier()


def main() -> None:
    warnings.filterwarnings("ignore")
    state, out = torch.load(sys.argv[1]), Path(sys.argv[2])
    for ranks in (1, 2, 4):
        children = []
        for rank in range(ranks):
            if (child := os.fork()) == 0:  # torch is imported once for all of them
                status = 1
                try:
                    save(rank, ranks, state, out)
                    status = 0
                finally:
                    os._exit(status)  # some runs abort in the teardown of gloo
            children.append(child)
        if any(os.waitpid(child, 0)[1] for child in children):
            sys.exit(f"saving with {ranks} ranks failed")


if __name__ == "__main__":
    main()
