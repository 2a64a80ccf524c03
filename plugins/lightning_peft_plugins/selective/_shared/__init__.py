"""Shared by several selective methods."""
