"""On the search path of every script; Hydra wants a package."""
