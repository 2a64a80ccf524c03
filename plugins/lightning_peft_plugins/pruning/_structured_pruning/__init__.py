"""What StructuredPruning alone needs: units that leave together, and the choice of those that do."""
