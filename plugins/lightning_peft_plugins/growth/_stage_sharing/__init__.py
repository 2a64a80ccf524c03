"""Helpers of StageSharing."""
