"""Which tensors are DTensors, what of them this process holds, and vectors of their rows."""

import sys

from torch import Tensor


def is_instance(x: Tensor, module: str, name: str) -> bool:
    """`isinstance` of a class whose module takes long to import: where nobody has, there is no such tensor."""
    return module in sys.modules and isinstance(x, getattr(sys.modules[module], name))


def is_dtensor(x: Tensor) -> bool:
    return is_instance(x, "torch.distributed.tensor", "DTensor")


def is_fake(x: Tensor) -> bool:
    """Whether a tensor has no values: of `FakeTensorMode`, in which tools estimate what a step needs."""
    return is_instance(x, "torch._subclasses.fake_tensor", "FakeTensor")


def local_tensor(tensor: Tensor) -> Tensor:
    """This process' part of a DTensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def local_tensors(tensors: list[Tensor]) -> list[Tensor]:
    """[`local_tensor`] of each. Of a parameter `to_local` makes a new view, which takes longer than all else here."""
    return [x._local_tensor if is_dtensor(x) else x for x in tensors]


def has_whole_rows(p: Tensor) -> bool:
    """Whether a parameter is a DTensor of which each process holds whole rows, one after the other."""
    if not is_dtensor(p) or p.dim() < 2 or not p.numel():
        return False
    from torch.distributed.tensor import Replicate, Shard

    return all(type(x) is Replicate or (type(x) is Shard and x.dim == 0) for x in p.placements)


def shard(values: Tensor, p: Tensor) -> Tensor:
    """Values of the shape of a DTensor, which every process has whole, sharded as it is; nobody sends any."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(values.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def shard_rows(values: Tensor, p: Tensor) -> Tensor:
    """Values of the rows of a parameter, `(rows, …)`, sharded as its rows are; as they are where those are not whole.

    Args:
        values: of all rows, on every process; or sharded already.
        p: the parameter.
    """
    if is_dtensor(values) or not has_whole_rows(p):
        return values
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    (count, *_), (first, *_) = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    meta = TensorMeta(values.shape, values.stride(), values.dtype)
    return _dtensor(values[first : first + count].clone(), DTensorSpec(p.device_mesh, p.placements, tensor_meta=meta))


def with_local(tensor: Tensor, local: Tensor) -> Tensor:
    """`local` in place of this process' part of a DTensor; for any other tensor `local` itself."""
    return _dtensor(local, tensor._spec) if is_dtensor(tensor) else local


def _dtensor(local: Tensor, spec) -> Tensor:
    # Not by `from_local`, which moves what is offloaded to the mesh' device
    from torch.distributed.tensor import DTensor

    return DTensor(local, spec, requires_grad=False)
