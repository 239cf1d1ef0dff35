"""Training planned before it is paid for: memory, communication, time."""
