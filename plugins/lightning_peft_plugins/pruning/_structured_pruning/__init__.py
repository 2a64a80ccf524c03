"""Helpers of StructuredPruning: units that leave together, and the choice of those that do."""
