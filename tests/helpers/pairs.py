"""Few combinations that tell as much as all."""

from itertools import combinations, product


def pairwise(*dimensions):
    """Combinations of one choice of each dimension, in which every two choices of different dimensions meet."""

    def pairs(row):
        return set(combinations(enumerate(row), 2))

    rows = list(product(*dimensions))
    missing, chosen = set().union(*map(pairs, rows)), []
    while missing:
        chosen.append(max(rows, key=lambda row: len(missing & pairs(row))))
        missing -= pairs(chosen[-1])
    return chosen
