"""Reads averaged weights from files of other systems, as a plain ``state_dict`` under the model's own names."""

from .files import load_file, save_file
from .reading import Averaged, averaged_state_dict, read

__all__ = ["Averaged", "averaged_state_dict", "load_file", "read", "save_file"]
