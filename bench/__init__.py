"""Training, attacking and comparing image classifiers with fastsam's optimizers; see `__main__`."""
