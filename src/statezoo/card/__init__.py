"""A finished run as a Hub repository in waiting: weights, numbers, sample and model card."""
