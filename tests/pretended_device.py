"""A pretended accelerator: ``python tests/pretended_device.py train.py OPTIONS`` runs a script on it.

Its tensors say that they are on a device of their own, and compute on the CPU. As on CUDA, an operation on tensors of
two devices is an error, and so is a collective of host tensors under several processes; as on Apple's GPUs, there is no
float64. What waits for the device is counted in ``waits``, by operation and line. What the scripts do on CUDA alone
(pinned memory, SyncBatchNorm, float16) is not rehearsed.
"""

import os
import runpy
import sys
import traceback
from collections import Counter
from pathlib import Path

import accelerate.state
import torch
import torch.distributed
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

ROOT = Path(__file__).resolve().parent.parent
HOST = torch.device("cpu")
INDEXING = ("aten::index.", "aten::index_put", "aten::_index_put")
READING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount")
waits = Counter()


class Backend(_DummyBackendModule):
    """What torch and accelerate ask a device module for."""

    def get_rng_state(self, device=None):
        return torch.get_rng_state()

    def set_rng_state(self, state, device=None):
        torch.set_rng_state(state)

    def get_amp_supported_dtype(self):
        return [torch.bfloat16, torch.float32]

    def set_device(self, device):
        pass

    synchronize = set_device


_setup_privateuseone_for_python_backend(rename="pretended", backend_module=Backend())
DEVICE = torch.device("pretended:0")


class OnDevice(torch.Tensor):
    """A tensor of the pretended device, computed in ``host``."""

    @staticmethod
    def __new__(cls, host):
        layout = dict(strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype)
        tensor = torch.Tensor._make_wrapper_subclass(cls, host.size(), device=DEVICE, **layout)
        tensor.host = host
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def __getitem__(self, index):
        parts = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(tuple(from_host(part) if isinstance(part, list) else part for part in parts))

    def tolist(self):
        count_wait("tolist")
        return self.host.detach().tolist()

    def numpy(self, **options):
        raise TypeError("a tensor on a device cannot be read as an array")

    __array__ = numpy


class Dispatch(TorchDispatchMode):
    """Sees what no tensor of the device takes part in: what makes tensors, and collectives."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, OnDevice) or on_device(leaf) for leaf in leaves):
            return compute(function, args, kwargs)
        if function.namespace == "c10d" and any(isinstance(leaf, torch.Tensor) for leaf in leaves):
            callers = {frame.name for frame in traceback.extract_stack()}
            if not callers & {"largest", "barrier", "broadcast_object_list", "all_gather_object", "gather_object"}:
                raise RuntimeError(f"{function}: NCCL does not take tensors of the host")  # the others use gloo
        return function(*args, **kwargs)


def on_device(value) -> bool:
    return isinstance(value, torch.device) and value.type == DEVICE.type


def count_wait(operation: str) -> None:
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename).resolve().parent == ROOT]
    waits[f"{operation} {' < '.join(f'{Path(f.filename).name}:{f.lineno}' for f in frames[:-4:-1])}"] += 1


def check(name: str, args: tuple, tensors: list[torch.Tensor]) -> None:
    """Raise RuntimeError for tensors of two devices, unless CUDA takes both here."""
    host = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim() > 0]
    copies = name.startswith(("aten::copy", "aten::_to_copy", "aten::_foreach_copy"))
    indexes_device = name.startswith(INDEXING) and isinstance(args[0], OnDevice)
    if host and len(host) < len(tensors) and not (copies or indexes_device):
        raise RuntimeError(f"{name}: tensors on two devices; on the CPU: {[tuple(tensor.shape) for tensor in host]}")


def waits_for_device(name: str, tensors: list[torch.Tensor], result_on_device: bool) -> bool:
    """Whether the host must know the result: a value, a size that depends on values, or a copy to the host."""
    by_condition = name.startswith(INDEXING) and any(tensor.dtype == torch.bool for tensor in tensors)
    return by_condition or any(part in name for part in READING) or ("copy" in name and not result_on_device)


def compute(function, args: tuple, kwargs: dict):
    """What ``function`` returns: computed on the CPU, on the device where CUDA would leave it."""
    name = function.name()
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    check(name, args, tensors)
    result_on_device = on_device(kwargs["device"]) if kwargs.get("device") is not None else bool(ours)
    if name.startswith("aten::copy_"):
        result_on_device = isinstance(args[0], OnDevice)
    if result_on_device and kwargs.get("generator") is not None:
        raise RuntimeError(f"{name}: a generator of the CPU cannot draw on a device")
    if ours and waits_for_device(name, tensors, result_on_device):
        count_wait(name)

    args, kwargs = pytree.tree_map(to_host, (args, kwargs))
    inputs = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
    changed = {id(tensor.host): tensor for tensor in ours}  # what operations in place return

    def placed(output):
        if not isinstance(output, torch.Tensor):
            return output
        if result_on_device and id(output) in changed:
            return changed[id(output)]
        if result_on_device and output.dtype == torch.float64:
            raise RuntimeError(f"{name}: there is no float64 on the device")
        if name == "aten::_to_copy" and id(output) in inputs:
            output = output.clone()
        return OnDevice(output) if result_on_device else output

    return pytree.tree_map(placed, function(*args, **kwargs))


def to_host(leaf):
    if isinstance(leaf, OnDevice):
        return leaf.host
    return HOST if on_device(leaf) else leaf


# ------------------------------------------------------------------------------------------- what torch must be told

library, fallback = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
fallback.fallback(lambda function, *args, **kwargs: compute(function, args, kwargs), "PrivateUse1")
fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
from_host, view_as_tensor = torch.tensor, torch.as_tensor


def register_maker(name: str, function) -> None:
    library.impl(name, lambda *args, **kwargs: compute(function, args, kwargs | dict(device=DEVICE)), "PrivateUse1")


def register_autocast(name: str) -> None:
    function = getattr(torch.ops.aten, name)

    def lower(leaf):
        lowers = isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32
        return leaf.to(torch.get_autocast_dtype(DEVICE.type)) if lowers else leaf

    def in_lower_precision(*args, **kwargs):
        args, kwargs = pytree.tree_map(lower, (args, kwargs))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
            return function(*args, **kwargs)

    library.impl(name, in_lower_precision, "AutocastPrivateUse1")


register_maker("empty.memory_format", torch.ops.aten.empty.memory_format)
register_maker("empty_strided", torch.ops.aten.empty_strided.default)
for name in ("linear", "matmul", "bmm", "mm", "addmm", "scaled_dot_product_attention"):
    register_autocast(name)


def moved(make):
    """``make``, which torch cannot do on a device written in Python, followed by a copy."""

    def make_and_move(*args, device=None, **options):
        tensor = make(*args, **options)
        return tensor if device is None else tensor.to(device)

    return make_and_move


torch.tensor, torch.as_tensor = moved(from_host), moved(view_as_tensor)


def pretend_nccl() -> None:
    """Several processes, with collectives of gloo beneath those of the device."""
    init, gather = torch.distributed.init_process_group, torch.distributed.all_gather_into_tensor
    distributed = torch.nn.parallel.DistributedDataParallel
    wrap = distributed.__init__
    torch.distributed.init_process_group = lambda backend=None, **options: init("cpu:gloo,pretended:gloo", **options)
    torch.distributed.all_gather_into_tensor = lambda out, x, **options: gather(out.view(-1), x.view(-1), **options)
    distributed.__init__ = lambda self, model, device_ids=None, output_device=None, **options: wrap(
        self, model, **options
    )
    state = accelerate.state.PartialState
    state._prepare_backend = lambda *args, **options: ("nccl", accelerate.state.DistributedType.MULTI_GPU)
    state.set_device = lambda self: setattr(self, "device", DEVICE)
    torch.cuda.set_device = lambda device: None


def main() -> None:
    os.environ["ACCELERATE_TORCH_DEVICE"] = str(DEVICE)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        pretend_nccl()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(ROOT))
    sys.modules["pretended_device"] = sys.modules["__main__"]  # for scripts that read the counts themselves
    with Dispatch():
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
