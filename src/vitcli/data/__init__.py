"""Where examples come from, how they are augmented, and which of them form a step."""
