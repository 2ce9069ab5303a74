"""On the search path of train_siamfc.py: what track.py cannot use; Hydra wants a package."""
