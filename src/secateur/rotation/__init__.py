"""The cut of the hidden width: rotated to its principal directions, then sliced.

A kind of cut of its own: all blocks are touched alike, and so are embeddings and head, which no
other cut changes. :mod:`plan` holds sizes and bases, :mod:`weights` the arithmetic on tensors,
:mod:`stages` the pass over the calibration text, :mod:`original` the same cut as projections in the
original model, :mod:`run` all of it in order, :mod:`modules` what runs in the end.
"""
