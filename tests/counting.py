"""A source of digits that notes which images are read: what a run looks at, seen from outside of it."""

import dataclasses

import numpy as np

from tl_jax.data import sources


class Counted:
    """Images that note (split, number) of each one that is read; heads are for fingerprints and count as nothing."""

    def __init__(self, images, split, numbers, reads):
        self.images, self.split, self.numbers, self.reads = images, split, numbers, reads

    def __getitem__(self, index):
        self.reads.append((self.split, int(self.numbers[index])))
        return self.images[self.numbers[index]]

    def select(self, indices):
        return Counted(self.images, self.split, self.numbers[indices], self.reads)

    def head(self, index):
        return self.images[self.numbers[index]].tobytes()


def add_counted(monkeypatch):
    """Makes the source "counted", the digits; the list of (split, number) of all its images in the order of reading."""
    reads = []

    def load(split):
        digits = sources.load("digits", split)
        return dataclasses.replace(digits, inputs=Counted(digits.inputs, split, np.arange(len(digits)), reads))

    monkeypatch.setitem(sources.BUILTIN, "counted", load)
    return reads
