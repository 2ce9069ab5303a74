"""A package, so that a script finds `pkg://configs.shared` from any folder that it is started in."""
