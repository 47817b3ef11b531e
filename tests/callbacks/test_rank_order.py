import socket

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sagl.callbacks.rank_order import mean_in_rank_order

RANKS = 3


def gradients(rank, bucket_megabytes, *, eval_loader):
    """Of one batch, with buckets of a size, in a group of processes."""
    generator = torch.Generator().manual_seed(rank)
    model = torch.nn.Sequential(*(torch.nn.Linear(300, 300, bias=False) for _ in range(5)))
    for k, parameter in enumerate(model.parameters()):
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(100 + k))
    model = DistributedDataParallel(model, bucket_cap_mb=bucket_megabytes)
    if eval_loader:
        model.register_comm_hook(None, mean_in_rank_order)
    model(torch.randn(4, 300, generator=generator)).square().mean().backward()
    return torch.stack([parameter.grad for parameter in model.parameters()])


def compare(rank, port, folder):
    """Write down what of it depends on the size of buckets."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    ordered = [gradients(rank, size, eval_loader=True) for size in (0.1, 25)]
    free = [gradients(rank, size, eval_loader=False) for size in (0.1, 25)]
    torch.save({"ordered": ordered, "free": free}, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    torch.multiprocessing.spawn(compare, (port, folder), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def test_gradients_do_not_depend_on_how_ddp_lays_out_its_buckets(found):
    small, large = found[0]["ordered"]
    assert torch.equal(small, large)
    assert all(torch.equal(large, of_rank["ordered"][1]) for of_rank in found)


def test_they_are_the_mean_that_ddp_takes_but_for_rounding(found):
    torch.testing.assert_close(found[0]["ordered"][1], found[0]["free"][1], rtol=1e-5, atol=2e-7)
