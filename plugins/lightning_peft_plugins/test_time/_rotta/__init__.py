"""Helpers of RoTTA."""
