"""Makes the averaged twin of a model: a deep copy that owns its memory, without wrappers and without gradients."""

import contextlib
import copy
import dis
import functools
import types
import weakref
from collections import OrderedDict
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.nn.parameter import is_lazy

from .checks import listed, warn_user
from .memory import has_values
from .names import parameters_and_buffers, parameters_of, tensors_of, unwrapped
from .sharding import is_sharded, local, sharding

_HOLDING_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TABLES = ("_parameters", "_buffers", "_modules")
_ATOMIC = (int, float, str, bytes, type(None))
_HOOKS = {"_forward_pre_hooks": "forward_pre_hook", "_forward_hooks": "forward_hook"}
# Attributes that do not compute in a forward pass of the twin. Accelerate sets to() and cuda(), torchao extra_repr().
_OF_EVERY_MODULE = {*dir(nn.Module())} - {"forward", *_HOOKS}


def stripped(module: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel`` and ``torch.compile``; a ``DataParallel`` stays as it is."""
    return unwrapped(module, keep=DataParallel)


def check_model(model: object, has_own_twin: bool) -> None:
    """Raises TypeError, ValueError or RuntimeError unless ``model`` is a module that can be averaged."""
    if isinstance(model, type):
        raise TypeError(f"model should be an nn.Module, got the class {model.__name__}; make one by calling it.")
    if not isinstance(model, nn.Module):
        raise ValueError(
            "model should be an instance of nn.Module or its subclasses, but got "
            f"model: {type(model).__name__}; pass the module itself."
        )
    kinds = {base.__name__ for kind in set(map(type, model.modules())) for base in kind.__mro__}
    if "FullyShardedDataParallel" in kinds:
        raise RuntimeError(
            "model should be unsharded, or sharded with torch.distributed.fsdp.fully_shard, got a model with "
            "FullyShardedDataParallel (FSDP1), which makes one flat parameter of many. Use fully_shard."
        )
    _check_tensors("model", model, may_be_sharded=has_own_twin)


def twin_of(
    model: nn.Module,
    own: nn.Module | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    share_frozen: bool,
    trains: bool,
) -> nn.Module:
    """The averaged twin of ``model``: the user's ``own``, with memory, or a deep copy; :func:`settle` makes it ready.

    Raises TypeError or ValueError for an argument of the wrong type or value, and RuntimeError for a model that cannot
    be deep-copied, or whose weights change with its mode.
    """
    if own is None:
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype should be a torch.dtype, such as torch.float32, got {dtype!r}.")
        if dtype not in (None, *_HOLDING_TYPES):
            raise ValueError(f"dtype should be one of {', '.join(map(str, _HOLDING_TYPES))}, got {dtype}.")
        _refuse_changing_mode(model, trains, on_copies=True)
        twin = _copied(model, dtype, _checked_device(device), share_frozen)
    else:
        if not isinstance(own, nn.Module):
            raise TypeError(f"ema_model should be an nn.Module, got {type(own).__name__}.")
        _check_tensors("ema_model", own, may_be_meta=True)
        if dtype is not None or device is not None:
            raise ValueError(
                f"dtype and device should be None if you pass ema_model, got {dtype} and {device}. Move the module "
                "with ema_model.to(...) first."
            )
        if share_frozen:
            raise ValueError("share_frozen should be False if you pass ema_model, got True. Leave one of the two out.")
        _materialize(own, model)
        twin = own
    _warn_of_shared_functions(model, twin)
    return twin


def settle(twin: nn.Module, is_own: bool, trains: bool) -> None:
    """Puts a twin that fits the model into eval mode (train mode if it ``trains``), and turns its gradients off.

    Raises RuntimeError if the weights of the user's own twin change with its mode.
    """
    if is_own:
        _refuse_changing_mode(twin, trains, on_copies=False)
    _set_mode(twin, trains)
    for parameter in parameters_of(twin):  # TorchScript modules cannot do all at once
        parameter.requires_grad_(False)


def _check_tensors(argument: str, module: nn.Module, *, may_be_sharded: bool = True, may_be_meta: bool = False) -> None:
    """Raises RuntimeError if a tensor of ``module`` cannot be averaged as it is."""
    for tensor in parameters_and_buffers(module):
        fault = None
        if is_lazy(tensor):
            fault = "has no shape; run the model on one batch first"
        elif tensor.is_nested:
            fault = "is a nested tensor without one shape; pad it, or keep it outside of the parameters and buffers"
        elif hasattr(tensor, "ds_id"):
            fault = "is partitioned by DeepSpeed ZeRO-3. Use its stage 1 or 2, or fully_shard"
        elif tensor.is_meta:
            fault = None if may_be_meta else "has no values; materialize it first"
        elif not has_values(local(tensor)):
            fault = "has no memory for its values; load them first"
        elif is_sharded(tensor) and not may_be_sharded:
            fault = (
                f"is {sharding(tensor)}, so ema_model should be a twin that is sharded as the model is, got None. "
                "Build the model again under torch.device('meta'), call fully_shard on it in the same way, and pass it "
                "as ema_model="
            )
        if fault is not None:
            name = next(name for name, own in tensors_of(module).items() if own is tensor)
            raise RuntimeError(f"{argument} should have tensors that can be averaged, but '{name}' {fault}.")


def _checked_device(device: torch.device | str | None) -> torch.device | None:
    """The device; raises ValueError unless it exists and can store values."""
    if device is None:
        return None
    try:
        found = torch.empty(0, device=device).device
    except Exception as error:  # the kind of error depends on the device
        reason = str(error).partition("\n")[0].removesuffix(".")
        raise ValueError(
            f"device should be a device that exists, such as 'cpu' or 'cuda:0', got {device!r} ({reason})."
        ) from error
    if found.type == "meta":
        raise ValueError("device should be one that stores values, got 'meta'; pass 'cpu' or an accelerator.")
    return found


def _materialize(twin: nn.Module, model: nn.Module) -> None:
    """Gives a twin on the meta device memory on the device of ``model``; its ties stay."""
    if not any(tensor.is_meta for tensor in parameters_and_buffers(twin)):
        return
    devices = {tensor.device for tensor in parameters_and_buffers(model)}
    if len(devices) != 1:
        raise ValueError(
            f"ema_model should have memory if the model is on {len(devices)} devices, got a twin on the meta device. "
            "Materialize it with ema_model.to_empty(device=...) first."
        )
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in twin.modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                places.setdefault(id(tensor), []).append((table, key))
    twin.to_empty(device=devices.pop())
    for (first, name), *tied in places.values():
        for table, key in tied:
            table[key] = first[name]
    attributes = [
        f"{path}.{key}".lstrip(".")
        for path, module in twin.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, Tensor) and value.is_meta
    ]
    if attributes:
        warn_user(
            f"{listed(attributes)} of ema_model stays on the meta device: it is not a buffer and has no values. "
            "Register it with register_buffer(..., persistent=False), or set it on the twin yourself; swapped() needs "
            "neither."
        )


def _copied(model: nn.Module, dtype: torch.dtype | None, device: torch.device | None, share_frozen: bool) -> nn.Module:
    """A deep copy of ``model`` without wrappers that shares no memory with it, except frozen parameters if asked."""
    with torch.inference_mode(False), torch.no_grad():
        try:
            # deepcopy looks here first, so it meets finished copies of the tensors and never the wrappers.
            memo: dict[int, Any] = {}
            for tensor in parameters_and_buffers(model):
                if share_frozen and isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                    memo[id(tensor)] = tensor
                elif (copied := _copied_tensor(tensor, dtype, device)) is not None:
                    memo[id(tensor)] = copied
            modules = list(model.modules())
            for value in (value for module in modules for value in vars(module).values()):
                if type(value) in (OrderedDict, set) and not value:  # for these deepcopy would take most of its time
                    memo[id(value)] = type(value)()
            for module in reversed(modules):
                if (wrapped := stripped(module)) is not module:
                    memo[id(module)] = copy.deepcopy(wrapped, memo)
            twin: nn.Module = copy.deepcopy(model, memo)
        except Exception as error:
            raise RuntimeError(
                f"model should be one that copy.deepcopy can copy, got {type(model).__name__}, in which "
                f"{_obstacle(model, error).removesuffix('.')}. Build the twin yourself, the way the model is built, "
                "and pass it as ema_model=."
            ) from error
    return twin


def _copied_tensor(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | None) -> Tensor | None:
    """A copy of the tensor, or None if deepcopy does it better."""
    target = tensor.dtype
    if dtype is not None and tensor.is_floating_point():
        target = dtype
    elif dtype is not None and tensor.is_complex():
        target = max(dtype, torch.float32, key=lambda t: torch.finfo(t).bits).to_complex()
    is_parameter = isinstance(tensor, nn.Parameter)
    moved = target != tensor.dtype or device not in (None, tensor.device)
    if type(tensor) not in (Tensor, nn.Parameter):  # may have attributes and its own deepcopy
        result = copy.deepcopy(tensor)
        if moved:
            result.data = result.data.to(device, target)
        return result
    is_plain = tensor.is_leaf and not tensor.is_inference() and tensor.layout is torch.strided
    if not is_parameter and is_plain and not moved:
        return None  # deepcopy keeps its attributes, and ties of what shares its memory
    result = tensor.detach().to(device=device, dtype=target, copy=True)
    return nn.Parameter(result, requires_grad=False) if is_parameter else result


def _obstacle(model: nn.Module, error: Exception) -> str:
    """What kept the model from being copied: the first attribute that raises the same error, else the error's text."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            try:
                if name not in _TABLES:
                    copy.deepcopy(value)
            except Exception as again:
                if (type(again), str(again)) != (type(error), str(error)):
                    continue
                where = f"'{path}.{name}'" if path else f"'{name}'"
                if isinstance(value, Tensor) and not value.is_leaf:
                    return f"{where} is the result of a computation (an activation, pruning, old weight_norm)"
                return f"{where} ({type(value).__name__}) is in the way: {error}"
    return str(error)


def _set_mode(module: nn.Module, trains: bool) -> None:
    with contextlib.suppress(NotImplementedError):  # an exported program has only one mode
        (module.train if trains else module.eval)()


def _refuse_changing_mode(model: nn.Module, trains: bool, on_copies: bool) -> None:
    """Raises RuntimeError if ``eval()`` (or ``train()``) changes weights, as adapters that merge do.

    Tries only modules whose class overrides one of the two: copies of them, or the modules themselves with
    ``on_copies=False``.
    """
    for path, module in model.named_modules():
        kind = type(module)
        if (kind.train is nn.Module.train and kind.eval is nn.Module.eval) or unwrapped(module) is not module:
            continue
        trial = _copied(module, None, None, share_frozen=False) if on_copies else module
        before = {name: weight.clone() for name, weight in _weights(trial).items()}
        _set_mode(trial, trains)
        after = _weights(trial)
        name = next((name for name in before if not _equal(before[name], after.get(name))), None)
        if name is not None:
            raise RuntimeError(
                f"model should keep its weights if its mode changes, but {'train' if trains else 'eval'}() of "
                f"'{path or kind.__name__}' ({kind.__name__}) changes '{name}', as adapters that merge do. Turn "
                "merging off (for loralib: merge_weights=False) before the average is made."
            )


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: local(one) for name, one in tensors_of(module).items() if isinstance(one, nn.Parameter)}


def _equal(before: Tensor, after: Tensor | None) -> bool:
    if after is None or before.shape != after.shape or before.dtype != after.dtype:
        return False
    if before.layout is not torch.strided:
        return True
    if before.is_floating_point() and before.element_size() == 1:  # has no operations
        return torch.equal(before.view(torch.uint8), after.view(torch.uint8))
    return torch.equal(before.nan_to_num(), after.nan_to_num())


def _warn_of_shared_functions(model: nn.Module, twin: nn.Module) -> None:
    """Warns if functions of the twin compute with modules of the model: deepcopy does not copy functions."""
    found = [
        (f"{path}.{_HOOKS.get(name, name)}".lstrip("."), value)
        for path, module in twin.named_modules()
        for name, value in vars(module).items()
        if name not in _OF_EVERY_MODULE and not isinstance(value, _ATOMIC) and not (name in _HOOKS and not value)
    ]
    if not found:
        return
    shared = {id(one) for one in parameters_of(twin)}
    online = {id(one) for one in (*model.modules(), *parameters_and_buffers(model)) if id(one) not in shared}
    names = [name for name, value in found if _refers_to(value, online, set())]
    if names:
        warn_user(
            f"ema_model still calls {listed(names)} of the model, since copy.deepcopy does not copy functions, and "
            "computes with the online weights. Compile with model.compile(), which is copied, evaluate with swapped(), "
            "or build the twin in the same way as the model and pass it as ema_model=."
        )


def _refers_to(value: object, online: set[int], seen: set[int]) -> bool:
    """Whether a function reaches any of ``online`` by its closure, its defaults, or what it wraps or is bound to."""
    if id(value) in online:
        return True
    if id(value) in seen or isinstance(value, (*_ATOMIC, type, types.ModuleType, nn.Module, Tensor)):
        return False
    seen.add(id(value))
    reached: list[object] = []
    if isinstance(value, types.MethodType):
        reached = [value.__self__, value.__func__]
    elif isinstance(value, functools.partial):
        reached = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, types.FunctionType):
        reached = [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *vars(value).values()]
        reached += [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        names = {step.argval for step in dis.get_instructions(value) if step.opname == "LOAD_GLOBAL"}
        found = [value.__globals__.get(name) for name in names]
        reached += [one for one in found if isinstance(one, (nn.Module, types.MethodType, functools.partial))]
    elif isinstance(value, weakref.ref):
        reached = [value()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        reached = list(value)
    elif isinstance(value, dict):
        reached = list(value.values())
    elif is_dataclass(value):
        reached = [getattr(value, field.name, None) for field in fields(value)]
    elif callable(value) and hasattr(value, "__dict__"):
        reached = [one for one in vars(value).values() if callable(one)]
    return any(_refers_to(one, online, seen) for one in reached)
