"""Shipped settings: architectures in several sizes, data, the demo."""
