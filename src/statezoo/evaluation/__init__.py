"""How good a model is on texts: scores of our own, and the tasks of lm-evaluation-harness."""
