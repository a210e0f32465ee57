"""Evaluation of known network structures without TensorDict and without vmap."""
