"""A GPU that is not there: its tensors lie in main memory, but a mix of them with the CPU's is an error, as on a GPU.

It shows that tensors are moved where they must be, and nothing of speed, memory or the GPU's own arithmetic. Gradients
of most operations make tensors out of its sight: it is for what is done without them.
"""

import contextlib

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

CUDA = torch.device('cuda', 0)
aten = torch.ops.aten
# Take tensors of both kinds on a GPU too: copies, and indices from the CPU into tensors of the GPU.
BOTH = {aten.copy_.default, aten._to_copy.default, aten._has_compatible_shallow_copy_type.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}


class OnGpu(torch.Tensor):
    """A tensor that says it is on the GPU."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype
        )

    def __init__(self, inner):
        self.inner = inner

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self, **_):
        return f'OnGpu({self.inner})'

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        found = {}  # each inner tensor's outside: what is changed in place comes back itself

        def inner(value):
            if isinstance(value, OnGpu):
                found[id(value.inner)] = value
                return value.inner
            if isinstance(value, torch.Tensor) and value.ndim and func not in BOTH:
                raise RuntimeError(f'{func}: expected all tensors to be on the same device, found cuda:0 and cpu')
            return value

        def outer(value):
            if not isinstance(value, torch.Tensor) or isinstance(value, OnGpu):
                return value
            return found.get(id(value)) if id(value) in found else OnGpu(value)

        if func in INDEXED and isinstance(args[0], OnGpu):
            args = (args[0], tree_map(lambda i: OnGpu(i) if type(i) is torch.Tensor else i, args[1]), *args[2:])
        args, kwargs = tree_map(inner, args), tree_map(inner, kwargs or {})
        if 'device' in kwargs:
            kwargs['device'] = torch.device('cpu')
        if func is aten.copy_.default and id(args[0]) not in found:
            return func(*args, **kwargs)  # from the GPU into a tensor of the CPU
        with torch.inference_mode(False):  # which wants to be told of views where they are made
            return tree_map(outer, func(*args, **kwargs))


def is_gpu(device):
    return device is not None and torch.device(device).type == 'cuda'


class Pretended(TorchFunctionMode):
    """What names a device, or asks where a tensor is."""

    def __init__(self):
        super().__init__()
        self.generators = {}  # of the GPU, by their id

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        ours = isinstance(tensor, OnGpu)
        if func in (torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda):
            return moved(func, tensor, args[1:], kwargs)
        if ours and func is torch.Tensor.tolist:
            return tensor.inner.tolist()
        if ours and func in (torch.Tensor.numpy, torch.Tensor.__array__):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if ours and func in (F.one_hot, torch.Tensor.quantile):  # make tensors of their own, out of our sight
            return OnGpu(func(tensor.inner, *args[1:], **kwargs))
        drawn = is_gpu(kwargs.get('device')) or ours
        if drawn and kwargs.get('generator') is not None and id(kwargs['generator']) not in self.generators:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        if is_gpu(kwargs.get('device')) and func is not torch._C._nn._parse_to:
            return OnGpu(func(*args, **{**kwargs, 'device': 'cpu'}))
        return func(*args, **kwargs)


def moved(func, tensor, args, kwargs):
    ours = isinstance(tensor, OnGpu)
    to_gpu = ours
    if func is not torch.Tensor.to:
        to_gpu, args, kwargs = func is torch.Tensor.cuda, (), {}
    kwargs.pop('non_blocking', None)
    rest = []
    for value in (*args, kwargs.pop('device', None), kwargs.pop('other', None)):
        if isinstance(value, torch.Tensor):
            to_gpu = isinstance(value, OnGpu)
            rest.append(value.dtype)
        elif isinstance(value, str | torch.device):
            to_gpu = is_gpu(value)
        elif isinstance(value, torch.dtype):  # the rest says how, not where
            rest.append(value)
    if to_gpu == ours:
        return tensor.to(*rest, **kwargs) if rest or kwargs else tensor
    assert not (tensor.requires_grad and torch.is_grad_enabled() and tensor.grad_fn), 'no gradient goes through here'
    source = tensor.detach()
    result = (source.inner if ours else source).clone(memory_format=torch.preserve_format)
    result = result.to(*rest, **kwargs) if rest or kwargs else result
    return OnGpu(result) if to_gpu else result


@contextlib.contextmanager
def pretended_cuda():
    """In the block there seems to be a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            'is_available': lambda: True,
            'device_count': lambda: 1,
            'current_device': lambda: 0,
            'synchronize': lambda *_: None,
            'mem_get_info': lambda *_: (2**33, 2**34),
            'get_rng_state': lambda *_: torch.zeros(0),
            'set_rng_state': lambda *_: None,
            'is_bf16_supported': lambda *_: True,
        }.items():
            patch.setattr(torch.cuda, name, value)
        of_cpu, mode = torch.Generator, Pretended()

        def generator(device=None):
            made = of_cpu()
            if is_gpu(device):
                mode.generators[id(made)] = made
            return made

        patch.setattr(torch, 'Generator', generator)
        for name in ('_accelerator_graph_capture_health_check', '_cuda_graph_capture_health_check'):
            patch.setattr(torch.optim.Optimizer, name, lambda _: None, raising=False)
        patch.setattr(torch.__future__, '_overwrite_module_params_on_conversion', True)
        with mode:
            yield
