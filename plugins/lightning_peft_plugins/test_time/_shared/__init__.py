"""What the methods share: streams, descent, entropy, batch statistics, views."""
