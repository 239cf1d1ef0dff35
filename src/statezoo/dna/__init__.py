"""Commands on genomes: what a trained model says of variants, sequences and tracks."""
