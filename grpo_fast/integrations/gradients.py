"""Gradients that are in the parameters before a host's backward: delivered once, averaged over
processes, and none after an error."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..errors import InputError

# Bytes that go over the wire at a time, beside the gradients.
BUCKET_BYTES = 64 * 2**20


class Delivered(torch.autograd.Function):
    """`loss`, whose gradient was added to the parameters when it was made.

    A host calls `backward` itself; TRL's, without a GradScaler and with TRL's own accumulation,
    multiplies by exactly 1. To carry the graph of all rows that far would take the memory that
    cutting a micro-batch into rows saves, to carry gradients beside those that are there a second
    copy of every parameter. So they are delivered, and a factor is refused.
    """

    @staticmethod
    def forward(ctx, loss: Tensor, anchor: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx, dloss: Tensor):
        if dloss != 1:
            raise InputError(
                f"the loss was multiplied by {float(dloss)} after compute_loss, and its gradients "
                "are in the parameters: leave the loss as it is, or set GRPOTrainer.depth = 'fused'"
            )
        return None, None


def delivered(loss: Tensor) -> Tensor:
    """A loss without a graph that a host may call `backward` on."""
    return Delivered.apply(loss, torch.zeros((), device=loss.device, requires_grad=True))


def zero_gradients(model: nn.Module) -> None:
    """What a backward of nothing leaves: an optimizer goes on with its momentum."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


@contextlib.contextmanager
def whole_or_none(model: nn.Module) -> Iterator[None]:
    """After an error in here no parameter has a gradient: a part of a micro-batch cannot be told
    from what was there before, and to keep that apart would be a copy of every parameter."""
    try:
        yield
    except BaseException as error:
        for parameter in model.parameters():
            parameter.grad = None
        error.add_note("grpo-fast dropped all gradients of this optimizer step: begin it again")
        raise


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """The mean over the ranks of a process group, as DDP leaves it in `.grad`.

    A parameter without a gradient on some ranks counts as 0 there, and one without any keeps none.
    """
    trained = [x for x in parameters if x.requires_grad]
    if not trained:
        return
    world = torch.distributed.get_world_size()
    used = torch.tensor([float(x.grad is not None) for x in trained], device=trained[0].device)
    torch.distributed.all_reduce(used)
    trained = [x for x, ranks in zip(trained, used.tolist(), strict=True) if ranks]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([x.grad for x in trained]):
        # Divided first, as DDP does: the sum of float16 gradients may be out of range.
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket]).div_(world)
        torch.distributed.all_reduce(flat)
        for gradient, mean in zip(bucket, flat.split([x.numel() for x in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device, the same on every rank."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        alike = bucket and (gradient.dtype, gradient.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and (not alike or sum(x.nbytes for x in bucket) + gradient.nbytes > BUCKET_BYTES):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
