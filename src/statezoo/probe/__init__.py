"""What a model can do: probes of architectures, and a test of its own sampler."""
