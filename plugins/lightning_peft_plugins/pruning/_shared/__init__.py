"""Shared by several pruning methods: timeline, scores, and the statistics these are made of."""
