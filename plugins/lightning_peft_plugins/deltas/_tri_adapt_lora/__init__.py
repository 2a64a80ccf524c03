"""What TriAdaptLoRA alone needs: a product with a square matrix of two triangles, which grows by a border."""
