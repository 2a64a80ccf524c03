"""Where SSF finds the channels of a layer, and what it puts beside it."""
