"""Implicit Q-Learning (Kostrikov et al. 2021, arXiv:2110.06169) for TorchRL."""
