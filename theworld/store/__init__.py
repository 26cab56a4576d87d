"""Sharded HDF5 of arrays by image: append, commit, read and verify; knows nothing of models."""
