"""The library's main job on real data: ``python -m ignite_ema.demo``.

A small convolutional net learns scikit-learn's handwritten digits from training labels of which 30 % were drawn at
random, at a constant learning rate: its test accuracy jumps from one iteration to the next, that of its average does
not. (A learning rate that decays to zero calms the net too, for which the end has to be known beforehand.) Then one run
is stopped in the middle of an epoch, rebuilt from nothing and resumed from its checkpoint, and has to end with the bits
of the run that never stopped.
"""

from .training import EPOCH_LENGTH, Run, batches, build, load_data, network, train

__all__ = ["EPOCH_LENGTH", "Run", "batches", "build", "load_data", "network", "train"]
