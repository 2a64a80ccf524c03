"""Adam with an age for every coordinate, and the candidates that SpIEL collects."""
