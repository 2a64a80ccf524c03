"""Shared by the methods: streams, descent, entropy, batch statistics, views."""
