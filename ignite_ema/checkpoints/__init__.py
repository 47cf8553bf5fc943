"""Averaged weights out of the files of other systems, as a plain ``state_dict`` under the model's own names."""

from .reading import Averaged, averaged_state_dict, read
from .safe_load import load_file
from .saving import save_file

__all__ = ["Averaged", "averaged_state_dict", "load_file", "read", "save_file"]
