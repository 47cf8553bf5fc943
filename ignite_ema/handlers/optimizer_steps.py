"""Whether an optimizer has stepped, for those who want to move only when the weights have."""

from typing import Any

from torch.optim import Optimizer

__all__ = ["StepWatch"]


class StepWatch:
    """Watches the steps of one optimizer, until it is removed.

    Args:
        optimizer: whose steps; a step that a ``GradScaler`` skips is none.
        has_stepped: whether a step waits from before.

    Attributes:
        has_stepped: whether there was a step; to be set to False by whoever has acted on it.
    """

    def __init__(self, optimizer: Optimizer, has_stepped: bool = False) -> None:
        self.has_stepped = has_stepped
        self._hook = optimizer.register_step_post_hook(self._note)

    def remove(self) -> None:
        """Takes the hook off the optimizer."""
        self._hook.remove()

    def _note(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        # A fused optimizer is always called by a GradScaler, and skips the step itself where this is not 0.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not found_inf.item():
            self.has_stepped = True
