"""A plain DDP loop with clipfast's model and loss: two ranks compute what one process with the whole batch computes.

    pip install .
    torchrun --nproc-per-node 2 examples/ddp.py

NCCL serves where each rank has a GPU of its own, gloo elsewhere. ``ContrastiveLoss`` asks torch.distributed which ranks
there are, holds this rank's pictures against the texts of all, and returns the loss of the joined batch. After the mean
over ranks, which DDP takes, the gradients are the joined batch's too. What is below "the same by one process" shows it;
leave it out of a loop of your own.
"""

import argparse
import copy
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import clipfast


def joined_batch(model: clipfast.CLIP, step: int, pairs: int) -> tuple[Tensor, Tensor]:
    """Return a step's pictures and tokens, those of all ranks: noise here, and your data in a loop of your own."""
    generator = torch.Generator().manual_seed(step)
    shape = pairs, 3, *model.visual.image_size
    images = torch.randn(shape, generator=generator, dtype=model.logit_scale.dtype)
    return images, clipfast.tokenize([f"picture {n} of step {step}" for n in range(pairs)], model.context_length)


def main() -> None:
    """Train for some steps, and compare each with one process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=Path(__file__).with_name("small.json"), help="a name, or a file of sizes")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32, help="pairs of all ranks together")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("torchrun starts this: torchrun --nproc-per-node 2 examples/ddp.py")

    on_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpus else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpus else "gloo", device_id=device if on_gpus else None)
    rank, ranks = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)
    model = clipfast.create_model(args.model, device=device, dtype=getattr(torch, args.dtype))
    alone = copy.deepcopy(model)
    model = DistributedDataParallel(model)
    loss_function = clipfast.ContrastiveLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    differences = torch.zeros(2, dtype=torch.float64, device=device)
    for step in range(args.steps):
        images, tokens = (x.to(device) for x in joined_batch(alone, step, args.batch_size))
        alone.load_state_dict(model.module.state_dict())

        # a rank has every ranks-th pair, as a DistributedSampler deals them
        loss = loss_function(*model(images[rank::ranks], tokens[rank::ranks]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # the same by one process: its own model, the whole batch, and a loss that asks no other rank
        expected = clipfast.ContrastiveLoss(world_size=1)(*alone(images, tokens))
        alone.zero_grad()
        expected.backward()
        pairs = [(p.grad, q.grad) for p, q in zip(model.parameters(), alone.parameters(), strict=True)]
        largest = max(q.abs().max() for _, q in pairs)
        in_gradients = max((p - q).abs().max() for p, q in pairs) / largest
        found = torch.stack([((loss - expected) / expected).abs(), in_gradients]).detach().double()
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        differences = torch.maximum(differences, found)
        if rank == 0:
            print(f"step {step + 1}: loss {loss.item():.6f} on {ranks} ranks, {expected.item():.6f} by one process")
    if rank == 0:
        print("largest relative difference: loss {:.1e}, gradients {:.1e}".format(*differences.tolist()))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
