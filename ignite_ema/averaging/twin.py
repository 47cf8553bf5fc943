"""Making the averaged twin of a model: a deep copy that owns its memory, without wrappers and without gradients."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel
from torch.nn.parameter import is_lazy

from .sharding import is_sharded, local, sharding
from .storage import holds_values
from .traversal import tensors_of, unwrapped

__all__ = [
    "check_model",
    "check_tensors",
    "freeze",
    "refuse_unsupported",
    "stripped",
    "twin_of",
]

_HOLDING_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def stripped(module: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel`` and ``torch.compile``; a ``DataParallel`` stays as it is."""
    return unwrapped(module, keep=DataParallel)


def check_model(model: object) -> None:
    """Raises TypeError or ValueError unless ``model`` is a module."""
    if isinstance(model, type):
        raise TypeError(f"model should be an nn.Module, got the class {model.__name__}; make one: call it.")
    if not isinstance(model, nn.Module):
        raise ValueError(
            "model should be an instance of nn.Module or its subclasses, but got "
            f"model: {type(model).__name__}; pass the module itself."
        )


def check_tensors(name: str, module: nn.Module, may_be_meta: bool = False) -> None:
    """Raises RuntimeError where a tensor of ``module`` has no shape, or several, or no memory for its values."""
    for path, tensor in tensors_of(module).items():
        if tensor.is_nested:
            raise RuntimeError(
                f"{name} should have tensors of one shape each, got one whose '{path}' is a nested tensor; hold it as "
                "a padded tensor, or outside of the parameters and buffers."
            )
        if (lacks := _lacks(tensor, may_be_meta)) is not None:
            raise RuntimeError(
                f"{name} should be initialised before it is averaged, got one whose '{path}' has no {lacks}."
            )


def _lacks(tensor: Tensor, may_be_meta: bool) -> str | None:
    if is_lazy(tensor):
        return "shape; run it on one batch first"
    if tensor.is_meta:
        return None if may_be_meta else "values; materialise it first"
    return None if holds_values(local(tensor)) else "memory for its values; load them first"


def refuse_unsupported(model: nn.Module, has_own_twin: bool) -> None:
    """Raises RuntimeError where the parameters are held by a system that this library does not know how to read."""
    for module in model.modules():
        if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(module).__mro__):
            raise RuntimeError(
                "model should be whole, or sharded with torch.distributed.fsdp.fully_shard, got one with "
                "FullyShardedDataParallel (FSDP1), which makes one flat parameter of many; use fully_shard."
            )
    for path, tensor in tensors_of(model).items():
        if is_sharded(tensor) and not has_own_twin:
            raise RuntimeError(
                f"ema_model should be a twin that is sharded as the model is, got None where '{path}' is "
                f"{sharding(tensor)}; build the model again under torch.device('meta'), call fully_shard on it in the "
                "same way, and pass it as ema_model=."
            )
        if hasattr(tensor, "ds_id"):
            raise RuntimeError(
                "model should be whole, or sharded with torch.distributed.fsdp.fully_shard, got one whose "
                f"'{path}' is partitioned by DeepSpeed ZeRO-3; use its stage 1 or 2, or fully_shard."
            )


def freeze(module: nn.Module) -> None:
    """Takes the gradients from every tensor of ``module``."""
    for tensor in tensors_of(module).values():
        tensor.requires_grad_(False)


def twin_of(
    model: nn.Module,
    own: nn.Module | None,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    share_frozen: bool,
) -> nn.Module:
    """The averaged twin of ``model``: a copy as :func:`_make_twin` makes it, or ``own``, checked and with memory."""
    if own is None:
        return _make_twin(model, dtype, _checked_device(device), share_frozen)
    _check_own_twin(own, dtype, device, share_frozen)
    _materialise(own, model)
    return own


def _check_own_twin(twin: nn.Module, dtype: object, device: object, share_frozen: bool) -> None:
    """Raises TypeError, ValueError or RuntimeError where ``twin`` cannot be the averaged twin of a model."""
    if not isinstance(twin, nn.Module):
        raise TypeError(f"ema_model should be an nn.Module, got {type(twin).__name__}.")
    check_tensors("ema_model", twin, may_be_meta=True)
    if dtype is not None or device is not None:
        raise ValueError(
            f"dtype and device should be None where ema_model brings its own, got {dtype} and {device}; move the "
            "module with ema_model.to(...) first."
        )
    if share_frozen:
        raise ValueError(
            "share_frozen should be False where ema_model brings its own parameters, got True; leave ema_model out."
        )
    for path, tensor in tensors_of(twin).items():
        if tensor.is_inference():
            raise ValueError(
                f"ema_model should hold tensors that can be updated, but '{path}' was made inside "
                "torch.inference_mode(); build the twin outside of it."
            )


def _checked_device(device: torch.device | str | None) -> torch.device | None:
    """The device that is meant; raises TypeError or ValueError unless there is such a one, and it holds values."""
    if device is None:
        return None
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"device should be a torch.device or a name such as 'cpu' or 'cuda:0', got {device!r}.") from None
    if found.type == "meta":
        raise ValueError("device should be one that holds values, got 'meta'; pass 'cpu' or an accelerator.")
    try:
        torch.empty(0, device=found)
    except Exception as error:  # of which kind depends on the device
        reason = str(error).partition("\n")[0].removesuffix(".")
        raise ValueError(
            f"device should be one that is there, got {str(device)!r} ({reason}); pass another."
        ) from error
    return found


def _materialise(twin: nn.Module, model: nn.Module) -> None:
    """Gives memory to a twin on the meta device, where the tensors of ``model`` live; its ties stay."""
    if not any(tensor.is_meta for tensor in tensors_of(twin).values()):
        return
    devices = {tensor.device for tensor in tensors_of(model).values()}
    if len(devices) != 1:
        raise ValueError(
            f"ema_model should have memory where the model is on {len(devices)} devices, got one on the meta device; "
            "materialise it with ema_model.to_empty(device=...) first."
        )
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for module in twin.modules():
        for owner in (module._parameters, module._buffers):
            for key, tensor in owner.items():
                places.setdefault(id(tensor), []).append((owner, key))
    twin.to_empty(device=devices.pop())
    for (first, name), *tied in places.values():
        for owner, key in tied:
            owner[key] = first[name]


def _make_twin(
    model: nn.Module, dtype: torch.dtype | None, device: torch.device | None, share_frozen: bool = False
) -> nn.Module:
    """A deep copy of ``model`` that shares no memory with it, but for frozen parameters if asked.

    Args:
        model: the model; ``DistributedDataParallel`` and compiled modules inside it become plain ones.
        dtype: holds floating-point tensors, and complex ones in its complex counterpart; None: their own.
        device: where the copy lives; None: each tensor where its original lives.
        share_frozen: whether parameters that do not require gradients are the same in both, as they are.

    Raises:
        TypeError, ValueError: for a ``dtype`` that cannot hold an average.
        RuntimeError: for a model that cannot be deep-copied; says which attribute of which module is in the way.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype should be a torch.dtype, such as torch.float32, got {dtype!r}.")
    if dtype is not None and dtype not in _HOLDING_TYPES:
        raise ValueError(f"dtype should be one of {', '.join(map(str, _HOLDING_TYPES))}, got {dtype}.")
    with torch.inference_mode(False), torch.no_grad():
        try:
            # deepcopy looks here first, so it meets finished copies of the tensors and never the wrappers.
            memo: dict[int, Any] = {}
            for tensor in tensors_of(model).values():
                if share_frozen and isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
                    memo[id(tensor)] = tensor
                elif (copied := _copied(tensor, dtype, device)) is not None:
                    memo[id(tensor)] = copied
            for module in reversed(list(model.modules())):
                if (wrapped := stripped(module)) is not module:
                    memo[id(module)] = copy.deepcopy(wrapped, memo)
            twin: nn.Module = copy.deepcopy(model, memo)
        except Exception as error:
            raise RuntimeError(
                f"model should be one that copy.deepcopy can copy, got {type(model).__name__} where "
                f"{_obstacle(model, error)}; build the twin yourself, the way the model is built, and pass it as "
                "ema_model=."
            ) from error
    return twin


def _copied(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | None) -> Tensor | None:
    """The copy of a tensor, or None where deepcopy does it better."""
    held = tensor.dtype
    if dtype is not None and tensor.is_floating_point():
        held = dtype
    elif dtype is not None and tensor.is_complex():
        held = max(dtype, torch.float32, key=lambda t: torch.finfo(t).bits).to_complex()
    is_parameter = isinstance(tensor, nn.Parameter)
    moved = held != tensor.dtype or device not in (None, tensor.device)
    if type(tensor) not in (Tensor, nn.Parameter):  # may have attributes and a deepcopy of its own
        result = copy.deepcopy(tensor)
        if moved:
            result.data = result.data.to(device, held)
        return result
    is_plain = tensor.is_leaf and not tensor.is_inference() and tensor.layout is torch.strided
    if not is_parameter and is_plain and not moved:
        return None  # with its attributes, and what shares its memory
    result = tensor.detach().to(device=device, dtype=held, copy=True)
    return nn.Parameter(result, requires_grad=False) if is_parameter else result


def _obstacle(model: nn.Module, error: Exception) -> str:
    """What raised ``error`` when the model was copied: the first attribute that raises the same, else its text."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            try:
                if name not in ("_parameters", "_buffers", "_modules"):
                    copy.deepcopy(value)
            except Exception as again:
                if (type(again), str(again)) != (type(error), str(error)):
                    continue
                where = f"'{path}.{name}'" if path else f"'{name}'"
                if isinstance(value, Tensor) and not value.is_leaf:
                    return f"{where} is the result of a computation (an activation, pruning, old weight_norm)"
                return f"{where} ({type(value).__name__}) is in the way: {error}"
    return str(error)
