"""A mock GPU: tensors on the meta device, and a list of all transfers between it and the host.

Copies to the host are filled with ones, so code that reads flags continues. Reading a value (`bool(x)`, `x.item()`),
which would make the host wait for a GPU, is listed too. Operators that mix devices fail, as on a GPU.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
READ = {torch.bool: True, torch.int64: torch.iinfo(torch.int64).max}
"""Replaces every value that is read; the watchdog's position of the first NaN is the largest int64 if there is none."""
aten = torch.ops.aten


class Crossings(TorchDispatchMode):
    """Lists copies to the device, copies to the host, and reads of single values, each with its shape."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        kinds = {tensor.device.type for tensor in tensors}
        packet = func.overloadpacket
        if packet is aten._local_scalar_dense and kinds == {"meta"}:
            self.seen.append(("read", tuple(args[0].shape)))
            return READ.get(args[0].dtype, 1)
        if packet is aten._to_copy and (target := kwargs.get("device")) is not None and target.type not in kinds:
            self._cross(args[0], target.type)
            if target.type == "cpu":
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        elif packet is aten.copy_ and len(kinds) == 2:
            self._cross(args[1], args[0].device.type)
            return args[0].fill_(1) if args[0].device.type == "cpu" else args[0]
        elif len(kinds) == 2:
            hosts = [tensor for tensor in tensors if tensor.device.type == "cpu"]
            numbers = packet not in (aten.cat, aten.stack) and all(tensor.dim() == 0 for tensor in hosts)
            assert numbers, f"{func} mixes devices"  # arithmetic with numbers on the host is allowed
        if packet in (aten.nonzero, aten.masked_select) and "meta" in kinds:
            self.seen.append(("read", tuple(args[0].shape)))  # the host waits for the size of the result
        return func(*args, **kwargs)

    def _cross(self, tensor, target):
        self.seen.append(("to host" if target == "cpu" else "to device", tuple(tensor.shape)))


@contextlib.contextmanager
def device_crossings():
    """Yields the list."""
    with Crossings() as mode:
        yield mode.seen
