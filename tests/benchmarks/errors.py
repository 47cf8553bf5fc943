"""The errors of averages against one that float64 computes, of a model whose weights stay or walk at random.

What is averaged is what the model holds, rounded to its type, so that the error is that of the averaging alone.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .measure import threads
from .peers import Build, built, update_of

__all__ = ["measure", "small"]


def small(dtype: torch.dtype) -> nn.Module:
    """Three layers whose weights have sizes of .02, .1 and 1; the same at each call."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
    for layer, size in zip(model, (0.02, 0.1, 1.0), strict=True):
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=size, generator=generator)
    return model.to(dtype)


def measure(
    model: nn.Module, builds: Mapping[str, Build], dtype: torch.dtype, momentum: float, step: float, updates: int
) -> dict[str, Any]:
    """Averages ``model`` by all of ``builds`` at once while it walks.

    Args:
        model: is changed.
        builds: make the averages.
        dtype: holds the averages.
        momentum: of each update.
        step: of the walk, relative to the size of the weights of each tensor; 0 keeps them as they are.
        updates: after two on the initial weights, which some libraries copy.

    Returns:
        ``way``: how far the exact average has gone from the initial weights, relative to itself. ``peers``: for each
        ``error``, relative to the exact average, ``error_of_way``, relative to that way (1 where it has stalled; None
        where there is none), and ``gone``, the part of it that was gone. ``missing``: those that cannot, and why.
    """
    own = {parameter.dtype for parameter in model.parameters()} == {dtype}
    peers, missing = built(builds, model, momentum, None if own else dtype)
    fire = [update_of(peer) for peer in peers.values()]
    start = _flat(model.parameters())
    exact = start.clone()
    with torch.no_grad(), threads(1):  # on tensors this small, more wait for each other longer than they compute
        for weights in _walk(model, step, updates):
            for update in fire:
                update()
            exact.lerp_(weights, momentum)
    way = exact - start
    figures = {name: _figures(_flat(peer.averaged()) - exact, way, exact) for name, peer in peers.items()}
    return {"way": _rms(way) / _rms(exact), "peers": figures, "missing": missing}


def _walk(model: nn.Module, step: float, updates: int) -> Iterator[Tensor]:
    """Sets the weights of the model, and gives them as they are: the initial ones twice, and then those of the walk."""
    parameters: list[Tensor] = list(model.parameters())
    generator = torch.Generator().manual_seed(1)
    position = _flat(parameters)
    sizes = torch.cat([torch.full((p.numel(),), _rms(p.detach()), dtype=torch.float64) for p in parameters])
    weights = torch.empty_like(position)
    parts = torch.split(weights, [p.numel() for p in parameters])
    views = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
    for index in range(-2, updates):
        if index >= 0 and step:
            position += step * sizes * torch.randn(sizes.shape, generator=generator, dtype=torch.float64)
        weights.copy_(position.to(parameters[0].dtype))
        torch._foreach_copy_(parameters, views)
        yield weights


def _figures(error: Tensor, way: Tensor, exact: Tensor) -> dict[str, float | None]:
    length = _rms(way)
    return {
        "error": _rms(error) / _rms(exact),
        "error_of_way": _rms(error) / length if length else None,
        "gone": 1 + (error @ way).item() / (way @ way).item() if length else None,
    }


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def _rms(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item()
