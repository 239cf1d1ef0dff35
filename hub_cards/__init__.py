"""Published models, a folder each."""
